"""A folder of flat arrays and one header: written once and whole, opened by reading the header only.

Raw little-endian columns with a JSON header, and not `.npz` or pickle: a column can be mapped into memory and shared by
all processes of a machine, nothing in the folder can run code, and a damaged folder is told from its sizes and
checksums. The header carries its own checksum, and one of every column that `verify` compares. `open_mapped` reads no
column: a folder too large to be read at every start counts as whole while the file system says that nobody has touched
its files since they were last found whole (`is_believed`), as git believes its index. Columns of numbers that are all
alike or follow each other evenly are two numbers in the header.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = "header.json"
FORMAT = 1
SMALL = 128 * 2**20
"""Bytes up to which a folder is read whenever it is opened, about 30 ms."""
_CHECKED = "checked.json"
_UNSURE_NS = 2_000_000_000  # coarser than the time stamps of any file system in use

Arrays = dict[str, npt.NDArray[Any]]


class Damaged(Exception):
    """The folder is not what was written; the message says in what way."""


def write_mapped(folder: Path, arrays: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Writes the arrays into an existing, empty folder; everything is on the disk when this returns.

    Args:
        folder: where; the caller gives it its final name afterwards.
        arrays: one-dimensional columns by name (letters and underscores).
        facts: anything for JSON, handed back by `open_mapped`.

    Raises:
        OSError: the disk is full, or permission.
    """
    columns = {}
    for name, array in arrays.items():
        assert array.ndim == 1 and name.isidentifier(), name
        flat = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        step = _step(flat)
        if step is not None:
            columns[name] = {"dtype": flat.dtype.str, "length": len(flat), "first": flat[0].item(), "step": step}
            continue
        view = _bytes(flat)
        with open(folder / f"{name}.bin", "wb") as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
        columns[name] = {"dtype": flat.dtype.str, "length": len(flat), "crc32": zlib.crc32(view)}
    body = json.dumps({"columns": columns, "facts": dict(facts)}, ensure_ascii=False)
    header = {"format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}
    with open(folder / HEADER, "w", encoding="utf-8") as file:
        json.dump(header, file)
        file.flush()
        os.fsync(file.fileno())
    _keep_stamps(folder, _stamps(folder))
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Puts a folder's list of names on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a folder, its columns unread.

    Raises:
        Damaged: as `open_mapped`, of the header alone.
    """
    return _read_header(folder)[1]


def open_mapped(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays, mapped into memory and read-only, and the facts.

    Raises:
        Damaged: the header or a column is missing or was changed, or a column is not as long as the header says.
    """
    columns, facts = _read_header(folder)
    arrays: Arrays = {}
    for name, column in columns.items():
        path, dtype, length = folder / f"{name}.bin", np.dtype(column["dtype"]), column["length"]
        if "step" in column:
            arrays[name] = _progression(column["first"], column["step"], length, dtype)
            continue
        try:
            size = path.stat().st_size
            if size != length * dtype.itemsize:
                raise Damaged(f"{path.name} has {size} bytes, its header says {length * dtype.itemsize}")
            mapped = np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)
        except OSError as error:
            raise Damaged(f"{path.name} cannot be read: {error.strerror or error}") from None
        arrays[name] = mapped.view(np.ndarray)  # a plain array, whose slices cost half of a memmap's
    return arrays, facts


def verify(folder: Path) -> None:
    """Reads every column.

    Raises:
        Damaged: as `open_mapped`, or a column's bytes are not those that were written.
    """
    columns, _ = _read_header(folder)
    arrays, _ = open_mapped(folder)
    for name, array in arrays.items():
        if "step" not in columns[name] and zlib.crc32(_bytes(array)) != columns[name]["crc32"]:
            raise Damaged(f"{name}.bin does not hold what was written")


def is_believed(folder: Path) -> bool:
    """Whether the columns need not be read to be believed whole: they are large, and were, and are untouched since.

    What no file system tells, a disk or memory that changes bytes by itself, is found by `verify` alone.
    """
    try:
        stamps = _stamps(folder)
        known = json.loads((folder / _CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return _is_large(stamps) and bool(known == stamps)


def believe(folder: Path) -> None:
    """Writes down that the columns were found whole, where they lie in a folder that this process may write to.

    A file that was changed just now might be changed again within one tick of its time stamp, so nothing is said of it.
    """
    with suppress(OSError):
        stamps = _stamps(folder)
        newest = max((max(times) for _, *times, _ in stamps.values()), default=0)
        if _is_large(stamps) and newest < time.time_ns() - _UNSURE_NS:
            _keep_stamps(folder, stamps)


def _is_large(stamps: Mapping[str, list[int]]) -> bool:
    return sum(size for size, *_ in stamps.values()) > SMALL


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size, times of change and inode of every column's file."""
    found = {path.name: path.stat() for path in sorted(folder.glob("*.bin"))}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in found.items()}


def _keep_stamps(folder: Path, stamps: Mapping[str, list[int]]) -> None:
    partial = folder / f".{_CHECKED}.{os.getpid()}"
    partial.write_text(json.dumps(stamps), encoding="utf-8")
    partial.replace(folder / _CHECKED)


def _step(array: npt.NDArray[Any]) -> int | None:
    """The step of integers or bools that are all alike or follow each other evenly, which need no file; else None."""
    if len(array) < 2 or array.dtype.kind not in "iub":
        return None
    step = int(array[1]) - int(array[0])
    if int(array[-1]) - int(array[0]) != step * (len(array) - 1):  # nearly always, and then nothing more is read
        return None
    return step if (_progression(array[0].item(), step, len(array), array.dtype) == array).all() else None


def _progression(first: int, step: int, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    values = np.full(length, first, dtype) if step == 0 else np.arange(first, first + step * length, step).astype(dtype)
    values.flags.writeable = False
    return values


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.view(np.uint8).data if len(array) else memoryview(b"")


def _read_header(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise Damaged(f"{HEADER} is of format {header['format']}, this torchmask writes {FORMAT}")
        body = header["body"]
        if hashlib.sha256(body.encode()).hexdigest() != header["sha256"]:
            raise Damaged(f"{HEADER} does not match its own checksum")
        content = json.loads(body)
        return content["columns"], content["facts"]
    except OSError as error:
        raise Damaged(f"{HEADER} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{HEADER} is not a header ({type(error).__name__})") from None
