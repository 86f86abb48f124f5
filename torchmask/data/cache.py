"""Tokenised data that is made once: a folder of mapped columns for each key, shared by ranks and runs.

A key stands for everything that determines the data (see `fingerprints`), so nothing in the cache is ever out of date,
only unused. One process builds an entry while it holds a lock of the operating system, which a process that dies gives
back; the others wait for it and say so. An entry gets its name when all of it is on the disk. What cannot be opened is
built again, with a message: the cache may cost time but never an answer.
"""

import functools
import inspect
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchmask.data.build_lock import build_lock, failure_since, leave_failure
from torchmask.data.eos import EosPolicy
from torchmask.data.fingerprints import file_facts, key_of, plain, version_facts
from torchmask.data.hub import hub_identity
from torchmask.data.mapped import (
    Arrays,
    Damaged,
    believe,
    is_believed,
    open_mapped,
    read_facts,
    sync_folder,
    verify,
    write_mapped,
)
from torchmask.data.sample import Samples
from torchmask.data.sources import find_files
from torchmask.errors import ConfigError, EnvironmentFault, StopRequested, TorchmaskError

WAIT_SECONDS = 2 * 60 * 60
"""How long a process waits for another one that builds what it needs."""

_log = logging.getLogger("torchmask.cache")
_COLUMNS = ("tokens", "mask", "weights", "rules", "offsets", "stops", "source_rows", "source_ids", "unmatched")
_NOT_OF_THE_DATA = ("cache", "num_workers", "source", "data_files", "split", "name", "streaming")
_checks_every_byte: ContextVar[bool] = ContextVar("checks_every_byte", default=False)


def cache_root(cache: bool | str | os.PathLike[str] = True) -> Path:
    """The folder that holds the cache: the one given, else $TORCHMASK_CACHE, else the user's cache folder."""
    if not isinstance(cache, bool):
        return Path(cache).expanduser()
    if own := os.environ.get("TORCHMASK_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torchmask"


def cached(builder: Callable[..., Samples]) -> Callable[..., Samples]:
    """A data set builder that keeps what it makes, where its argument `cache` says so.

    `cache` is False, True = the usual folder, or a folder. With it the result is mapped from the disk: opening a
    million documents reads one small file, and all processes of a machine share the memory.
    """

    @functools.wraps(builder)
    def build(tokenizer: Any, **arguments: Any) -> Samples:
        cache = arguments.get("cache", False)
        if cache is False or cache is None:
            return builder(tokenizer, **arguments)
        root = cache_root(cache)
        bound = inspect.signature(builder).bind(tokenizer, **arguments)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "tokenizer"}
        facts = samples_facts(tokenizer, builder.__name__, given, root=root)
        return cached_samples(lambda: builder(tokenizer, **arguments), facts, root=root)

    return build


def samples_facts(tokenizer: Any, builder: str, arguments: Mapping[str, Any], *, root: Path) -> dict[str, Any]:
    """Everything that determines the samples that a builder makes.

    Raises:
        ConfigError: C09, an argument, source or tokenizer of which cannot be told whether it changed.
    """
    source, split, data_files = (arguments.get(key) for key in ("source", "split", "data_files"))
    if arguments.get("streaming"):
        raise ConfigError("C09", "cache and streaming exclude each other", fix="set cache: false or streaming: false")
    if not isinstance(source, str):
        raise ConfigError("C09", "cache needs a source by name, and got rows", fix="set cache: false, or name a file")
    if not hasattr(tokenizer, "identity"):
        kind = type(tokenizer).__name__
        raise ConfigError("C09", f"cache needs a tokenizer that knows its files, got {kind}", fix="set cache: false")
    files = find_files(source, data_files=data_files, split=split)
    if files is None:
        rows: Any = hub_identity(source, name=arguments.get("name"), data_files=data_files, split=split)
    else:
        rows = file_facts(files, root)
    identity = dict(tokenizer.identity())
    identity["files"] = [
        {"name": Path(f["name"]).name, "sha256": f["sha256"]} for f in file_facts(identity.pop("files"), root)
    ]
    options = {k: plain(v, k) for k, v in arguments.items() if k not in _NOT_OF_THE_DATA}
    return {
        "kind": "samples",
        "builder": builder,
        "source": source,
        "split": split,
        "rows": rows,
        "tokenizer": identity,
        "options": options,
        **version_facts(),
    }


def cached_samples(build: Callable[[], Samples], facts: Mapping[str, Any], *, root: Path) -> Samples:
    """The samples that belong to `facts`, mapped from the cache; built and kept there if they are not in it yet."""

    def to_arrays() -> tuple[Arrays, dict[str, Any]]:
        samples = build()
        columns = {name: getattr(samples, name) for name in _COLUMNS}
        return {k: v for k, v in columns.items() if v is not None}, _header_of(samples)

    entry = cached_arrays(to_arrays, facts, root=root)
    return _as_samples(entry)


def _header_of(samples: Samples) -> dict[str, Any]:
    return {
        "sources": list(samples.sources),
        "report": samples.report,
        "rule_names": list(samples.rule_names),
        "eos": asdict(samples.eos),
        "fingerprint": samples.fingerprint,
        "largest_token": samples.largest_token,
        "documents": len(samples),
        "tokens": len(samples.tokens),
    }


def _as_samples(entry: "Entry") -> Samples:
    header, arrays = entry.header, entry.arrays
    samples = Samples(
        **{name: arrays.get(name) for name in _COLUMNS},  # type: ignore[arg-type]
        sources=tuple(header["sources"]),
        report=header["report"],
        rule_names=tuple(header["rule_names"]),
        eos=EosPolicy(**header["eos"]),
        home=entry.folder,
    )
    # Both would read every token.
    samples.__dict__.update(fingerprint=header["fingerprint"], largest_token=header["largest_token"])
    return samples


@dataclass(frozen=True)
class Entry:
    """One entry of the cache: its folder, its mapped columns and what was said of them."""

    folder: Path
    arrays: Arrays
    header: dict[str, Any]


def cached_arrays(
    build: Callable[[], tuple[Arrays, dict[str, Any]]],
    facts: Mapping[str, Any],
    *,
    root: Path,
    wait_seconds: float = WAIT_SECONDS,
) -> Entry:
    """The entry of `facts`, opened; built by exactly one process if it is missing or damaged.

    Args:
        build: makes the columns and a header for JSON.
        facts: what determines them.
        root: the cache's folder.
        wait_seconds: how long to wait for another process that builds the entry.

    Raises:
        TorchmaskError: whatever `build` raises, in the processes that waited for it too.
        EnvironmentFault: K05, K02 the folder cannot be written; R10 the other process takes too long.
    """
    key = key_of(facts)
    folder = root / "data" / key
    found = _open(folder, say=False)
    if found is not None:
        return found
    _make_folder(folder.parent)
    with build_lock(folder, wait_seconds) as since:
        found = _open(folder, say=True)
        if found is not None:
            return found
        note = folder.with_name(f"{key}.failed")
        failure = failure_since(note, since)
        if failure is not None:
            raise failure
        note.unlink(missing_ok=True)
        try:
            arrays, header = build()
        except StopRequested:  # this process was asked to, and those that wait were not
            raise
        except TorchmaskError as error:
            leave_failure(note, error)
            raise
        _write(folder, arrays, {"key": key, "facts": dict(facts), "header": header, "made": time.time()})
        found = _open(folder, say=True)
        assert found is not None, f"{folder} was written and cannot be opened"
        return found


def _open(folder: Path, *, say: bool) -> Entry | None:
    """The entry, if there is a whole one."""
    if not folder.is_dir():
        return None
    try:
        arrays, facts = open_mapped(folder)
        header = facts["header"]
        if _checks_every_byte.get() or not is_believed(folder):
            verify(folder)
            believe(folder)
    except (Damaged, KeyError) as error:
        if say:
            _log.warning("cache entry %s is damaged (%s): it is built again", folder, error)
        return None
    return Entry(folder, arrays, header)


@contextmanager
def every_byte_checked() -> Iterator[None]:
    """Within it, entries are read and compared with their checksums whenever they are opened."""
    token = _checks_every_byte.set(True)
    try:
        yield
    finally:
        _checks_every_byte.reset(token)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the cache's folder cannot be made: {error.strerror}"
        fix = "set TORCHMASK_CACHE to a folder you may write to, or cache: false"
        raise EnvironmentFault("K05", message, where=str(folder), fix=fix) from error


def _write(folder: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """Puts an entry in place, all of it or nothing."""
    for stale in folder.parent.glob(f".tmp-{folder.name}-*"):  # of a builder that died: the lock is ours
        shutil.rmtree(stale, ignore_errors=True)
    partial = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        partial.mkdir()
        write_mapped(partial, arrays, facts)
        if folder.exists():  # the damaged one
            aside = folder.with_name(f".tmp-{folder.name}-damaged")
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(array.nbytes for array in arrays.values()) / 2**30
        free = shutil.disk_usage(folder.parent).free / 2**30
        message = (
            f"the cache cannot be written: {error.strerror or error} (needs {needed:.2f} GiB, {free:.2f} GiB free)"
        )
        fix = "make room (`torchmask data rm`), set TORCHMASK_CACHE to another disk, or cache: false"
        raise EnvironmentFault("K02", message, where=str(folder), fix=fix) from error
    except BaseException:  # a stop that was asked for
        shutil.rmtree(partial, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Listed:
    """What `torchmask data ls` shows of an entry; `problem` says what is wrong with a damaged one."""

    key: str
    folder: Path
    num_bytes: int
    made: float
    facts: dict[str, Any]
    header: dict[str, Any]
    problem: str | None = None


def list_entries(root: Path) -> list[Listed]:
    """Every entry of a cache, the newest first."""
    found = []
    for folder in sorted((root / "data").glob("*")):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        try:
            known = read_facts(folder)
            entry = Listed(folder.name, folder, size, known["made"], known["facts"], known["header"])
        except (Damaged, KeyError) as error:
            entry = Listed(folder.name, folder, size, folder.stat().st_mtime, {}, {}, str(error))
        found.append(entry)
    return sorted(found, key=lambda entry: -entry.made)


def remove_entry(folder: Path) -> None:
    """Deletes an entry; processes that have it mapped keep what they see. Its lock stays: somebody may hold it."""
    aside = folder.with_name(f".tmp-{folder.name}-removed")
    folder.rename(aside)
    shutil.rmtree(aside)
    folder.with_name(f"{folder.name}.failed").unlink(missing_ok=True)
