"""What may stand between `${` and `}`: another key, `here:`, or an environment variable on a short list.

OmegaConf resolves references to other keys. Its own resolvers (`oc.env` above all) are refused: a configuration from a
stranger must not be able to copy a token from the environment into a file that is written, logged or uploaded.
"""

import os
import re
from pathlib import Path

from torchmask.config.built_in import built_in_folder
from torchmask.config.document import Node
from torchmask.errors import ConfigError

READABLE_ENVIRONMENT = (
    "HOME",
    "USER",
    "TMPDIR",
    "SCRATCH",
    "HF_HOME",
    "TORCHMASK_ASSETS",
    "TORCHMASK_DATA",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_TMPDIR",
)
"""Environment variables that `${torchmask.env:NAME}` may read; none of them holds a secret."""


# an even number of backslashes before `${` leaves it active: they escape each other
_ACTIVE = r"(?<!\\)((?:\\\\)*)\$\{"
_WITH_COLON = re.compile(_ACTIVE + r"([^{}]*:[^{}]*)\}")
_INNERMOST = re.compile(r"\$\{[^{}:]*\}")


def resolve_ours(root: Node, *, folder: Path) -> list[ConfigError]:
    """Replaces `${here:...}` and `${torchmask.env:...}` in place and returns what was wrong.

    Args:
        root: the configuration, overrides included.
        folder: where the configuration file lies; `${here:data/train.json}` is relative to it.

    Values that are wrong are removed, so that nothing else complains about them.
    """
    problems: list[ConfigError] = []
    for path, node in list(root.walk()):
        if not isinstance(node.value, str) or "${" not in node.value:
            continue
        try:
            node.value = node.text = _WITH_COLON.sub(lambda found: found[1] + _resolve(found[2], folder), node.value)
            _refuse_nested(node.value)
        except ConfigError as error:
            where = f"{node.place}: {'.'.join(path)}"
            problems.append(ConfigError(error.id, error.message, where=where, fix=error.fix))
            root.drop(path)
    return problems


def _refuse_nested(text: str) -> None:
    """Refuses a resolver whose name is put together from references: `${oc.${x}:...}`."""
    while (shorter := _INNERMOST.sub("", text)) != text:
        text = shorter
    if re.search(_ACTIVE + r"[^}]*:", text):
        raise ConfigError("C14", "a reference inside the name of a resolver is refused", fix="write the name itself")


def _resolve(expression: str, folder: Path) -> str:
    resolver, argument = (part.strip() for part in expression.split(":", 1))
    if resolver == "here":
        return str(folder / argument)
    if resolver == "torchmask.configs":
        return str(built_in_folder("configs") / argument)
    if resolver != "torchmask.env":
        raise ConfigError(
            "C14",
            f"the resolver {resolver!r} is refused",
            fix="use ${key}, ${here:path beside the configuration}, ${torchmask.configs:path} or ${torchmask.env:NAME}",
        )
    name, _, default = argument.partition(",")
    if name not in READABLE_ENVIRONMENT:
        raise ConfigError(
            "C14",
            f"the environment variable {name!r} may not be read by a configuration",
            fix=f"readable are {', '.join(READABLE_ENVIRONMENT)}; or pass the value on the command line",
        )
    value = os.environ.get(name, default.strip() if "," in argument else None)
    if value is None:
        raise ConfigError(
            "C14", f"the environment variable {name} is not set", fix=f"${{torchmask.env:{name},default}}"
        )
    if "${" in value:
        raise ConfigError("C14", f"the environment variable {name} holds '${{': it would be read as a reference")
    return value
