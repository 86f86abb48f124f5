"""Rows from the `datasets` library: names on the Hugging Face Hub and folders written by `save_to_disk`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmask.data.rows import Row
from torchmask.data.splits import parse_split, sliced
from torchmask.errors import ConfigError, DataError, EnvironmentFault

DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_dataset_rows(folder: Path, shown: str, split: str | None) -> Iterator[Row]:
    """Rows of a folder that `datasets`' `save_to_disk` wrote."""
    datasets = _import_datasets()
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # a foreign library's reader: whatever it says, the folder is named
        message = f"not readable as a saved dataset: {_first_line(error)}"
        raise DataError("D01", message, where=str(folder.absolute()), fix="write it again with save_to_disk") from error
    parts = parse_split(split)
    if isinstance(saved, datasets.DatasetDict):
        wanted = parts[0].name if parts else "train"
        if wanted not in saved:
            raise ConfigError("C06", f"{shown} has no split {wanted!r}", fix=f"choose one of {', '.join(saved)}")
        saved = saved[wanted]
    return sliced(lambda: _numbered(saved, shown), parts, [folder])


def _numbered(rows: Any, shown: str) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        yield Row(shown, number, dict(values))


def hub_rows(
    source: str,
    *,
    name: str | None,
    revision: str | None,
    data_files: DataFiles | None,
    split: str | None,
    streaming: bool,
) -> Iterator[Row]:
    """Rows of a data set on the Hugging Face Hub, or of its cached copy."""
    datasets = _import_datasets()
    wanted = split or "train"
    files = dict(data_files) if isinstance(data_files, Mapping) else data_files
    try:
        data = datasets.load_dataset(
            source, name=name, revision=revision, data_files=files, split=wanted, streaming=streaming
        )
    except Exception as error:  # the Hub's client raises a dozen kinds; each gets one cure
        raise _hub_error(error, source) from error

    def rows() -> Iterator[Row]:
        handed_out = 0
        try:
            for row in _numbered(data, f"{source}[{wanted}]"):
                handed_out += 1
                yield row
        except (OSError, RuntimeError) as error:  # a stream whose connection broke
            raise _hub_error(error, source) from error
        if handed_out == 0:
            raise DataError("D05", f"split {wanted!r} has zero rows", where=source, fix="choose another split or slice")

    return rows()


def hub_identity(source: str, *, name: str | None, data_files: DataFiles | None, split: str | None) -> dict[str, Any]:
    """What determines the rows of a data set on the Hub: its name and what `datasets` says of the copy that it has."""
    datasets = _import_datasets()
    files = dict(data_files) if isinstance(data_files, Mapping) else data_files
    try:
        data = datasets.load_dataset(source, name=name, data_files=files, split=split or "train")
    except Exception as error:  # as in `hub_rows`
        raise _hub_error(error, source) from error
    return {"hub": source, "fingerprint": data._fingerprint, "rows": len(data), "library": datasets.__version__}


def _hub_error(error: Exception, source: str) -> Exception:
    kind, text = type(error).__name__, _first_line(error)
    if isinstance(error, ValueError) and not isinstance(error, EnvironmentFault):
        return ConfigError("C06", f"data set {source!r}: {text}", fix="set split and name to what it has")
    local = f"there is no local file or folder {Path(source).absolute()}"
    if "NotFound" in kind:
        message, fix = f"data set {source!r} is not on the Hub ({text}); {local}", "check the name or the path"
    elif "Gated" in kind or "401" in text or "403" in text:
        message = f"the Hub refuses data set {source!r}: {text}"
        fix = f"accept its terms on https://huggingface.co/datasets/{source}, then hf auth login"
    else:
        message = f"data set {source!r} cannot be fetched ({kind}: {text}) and is not in the cache; {local}"
        fix = "go online once, or fetch it elsewhere and name the local files as source"
    return EnvironmentFault("R18", message, fix=fix)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        fix = "pip install datasets"
        raise EnvironmentFault("D20", "Hub names and saved datasets need the datasets library", fix=fix) from error
    return datasets
