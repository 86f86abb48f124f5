"""Files and folders that a configuration names, by a rule that a reader can apply by eye."""

import glob
from pathlib import Path

from torchmask.config.document import Node
from torchmask.errors import ConfigError

FILE_SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".parquet",
    ".txt",
    ".model",
    ".safetensors",
    ".yaml",
    ".yml",
    ".jinja",
)
"""A text value that ends in one of these, or starts with `./`, `../`, `/` or `~`, names a file or folder."""

FOLDER_KEYS = ("folder", "checkpoint_dir")
"""So does any value of these keys, which take nothing else."""

MADE_KEYS = ("output_dir", "log_dir", "cache")
"""Keys that end in one of these name what a run makes."""


def missing_files(node: Node, *, path: str = "", output_dir: str | None = None) -> list[ConfigError]:
    """A problem for each file or folder that is named below `node` and does not exist.

    Not looked at: keys of `MADE_KEYS`, values below `output_dir`, and names on the Hub.
    """
    problems = []
    for parts, child in node.walk():
        key = ".".join([path, *parts] if path else parts)
        value = child.value
        if not isinstance(value, str) or key.endswith((*MADE_KEYS, "_component_")):
            continue
        if output_dir and Path(value).is_relative_to(output_dir):
            continue
        is_folder = key.rsplit(".", 1)[-1] in FOLDER_KEYS
        if (is_folder or _names_a_file(value)) and not _exists(value):
            what = "no file matches" if _is_glob(value) else "there is no file or folder"
            message = f"{what} {str(Path(value).expanduser().absolute())!r}"
            fix = "`torchmask download REPO --output-dir FOLDER` fetches a model" if is_folder else None
            problems.append(ConfigError("C15", message, where=f"{child.place}: {key}", fix=fix))
    return problems


def _names_a_file(value: str) -> bool:
    if "://" in value or any(space in value for space in "\n{}"):
        return False
    if value.startswith(("./", "../", "/", "~/")):
        return True
    return value.lower().endswith(FILE_SUFFIXES) and " " not in value


def _is_glob(value: str) -> bool:
    return any(sign in value for sign in "*?[")


def _exists(value: str) -> bool:
    expanded = str(Path(value).expanduser())
    return Path(expanded).exists() or (_is_glob(value) and bool(glob.glob(expanded, recursive=True)))
