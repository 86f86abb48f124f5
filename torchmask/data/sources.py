"""Where rows come from: files, folders, globs, saved `datasets` folders and names on the Hugging Face Hub.

What lies on disk comes first, so that a name can never be looked up on the Hub by accident when the path exists; only
something of the form `name` or `owner/name` is. Local files obey the same `split` text as `datasets` does (`train`,
`train[:100]`, `train[10%:20%]`, parts joined by `+`), so one YAML line means the same for both.
"""

import difflib
import glob
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torchmask.data.hub import DataFiles, hub_rows, is_saved_dataset, saved_dataset_rows
from torchmask.data.readers import KINDS, SampleBy, read_file
from torchmask.data.rows import Row, show_value
from torchmask.data.splits import SplitPart, parse_split, sliced
from torchmask.errors import ConfigError, DataError

_KINDS = ("json", "jsonl", "csv", "tsv", "parquet", "text")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_source(
    source: str | Iterable[Any],
    *,
    data_files: DataFiles | None = None,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    field: str | None = None,
    sample_by: SampleBy = "line",
    streaming: bool = False,
    expand: Callable[[Iterator[Row]], Iterator[Row]] | None = None,
) -> Iterator[Row]:
    """The rows of a source, in a stable order; unreadable ones are handed out with their error (`Row.error`).

    Args:
        source: a file, a folder (searched with its subfolders, in sorted order), a glob, a folder written by
            `save_to_disk`, a Hub name such as `tatsu-lab/alpaca`, or a kind (`json`, `csv`, `parquet`, `text`) whose
            files are named by `data_files`; or any iterable of rows (mappings). Kinds of files: .json (a list, an
            object with the list under `field`, or lines), .jsonl, .csv, .tsv, .parquet, .txt.
        data_files: one or more files, folders or globs, or a mapping of split names to them.
        split: the split's name, with a slice if wanted: `train[:100]`, `train[10%:20%]`, `train[:5]+train[-5:]`. Of a
            folder whose files are named after splits, only those of this split are read; None reads all. A file is
            the split `train`.
        name, revision: Hub only: the data set's configuration; branch, tag or commit.
        field: JSON only, the key under which an object holds the rows.
        sample_by: text only, a row is a `line` or the whole `document`.
        streaming: Hub only: rows are fetched while they are read, nothing is kept on disk.
        expand: local files only: makes rows out of rows (a nested file into its questions) before the slice is taken.

    Raises:
        DataError: nothing there, or no rows in it (D05); a file that cannot be read as its kind (D01, D02).
        ConfigError: a split that does not exist or cannot be read (C06, C09).
        EnvironmentFault: the Hub cannot be reached or refuses (R18).

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = path.write_text('{"text": "one"}\\n\\n{"text": "two"}\\n')
    >>> [(row.number, row.values) for row in open_source(str(path), split="train[-1:]")]
    [(3, {'text': 'two'})]
    """
    if sample_by not in ("line", "document"):
        raise ConfigError("C09", f"sample_by is {sample_by!r}", fix="choose line or document")
    parts = parse_split(split)
    if not isinstance(source, str):
        return sliced(partial(_given_rows, source, expand), parts, [])
    files = find_files(source, data_files=data_files, split=split)
    if files is None:
        return hub_rows(source, name=name, revision=revision, data_files=data_files, split=split, streaming=streaming)
    if is_saved_dataset(Path(source).expanduser()):
        return saved_dataset_rows(Path(source).expanduser(), source, split)
    kinds = [_kind(path, source if _is_kind(source) else None) for path in files]
    return _read_files(files, kinds, parts, expand, field=field, sample_by=sample_by)


def find_files(source: str, *, data_files: DataFiles | None = None, split: str | None = None) -> list[Path] | None:
    """The local files that `open_source` reads, in order; None where the source is a name on the Hub.

    Raises:
        DataError, ConfigError: as `open_source`.
    """
    parts = parse_split(split)
    folder = Path(source).expanduser()
    if _is_kind(source) and data_files is None:
        raise ConfigError("C05", f"source {source!r} needs data_files", fix="name the files: data_files: x.jsonl")
    if folder.is_file() and data_files is not None:
        raise ConfigError("C09", f"source is the file {source}, and data_files is set too", fix="leave one of them out")
    if not _is_kind(source) and is_saved_dataset(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    if _is_kind(source) or folder.exists() or data_files is None:
        base = folder if folder.is_dir() and data_files is not None else Path()
        wanted = source if data_files is None else data_files
        return _local_files(wanted, parts[0].name if parts else None, base, hub_is_meant=data_files is None)
    return None


def _is_kind(source: str) -> bool:
    return source in _KINDS and not Path(source).expanduser().exists()


def _given_rows(rows: Iterable[Any], expand: Callable[[Iterator[Row]], Iterator[Row]] | None) -> Iterator[Row]:
    """Rows that are in memory already, or come from somebody else's iterator."""

    def numbered() -> Iterator[Row]:
        for number, values in enumerate(rows, 1):
            if isinstance(values, Row):
                yield values
            elif isinstance(values, Mapping):
                yield Row("", number, dict(values))
            else:
                message = f"a row must be a mapping of columns, found {show_value(values)}"
                raise DataError("D01", message, where=f"row {number}", fix="hand out dicts")

    return numbered() if expand is None else expand(numbered())


def _local_files(where: DataFiles, split: str | None, base: Path, *, hub_is_meant: bool) -> list[Path] | None:
    """Every file; None where nothing is there and `where` may be meant for the Hub."""
    if isinstance(where, Mapping):
        if split is None or split not in where:
            raise ConfigError(
                "C06", f"data_files has no split {split!r}", fix=f"choose one of {', '.join(map(str, where))}"
            )
        where, split = where[split], None
    patterns = [where] if isinstance(where, str) else list(where)
    files: list[Path] = []
    for pattern in patterns:
        path = base / Path(pattern).expanduser()
        if path.is_dir():
            files += _folder_files(path, split)
            continue
        if path.is_file():
            found = [path]
        elif glob.has_magic(pattern):
            matches = glob.glob(str(Path(pattern).expanduser()), root_dir=base, recursive=True)
            found = sorted(base / match for match in matches if (base / match).is_file())
            if not found:
                raise DataError("D05", "no file matches this glob", where=str(path.absolute()), fix="check the pattern")
        elif hub_is_meant and _can_be_hub_name(pattern):
            return None
        else:
            raise _absent(path)
        if split not in (None, "train"):
            message = f"split {split!r}: {pattern} is a file or glob, which has the one split 'train'"
            raise ConfigError(
                "C06", message, fix=f"set data_files: {{{split}: FILE}}, or name the right file as source"
            )
        files += found
    return files


def _can_be_hub_name(text: str) -> bool:
    """Whether a path that does not exist may name a data set: `owner/name`, unless a folder `owner` is here."""
    if _HUB_NAME.fullmatch(text) is None or Path(text).suffix in KINDS or text.startswith("."):
        return False
    return "/" not in text or not Path(text).parent.is_dir()


def _absent(path: Path) -> DataError:
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.iterdir()), n=3)
    fix = f"near names there: {', '.join(near)}" if near else "check the path"
    return DataError("D05", "no such file or folder", where=str(path.absolute()), fix=fix)


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder; where their names tell splits, those of `split` only."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in KINDS and p.is_file() and not _is_hidden(p, folder))
    if not files:
        message = f"no data file in this folder (looked for {', '.join(sorted(KINDS))})"
        raise DataError("D05", message, where=str(folder.absolute()), fix="check the path, or name a glob")
    told = {path: _told_split(path.relative_to(folder)) for path in files}
    names = sorted({name for name in told.values() if name})
    if split is not None and names:
        wanted = next((name for name, words in _SPLIT_WORDS.items() if split in words), split)
        files = [path for path in files if told[path] == wanted]
        if not files:
            message = f"no file of {folder} belongs to split {split!r}"
            raise ConfigError("C06", message, fix=f"splits told by the file names: {', '.join(names)}")
    elif split not in (None, "train"):
        message = f"no file of {folder} is named after split {split!r}"
        raise ConfigError("C06", message, fix="set data_files: {" + f"{split}: FILE" + "}")
    kinds = sorted({path.suffix for path in files})
    if len({KINDS[suffix].removesuffix("l") for suffix in kinds}) > 1:
        message = f"the folder mixes {' and '.join(kinds)} files"
        raise DataError("D04", message, where=str(folder.absolute()), fix=f"choose by a glob: {folder}/**/*{kinds[0]}")
    return files


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _told_split(path: Path) -> str | None:
    """The split that a file's path names as a word of its own: `data/train-00000-of-00002.parquet` -> train."""
    words = set(re.split(r"[^a-z]+", path.as_posix().removesuffix(path.suffix).lower()))
    return next((name for name, known in _SPLIT_WORDS.items() if words & set(known)), None)


def _kind(path: Path, forced: str | None) -> str:
    """How a file is read; a kind given by the user covers its line or tab variant."""
    own = KINDS.get(path.suffix)
    if forced is not None:
        return own if own and (forced, own) in (("json", "jsonl"), ("csv", "tsv")) else forced
    if own is None:
        fix = f"known are {', '.join(sorted(KINDS))}; or say the kind: source: json, data_files: {path.name}"
        raise DataError("D04", f"unknown kind of file {path.suffix!r}", where=str(path.absolute()), fix=fix)
    return own


def _read_files(
    files: list[Path],
    kinds: list[str],
    parts: list[SplitPart],
    expand: Callable[[Iterator[Row]], Iterator[Row]] | None,
    *,
    field: str | None,
    sample_by: SampleBy,
) -> Iterator[Row]:
    def raw_rows() -> Iterator[Row]:
        for path, kind in zip(files, kinds):
            yield from read_file(path, kind, name=str(path), field=field, sample_by=sample_by)

    return sliced(raw_rows if expand is None else lambda: expand(raw_rows()), parts, files)
