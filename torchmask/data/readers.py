"""Rows of one file, whatever its kind: JSON, JSONL, CSV, Parquet or plain text.

JSON and JSONL are read by our own reader and not by `datasets`: pyarrow reports a malformed line with another cause,
counted from 0 and without the file's name, fills missing columns with None, and takes a string for a list of messages
(datasets 5.2). Line formats are read line by line; a JSON list is decoded element by element from its text, so that
only one row at a time exists as Python objects.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, Literal

from torchmask.data.rows import Row, RowError, excerpt, show_value
from torchmask.errors import DataError, EnvironmentFault

SampleBy = Literal["line", "document"]

KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Extension of a file -> how it is read."""

_BOM = b"\xef\xbb\xbf"
_UTF8_FIX = "save the file as UTF-8"
_MAX_CSV_FIELD = 2**31 - 1  # csv's own limit of 128 KiB is less than one long document


def read_file(path: Path, kind: str, *, name: str, field: str | None, sample_by: SampleBy) -> Iterator[Row]:
    """The rows of one file, unreadable ones with their error.

    Args:
        path: the file.
        kind: a value of `KINDS`.
        name: how messages call the file.
        field: JSON only: the key under which an object holds the list of rows.
        sample_by: text only: a row is a `line` (blank ones are left out) or the whole `document`.

    Raises:
        DataError: the file as a whole cannot be read: D01, D02, D04, D05.
        EnvironmentFault: a library for this kind is missing (D20), or permission.
    """
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        "json": lambda: _read_json(path, name, field),
        "jsonl": lambda: _read_jsonl(path, name),
        "csv": lambda: _read_csv(path, name, ","),
        "tsv": lambda: _read_csv(path, name, "\t"),
        "parquet": lambda: _read_parquet(path, name),
        "text": lambda: _read_text(path, name, sample_by),
    }
    try:
        yield from readers[kind]()
    except PermissionError as error:
        raise EnvironmentFault("K05", "no permission to read it", where=str(path.resolve()), fix="chmod") from error


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line, error in _lines(path, name):
        yield Row(name, number, {}, error) if error else _parse_line(line, name, number)


def _parse_line(line: str, name: str, number: int) -> Row:
    where, label = f"{name}:{number}", f"{number} | "
    try:
        values = json.loads(line)
    except json.JSONDecodeError as e:
        message = f"not valid JSON: {_reason(e)} at column {e.colno}"
        shown = excerpt(line, around=e.colno - 1, label=label)
        return Row(name, number, {}, _malformed(message, where, shown))
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits; brackets nested 10,000 deep
        return Row(name, number, {}, _malformed(f"not readable as JSON: {e}", where, excerpt(line, label=label)))
    if not isinstance(values, dict):
        message = f"a row must be a JSON object {{...}}, found {show_value(values)}"
        return Row(name, number, {}, _malformed(message, where, excerpt(line, label=label)))
    return Row(name, number, values)


def _malformed(message: str, where: str, shown: str) -> RowError:
    return RowError("D01", "malformed", message, where=where, excerpt=shown, fix="mend the line")


def _reason(error: json.JSONDecodeError) -> str:
    text = error.msg.removesuffix(" at").removesuffix(" starting")
    return text[0].lower() + text[1:]


def _lines(path: Path, name: str) -> Iterator[tuple[int, str, RowError | None]]:
    """(line number from 1, text without its end, error) of every line that is not blank."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if not raw.strip():
                continue
            try:
                yield number, raw.decode("utf-8").rstrip("\r\n"), None
            except UnicodeDecodeError as e:
                yield number, "", _not_utf8(raw, e, f"{name}:{number}", f"{number} | ")


def _not_utf8(raw: bytes, error: UnicodeDecodeError, where: str, label: str) -> RowError:
    message = f"not valid UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start} of the line"
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        message += " (the file looks like UTF-16)"
    shown = excerpt(raw.decode("utf-8", "replace").rstrip("\r\n"), around=error.start, label=label)
    return RowError("D02", "invalid_utf8", message, where=where, excerpt=shown, fix=_UTF8_FIX)


def _read_json(path: Path, name: str, field: str | None) -> Iterator[Row]:
    if field is None and _looks_like_lines(path):
        yield from _read_jsonl(path, name)
        return
    text = _whole_text(path, name)
    at = WHITESPACE.match(text, 0).end()
    if at == len(text):
        return
    if text[at] == "[" and field is None:
        yield from _elements(text, at, name)
        return
    document, end = _decode(text, at, name)
    trailing = WHITESPACE.match(text, end).end()
    if trailing != len(text):
        raise _syntax_error(json.JSONDecodeError("Extra data", text, trailing), name)
    if field is not None:
        document = _under(document, field, name)
    elif isinstance(document, dict):
        document = [document]
    else:
        message = f"expected a list of rows or an object, found {show_value(document)}"
        raise DataError("D01", message, where=name, fix="write a list [{...}, {...}] or JSON Lines")
    for number, values in enumerate(document, 1):
        yield _object_row(values, name, number)


def _looks_like_lines(path: Path) -> bool:
    """Whether a `.json` file holds JSON Lines: its first line is an object of its own and another line follows."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"").removeprefix(_BOM)
        if not first.lstrip().startswith(b"{") or not any(line.strip() for line in file):
            return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return first.rstrip().endswith(b"}")  # a damaged first row, not a pretty-printed file


def _elements(text: str, at: int, name: str) -> Iterator[Row]:
    """The elements of the list that begins at `at`, one by one."""
    position, number = WHITESPACE.match(text, at + 1).end(), 0
    while text[position : position + 1] != "]":
        if number:
            if text[position : position + 1] != ",":
                raise _syntax_error(json.JSONDecodeError("Expecting ',' delimiter", text, position), name)
            position = WHITESPACE.match(text, position + 1).end()
        values, position = _decode(text, position, name)
        position = WHITESPACE.match(text, position).end()
        number += 1
        yield _object_row(values, name, number)
    trailing = WHITESPACE.match(text, position + 1).end()
    if trailing != len(text):
        raise _syntax_error(json.JSONDecodeError("Extra data", text, trailing), name)


_raw_decode = json.JSONDecoder().raw_decode


def _decode(text: str, at: int, name: str) -> tuple[Any, int]:
    try:
        return _raw_decode(text, at)
    except json.JSONDecodeError as e:
        raise _syntax_error(e, name) from None
    except (ValueError, RecursionError) as e:
        line = text.count("\n", 0, at) + 1
        raise DataError("D01", f"not readable as JSON: {e}", where=f"{name}:{line}", fix="mend the file") from None


def _syntax_error(error: json.JSONDecodeError, name: str) -> DataError:
    """Nothing after the damage can be trusted in a JSON document, so this one stops whatever `on_bad_row` says."""
    line = error.doc.split("\n", error.lineno)[error.lineno - 1]
    message = f"not valid JSON: {_reason(error)} at column {error.colno}"
    shown = excerpt(line, around=error.colno - 1, label=f"{error.lineno} | ")
    fix = "mend the file, or write it as JSON Lines, where bad rows can be skipped"
    return DataError("D01", message, where=f"{name}:{error.lineno}", excerpt=shown, fix=fix)


def _under(document: Any, field: str, name: str) -> list[Any]:
    keys = list(document) if isinstance(document, Mapping) else []
    if field not in keys:
        found = f"keys found: {', '.join(keys)}" if keys else f"the file holds {show_value(document)}"
        raise DataError("D04", f"no rows under field {field!r}; {found}", where=name, fix="mend or leave out field")
    if not isinstance(document[field], list):
        message = f"field {field!r} holds {show_value(document[field])}, expected a list of rows"
        raise DataError("D08", message, where=name, fix="name the key that holds the list")
    return document[field]


def _object_row(values: Any, name: str, number: int) -> Row:
    if isinstance(values, dict):
        return Row(name, number, values)
    where, message = f"{name}:{number}", f"a row must be a JSON object {{...}}, found {show_value(values)}"
    return Row(name, number, {}, RowError("D01", "malformed", message, where=where, fix="mend the row"))


def _whole_text(path: Path, name: str) -> str:
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        start = raw.rfind(b"\n", 0, e.start) + 1
        line_number, end = raw.count(b"\n", 0, start) + 1, raw.find(b"\n", e.start)
        line = raw[start : end if end >= 0 else None]
        moved = UnicodeDecodeError("utf-8", line, e.start - start, e.end - start, e.reason)
        raise _not_utf8(line, moved, f"{name}:{line_number}", f"{line_number} | ") from None


def _read_csv(path: Path, name: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    broken: list[RowError] = []  # filled by the line source below while the csv reader pulls the lines of a row

    def lines() -> Iterator[str]:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(_BOM) if number == 1 else raw
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError as e:
                    broken.append(_not_utf8(raw, e, f"{name}:{number}", f"{number} | "))
                    yield raw.decode("utf-8", "replace")

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first_line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            fix = "mend the quotes of this row or the one before"
            raise DataError("D01", f"not valid CSV: {e}", where=f"{name}:{first_line}", fix=fix) from None
        if not fields:
            continue
        if header is None:
            header = _csv_header(fields, f"{name}:{first_line}")
        elif broken:
            yield Row(name, first_line, {}, broken[0])
        elif len(fields) != len(header):
            message = f"the row has {len(fields)} fields, the header names {len(header)} columns"
            shown = excerpt(delimiter.join(fields), label=f"{first_line} | ")
            yield Row(name, first_line, {}, _malformed(message, f"{name}:{first_line}", shown))
        else:
            yield Row(name, first_line, dict(zip(header, fields)))
        broken.clear()


def _csv_header(fields: list[str], where: str) -> list[str]:
    twice = sorted({column for column in fields if fields.count(column) > 1})
    if twice:
        raise DataError("D04", f"the header names {twice[0]!r} twice", where=where, fix="rename one of the columns")
    return fields


def _read_parquet(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        fix = "pip install pyarrow"
        raise EnvironmentFault("D20", "reading Parquet needs pyarrow", where=name, fix=fix) from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(name, number, values)
    except (pa.ArrowException, OSError) as error:
        message = f"not readable as Parquet after row {number}: {str(error).splitlines()[0]}"
        raise DataError("D01", message, where=name, fix="fetch or write the file again") from error


def _read_text(path: Path, name: str, sample_by: SampleBy) -> Iterator[Row]:
    if sample_by == "document":
        text = _whole_text(path, name)
        if text.strip():
            yield Row(name, 1, {"text": text})
        return
    for number, line, error in _lines(path, name):
        yield Row(name, number, {} if error else {"text": line}, error)
