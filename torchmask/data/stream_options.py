"""Arguments of data sets that cannot be parts of a stream, told before anything is opened.

Recipes look at them while their configuration is checked, so what is imported here is light.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchmask.data.columns import one_policy
from torchmask.data.eos import EosPolicy
from torchmask.errors import ConfigError

LOOSE = ("over_length", "no_targets", "max_truncated_away")
"""Options of packing that may change on resume: by these a person gets over an error of the data."""
_WHOLE = {
    "cache": "a stream is for what is not kept; leave cache out",
    "max_rows": "a builder of a stream sees one window at a time; write split: train[:1000]",
}


def check_streamed(arguments: Sequence[Mapping[str, Any]]) -> None:
    """Whether data sets can be the parts of one stream, as far as their arguments tell.

    Args:
        arguments: of each part's builder, as a recipe's `sources.N.dataset` has them.

    Raises:
        ConfigError: C09, arguments that need all rows at once, or two policies for what happens between documents;
            as `EosPolicy`.
    """
    policies: list[EosPolicy] = []
    for i, given in enumerate(arguments):
        where = f"sources.{i}.dataset"
        refuse_whole(given, str(given.get("_component_", "the data set")).rpartition(".")[2], where=where)
        policies.append(EosPolicy.of(given.get("eos"), preset=given.get("eos_policy")))
        try:
            one_policy([policies[0], policies[i]])
        except ConfigError as error:
            message = f"{error.message}: sources.0 and this one"
            raise ConfigError(error.id, message, where=f"{where}.eos", fix=error.fix) from error


def refuse_whole(arguments: Mapping[str, Any], called: str, *, where: str | None) -> None:
    """Raises if a builder's arguments need all rows at once.

    Raises:
        ConfigError: C09 with the key.
    """
    for key, fix in _WHOLE.items():
        if arguments.get(key) not in (None, False):
            message = f"{called}: {key} needs all rows at once, a stream has them never"
            raise ConfigError("C09", message, where=where and f"{where}.{key}", fix=fix)
