"""Which code a configuration may name.

A configuration is often somebody else's file, and `_component_` calls what it names. So the list says what is allowed,
not what is forbidden (lists of forbidden names always have a gap: `torch.os.system` is `os.system`). Allowed are the
building blocks below, Python files in the folder of the user's own recipe and configuration, and modules that the user
names with `--trust` on the command line; never through the configuration itself. What counts is the module that defines
the object, not the path it was reached by.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torchmask.config import signatures
from torchmask.errors import ConfigError

BUILDING_BLOCKS = (
    "torchmask.data",
    "torchmask.tokenizers",
    "torchmask.models",
    "torchmask.modules",
    "torchmask.training",
    "torchmask.generation",
    "torchmask.evaluation",
    "torch.nn",
    "torch.optim",
    "torchao.optim",
    "torchao.quantization",
    "torchao.float8",
)
"""Packages whose classes and functions every configuration may name."""

NO_BLOCKS = (
    "torchmask.data.build_lock",
    "torchmask.data.cache",
    "torchmask.data.cached_rows",
    "torchmask.data.fingerprints",
    "torchmask.data.mapped",
    "torchmask.data.stream_ledger",
    "torchmask.data.view",
    "torchmask.data.workers",
    "torchmask.models.adapter_export",
    "torchmask.models.export",
    "torchmask.models.weights",
    "torchmask.tokenizers.saving",
    "torchmask.training.checkpoint",
    "torchmask.training.loss_curve",
    "torchmask.training.metrics",
    "torchmask.training.record",
    "torchmask.training.resume",
    "torchmask.training.run",
)
"""Modules in those packages that write or remove what their arguments name: for recipes, never for configurations."""

_FOREIGN_BLOCKS = [block for block in BUILDING_BLOCKS if not block.startswith("torchmask.")]


@dataclass(frozen=True)
class Trust:
    """What a configuration may name beyond the building blocks.

    Args:
        modules: dotted names of modules given with `--trust`; their submodules are included.
        folders: folders whose Python files may be named: those of the user's recipe and configuration.
    """

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def allows_module(self, module: str) -> bool:
        """Whether objects defined in `module` may be used."""
        if module in NO_BLOCKS and module not in self.modules:
            return False
        if any(module == prefix or module.startswith(prefix + ".") for prefix in (*BUILDING_BLOCKS, *self.modules)):
            return True
        return self.in_folder(module)

    def in_folder(self, module: str) -> bool:
        """Whether `module` is a Python file or package in one of the folders (and not something of the same name)."""
        for folder in self.folders:
            root = Path(folder) / module.split(".")[0]
            if (root.with_suffix(".py").is_file() or (root / "__init__.py").is_file()) and _file_below(module, folder):
                return True
        return False


_session = Trust()


def trust_for_this_process(trust: Trust) -> None:
    """Makes `instantiate` accept what `trust` allows, until this is called again."""
    global _session
    _session = trust


def current_trust() -> Trust:
    """What `instantiate` accepts in this process."""
    return _session


def check_dotpath(dotpath: str, trust: Trust, *, where: str | None = None) -> signatures.Definition | None:
    """The definition behind an allowed dotpath, or None where only an import can tell.

    Nothing is imported. None still means that every module on the way is allowed.

    Raises:
        ConfigError: C07 if the dotpath is refused, C06 if there is nothing of that name.
    """
    parts = dotpath.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError("C06", f"{dotpath!r} is not a dotted path to a class or function", where=where)
    if any(part.startswith("_") for part in parts):
        raise ConfigError("C07", f"{dotpath!r} is refused: names that start with _ are private", where=where)
    definition = signatures.find(dotpath, folders=trust.folders)
    if definition is not None:
        if not trust.allows_module(definition.module):
            raise _refused(dotpath, definition.module, where)
        return definition
    module, names = _split(dotpath, trust)
    foreign = signatures.imported_module(module, names[0], folders=trust.folders) if module else None
    if foreign is not None and not trust.allows_module(foreign):  # `torch.os` is `os`
        raise _refused(dotpath, foreign, where)
    if module is None or not trust.allows_module(module):
        known = trust.allows_module(parts[0]) or any(block.startswith(parts[0] + ".") for block in BUILDING_BLOCKS)
        if known and module is None:
            raise _unknown(dotpath, module, names, trust, where)
        raise _refused(dotpath, module or parts[0], where)
    if not signatures.may_define(module, names[0], folders=trust.folders):
        raise _unknown(dotpath, module, names, trust, where)
    return None


def import_component(dotpath: str, trust: Trust, *, where: str | None = None) -> Callable[..., Any]:
    """The class or function that an allowed dotpath names.

    Raises:
        ConfigError: C07 if it, or what it really is, is refused; C06 if there is nothing of that name.
    """
    check_dotpath(dotpath, trust, where=where)
    module_name, names = _split(dotpath, trust)
    assert module_name is not None  # check_dotpath found it
    for folder in trust.folders:
        if trust.in_folder(module_name) and folder not in sys.path:
            sys.path.append(folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError("C06", f"{module_name} cannot be imported: {error}", where=where) from error
    origin = signatures.module_file(module_name, folders=trust.folders)
    if trust.in_folder(module_name) and Path(str(getattr(found, "__file__", ""))).resolve() != _resolved(origin):
        raise _refused(dotpath, module_name, where)  # another module of that name was imported before
    for index, name in enumerate(names):
        if index > 0 and not isinstance(found, type):  # only classes may be entered, never modules or instances
            raise _refused(dotpath, module_name, where)
        try:
            found = getattr(found, name)
        except AttributeError:
            raise _unknown(dotpath, module_name, names, trust, where) from None
        home = getattr(found, "__module__", None)
        if not isinstance(home, str) or not trust.allows_module(home):
            raise _refused(dotpath, f"{home or type(found).__name__}", where)
    if not callable(found):
        raise ConfigError("C06", f"{dotpath} is not a class or function", where=where)
    result: Callable[..., Any] = found
    return result


def _split(dotpath: str, trust: Trust) -> tuple[str | None, list[str]]:
    """The longest module at the start of a dotpath that has a source file, and the names after it."""
    parts = dotpath.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if signatures.module_file(".".join(parts[:cut]), folders=trust.folders):
            return ".".join(parts[:cut]), parts[cut:]
    return None, parts


def _resolved(path: Path | None) -> Path | None:
    return path.resolve() if path else None


@functools.cache
def _file_below(module: str, folder: str) -> bool:
    file = signatures.module_file(module, folders=(folder,))
    return file is not None and file.resolve().is_relative_to(Path(folder).resolve())


def _refused(dotpath: str, module: str, where: str | None) -> ConfigError:
    return ConfigError(
        "C07",
        f"{dotpath!r} is refused"
        + (f": it is defined in {module!r}, which" if not dotpath.startswith(module + ".") else ": it")
        + " is not on the list of what a configuration may call; nothing was imported",
        where=where,
        fix=f"use parts of torchmask, {', '.join(_FOREIGN_BLOCKS)} or a Python file beside your recipe or "
        f"configuration; if you know this code, add `--trust {module}` to the command line",
    )


def _unknown(dotpath: str, module: str | None, names: list[str], trust: Trust, where: str | None) -> ConfigError:
    if module is None:
        return ConfigError("C06", f"there is no module {dotpath.rpartition('.')[0]!r}", where=where)
    listed = signatures.public_names(module, folders=trust.folders)
    near = get_close_matches(names[0], listed, n=3)
    fix = f"did you mean {' or '.join(f'{module}.{name}' for name in near)}?" if near else f"see {module}'s `__all__`"
    return ConfigError("C06", f"{module} has nothing named {names[0]!r}", where=where, fix=fix)
