"""Everything that determines a data set, as facts for JSON, and the one key that stands for them.

Files count by their contents. A file of a gigabyte is not read again at every start, though: its hash is kept beside
what the file system says of it (size, times of change, inode) and believed while that stays the same, as git does. A
time of change too close to the moment of hashing proves nothing and is not believed.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torchmask
from torchmask.errors import ConfigError

_UNSURE_NS = 2_000_000_000  # coarser than the time stamps of any file system in use


def key_of(facts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that differ when any of the facts does.

    >>> key_of({"a": 1}) == key_of({"a": 1}), key_of({"a": 1}) == key_of({"a": 2})
    (True, False)
    """
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


def plain(value: Any, name: str) -> Any:
    """An argument of a builder as a value for JSON.

    Raises:
        ConfigError: C09, a function or other object, of which nobody can tell whether it changed.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{name}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ConfigError(
        "C09",
        f"cache is on, and {name} is a {type(value).__name__}, of which cannot be told whether it changed",
        fix="give plain values (filter_fn can be a mapping), or set cache: false",
    )


@cache
def version_facts() -> dict[str, str]:
    """What makes samples besides data and options: this package's version and the code that turns rows into tokens."""
    digest = hashlib.sha256()
    package = Path(torchmask.__file__).parent
    for path in sorted([*package.glob("data/*.py"), *package.glob("tokenizers/**/*.py"), package / "messages.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"torchmask": torchmask.__version__, "code": digest.hexdigest()[:16]}


def file_facts(paths: Iterable[Path], root: Path) -> list[dict[str, Any]]:
    """Name, size and content hash of each file.

    Args:
        paths: the files.
        root: the cache's folder, in which known hashes are kept.
    """
    return [{"name": str(p), "bytes": p.stat().st_size, "sha256": _hash_of(p, root)} for p in paths]


def _hash_of(path: Path, root: Path) -> str:
    about = path.resolve()
    record = root / "hashes" / (hashlib.sha256(str(about).encode()).hexdigest()[:32] + ".json")
    seen = _stamp(about)
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["stamp"] == seen and isinstance(known["sha256"], str):
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    started = time.time_ns()
    with open(about, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(about) == seen and max(seen["mtime_ns"], seen["ctime_ns"]) < started - _UNSURE_NS:
        _keep(record, {"path": str(about), "stamp": seen, "sha256": sha256})
    return sha256


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}


def _keep(record: Path, known: Mapping[str, Any]) -> None:
    """Writes a hash down, so that no reader sees half of it; a full disk only costs hashing again."""
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(record)
