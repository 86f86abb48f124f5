"""The recipes and configurations that come with torchmask, found by looking; there is no registry to keep."""

import re
from dataclasses import dataclass
from pathlib import Path

from torchmask.config.built_in import built_in_folder
from torchmask.errors import ConfigError

_DOCSTRING = re.compile(r'\A(?:\s*#[^\n]*\n)*\s*[rR]?"""\s*(.*?)\s*(?:\n|""")', re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A built-in recipe or configuration.

    Args:
        name: as typed: `finetune`, `tiny/qa`.
        path: its file.
        summary: its first line, for `torchmask ls`.
        recipe: for a configuration, the recipe it belongs to: its first line is `# RECIPE: summary`.
    """

    name: str
    path: Path
    summary: str
    recipe: str | None = None


def recipes() -> list[Entry]:
    """The built-in recipes by name."""
    paths = sorted(path for path in built_in_folder("recipes").glob("*.py") if not path.name.startswith("_"))
    return [Entry(path.stem, path, _first_line(path, _DOCSTRING)) for path in paths]


def configs() -> list[Entry]:
    """The built-in configurations by name."""
    folder = built_in_folder("configs")
    known = {entry.name for entry in recipes()}
    entries = []
    for path in sorted(folder.rglob("*.yaml")):
        recipe, summary = _split_first_line(_first_line(path), known)
        entries.append(Entry(path.relative_to(folder).with_suffix("").as_posix(), path, summary, recipe))
    return entries


def find_recipe(name: str) -> Path:
    """The file of a built-in recipe or of the user's copy.

    Raises:
        ConfigError: C11 with near names, or with today's name for one of torchtune's recipes.
    """
    if name.endswith(".py") or "/" in name:
        return _existing(name, "recipe")
    known = {entry.name: entry.path for entry in recipes()}
    if name in known:
        return known[name]
    from torchmask.cli.torchtune_names import torchtune_answer

    answer = torchtune_answer(name, list(known))
    if answer is not None:
        raise ConfigError("C11", f"there is no recipe {name!r} here: that is torchtune's name", fix=answer)
    raise _not_found("recipe", name, list(known))


def find_config(name: str) -> Path:
    """The file of a built-in configuration or of the user's own.

    Raises:
        ConfigError: C11 with near names.
    """
    if name.endswith((".yaml", ".yml")):
        return _existing(name, "configuration")
    known = {entry.name: entry.path for entry in configs()}
    if name not in known:
        raise _not_found("configuration", name, list(known))
    return known[name]


def recipe_of(config: Path) -> str:
    """The recipe that a configuration's first line names (`# finetune: ...`), else `finetune`."""
    named, _ = _split_first_line(_first_line(config), {entry.name for entry in recipes()})
    return named or "finetune"


def _existing(name: str, kind: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    fix = "`torchmask ls` shows the built-in ones, `torchmask cp NAME DEST` copies one"
    raise ConfigError("C11", f"there is no {kind} file {str(path.absolute())!r}", fix=fix)


def _not_found(kind: str, name: str, known: list[str]) -> ConfigError:
    from difflib import get_close_matches

    lowered = {entry.lower(): entry for entry in known}
    near = [lowered[match] for match in get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
    listed = f"did you mean {' or '.join(near)}? " if near else f"known are {', '.join(known) or 'none'}; "
    suffix = ".py" if kind == "recipe" else ".yaml"
    return ConfigError(
        "C11",
        f"there is no {kind} {name!r}",
        fix=f"{listed}`torchmask ls` shows all; a file of your own ends in {suffix}",
    )


def _split_first_line(line: str, known: set[str]) -> tuple[str | None, str]:
    """The recipe and the summary of `# RECIPE: summary`, given the names of the recipes."""
    named, colon, summary = line.partition(":")
    if colon and named.strip() in known:
        return named.strip(), summary.strip()
    return None, line


def _first_line(path: Path, pattern: re.Pattern[str] | None = None) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(2000)
    if pattern is not None:
        match = pattern.match(head)
        return match[1] if match else ""
    line = head.partition("\n")[0]
    return line.lstrip("# ").strip() if line.startswith("#") else ""
