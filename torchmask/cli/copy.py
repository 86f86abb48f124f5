"""`torchmask cp NAME DEST` and `torchmask cat NAME`: built-in recipes and configurations to edit or to read."""

from difflib import get_close_matches
from pathlib import Path

from torchmask.cli.catalog import Entry, configs, recipes
from torchmask.config.built_in import built_in_folder
from torchmask.errors import ConfigError


def cat(name: str) -> int:
    """Prints a built-in recipe or configuration.

    Raises:
        ConfigError: C11 if there is none of that name.
    """
    print(_find(name).path.read_text(encoding="utf-8"), end="")
    return 0


def cp(name: str, destination: str, *, no_clobber: bool = False, make_parents: bool = False) -> int:
    """Copies a built-in recipe or configuration.

    In a configuration, `${here:...}` (a file that lies beside it) becomes `${torchmask.configs:...}`, which means the
    same from everywhere.

    Args:
        name: as `torchmask ls` shows it.
        destination: file or folder; the suffix is added if missing.
        no_clobber: keep a file that exists.
        make_parents: make missing folders.

    Raises:
        ConfigError: C11 if there is none of that name, C17 if the destination cannot be written.
    """
    entry = _find(name)
    target = Path(destination).expanduser()
    if target.is_dir():
        target = target / entry.path.name
    elif target.suffix != entry.path.suffix:
        target = target.with_name(target.name + entry.path.suffix)
    if make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.is_dir():
        raise ConfigError("C17", f"there is no folder {str(target.parent)!r}", fix="make it, or add --make-parents")
    if target.exists() and no_clobber:
        print(f"{target} is there already: kept")
        return 0
    text = entry.path.read_text(encoding="utf-8")
    if entry.path.suffix == ".yaml":
        folder = entry.path.parent.relative_to(built_in_folder("configs")).as_posix()
        text = text.replace("${here:", f"${{torchmask.configs:{folder}/")
    target.write_text(text, encoding="utf-8")
    print(f"copied {name} to {target}")
    return 0


def _find(name: str) -> Entry:
    known = {entry.name: entry for entry in [*recipes(), *configs()]}
    bare = name.removesuffix(".py").removesuffix(".yaml")
    if bare in known:
        return known[bare]
    near = get_close_matches(bare, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError("C11", f"there is no recipe or configuration {name!r}", fix=f"{hint}`torchmask ls` shows all")
