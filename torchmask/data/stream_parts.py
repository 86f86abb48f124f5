"""The sources of a stream: each is opened when its first row is wanted, read row by row and never kept.

A builder with its arguments, as YAML or `functools.partial` has them, says two things: where its rows are and what
becomes of them. `stream_part` takes the two apart, so that the rows of a window can be handed to the same builder.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torchmask.data.columns import MAX_PLACES
from torchmask.data.rows import Filter, Row, keep_rows, show_value
from torchmask.data.sample import Samples
from torchmask.data.sources import find_files, open_source
from torchmask.data.stream_options import refuse_whole
from torchmask.errors import ConfigError, DataError

RowSource = Iterable[Any] | Callable[[], Iterable[Any]]

_OPENS = ("data_files", "split", "name", "revision", "field", "sample_by")  # arguments that say which rows


@dataclass(frozen=True)
class StreamPart:
    """One source of a stream.

    Attributes:
        builder: rows -> samples, called as `builder(source=rows)`: a data set builder with its tokenizer and options,
            `partial(alpaca_dataset, tokenizer)`.
        rows: an iterable of mappings or `Row`s that begins anew each time it is iterated (a list, a data set of the Hub
            opened with streaming=True), or a function that opens one: `lambda: open_source("big.jsonl")`.
        weight: share of the rows of each window that pass its `filter_fn`, relative to the other parts.
        files: (name, bytes) of each file that the rows come from, by which a resumed run knows them again.
        name: what people call it.
    """

    builder: Callable[..., Samples]
    rows: RowSource
    weight: float = 1.0
    files: tuple[tuple[str, int], ...] = ()
    name: str = ""


def stream_part(builder: "partial[Samples]", *, weight: float = 1.0) -> StreamPart:
    """The part of a stream that a data set builder with its arguments describes.

    Its source is looked for now and opened when rows are wanted: line formats line by line, Parquet by row groups, a
    data set of the Hub with `streaming=True`. A `.json` list or object, and a text with `sample_by: document`, are read
    whole, file by file.

    Args:
        builder: `partial(alpaca_dataset, tokenizer, source="web/*.jsonl")`; `torchmask.config.prepare` makes one out of
            a component.
        weight: share of the rows of each window that pass its `filter_fn`, relative to the other parts.

    Raises:
        ConfigError: C09, it does not read a `source`, or has arguments that need all rows at once (`cache`,
            `max_rows`); C13, the weight.
        DataError: D05, there is no such file.
    """
    if isinstance(weight, bool) or not 0 < weight < float("inf"):
        raise ConfigError("C13", f"weight is {weight!r}", fix="give a number above 0")
    called = getattr(builder.func, "__name__", repr(builder.func))
    parameters = inspect.signature(builder.func).parameters
    if "source" not in parameters:
        fix = "name a builder with a source; a mixture's data sets become parts with weights"
        raise ConfigError("C09", f"{called} reads no source, so a stream cannot hand it its rows", fix=fix)
    refuse_whole(builder.keywords, called, where=None)
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    given = {**defaults, **builder.keywords}
    source = given.get("source")
    if source is None:
        raise ConfigError("C05", f"{called} needs a source", fix="source: FILE, FOLDER, GLOB or a name on the Hub")
    own = {key: value for key, value in builder.keywords.items() if key not in (*_OPENS, "source", "streaming")}
    opens = {key: given[key] for key in _OPENS if key in given}
    if not isinstance(source, str):
        return StreamPart(partial(builder.func, *builder.args, **own), source, weight, name=called)
    from torchmask.data.squad import expand_squad

    expand = expand_squad if called == "squad_dataset" else None
    rows = partial(open_source, source, streaming=True, expand=expand, **opens)
    files = find_files(source, data_files=opens.get("data_files"), split=opens.get("split"))
    if files is None:
        known: tuple[tuple[str, int], ...] = (("hub:" + ":".join(str(v) for v in (source, *opens.values())), 0),)
    else:
        known = tuple((path.name, path.stat().st_size) for path in files)
    shown = source if files is None or len(files) != 1 else Path(files[0]).name
    return StreamPart(partial(builder.func, *builder.args, **own), rows, weight, known, shown)


def without_filter(builder: Callable[..., Samples]) -> tuple[Callable[..., Samples], Filter | None]:
    """A builder that gets filtered rows, and the filter. A stream counts rows by it, so it comes before the builder."""
    if not isinstance(builder, partial) or builder.keywords.get("filter_fn") is None:
        return builder, None
    own = {key: value for key, value in builder.keywords.items() if key != "filter_fn"}
    return partial(builder.func, *builder.args, **own), builder.keywords["filter_fn"]


class Reader:
    """The rows of one source that pass its filter, how many were taken, and how often it came to its end.

    Args:
        source: as `StreamPart.rows`; opened by the first call that wants a row.
        repeats: begin again at its end.
        filter_fn: see `keep_rows`; the rows that it leaves out are not counted as taken.

    Attributes:
        left_out: `{"count", "places"}` of the rows that the filter left out in the last `take`.
        is_done: no more rows come: the source has ended, or a whole pass over it gave none.
    """

    def __init__(self, source: RowSource, repeats: bool, filter_fn: Filter | None = None) -> None:
        self._source, self._repeats, self._filter = source, repeats, filter_fn
        self.left_out: dict[str, Any] = {"count": 0, "places": []}
        self._rows: Iterator[Row] | None = None
        self._given = 0  # in this pass
        self._size: int | None = None  # of a whole pass, once there was one
        self.taken = self.passes = 0
        self.is_done = False

    def take(self, count: int) -> list[Row]:
        """The next rows, fewer where the source ends; with `repeats` it begins again."""
        result: list[Row] = []
        self.left_out = {"count": 0, "places": []}
        while len(result) < count and not self.is_done:
            new = list(islice(self._open(), count - len(result)))
            self._advance(len(new), is_end=len(result) + len(new) < count)
            result += new
        return result

    def skip(self, count: int) -> None:
        """Leaves out rows without keeping any; whole passes over a source of known size are not read at all."""
        while count > 0 and not self.is_done:
            if self._size:
                self.taken += count // self._size * self._size
                count %= self._size
            passed = sum(1 for _ in islice(self._open(), count))
            self._advance(passed, is_end=passed < count)
            count -= passed

    def _leave_out(self, row: Row) -> None:
        self.left_out["count"] += 1
        if len(self.left_out["places"]) < MAX_PLACES:
            self.left_out["places"].append(row.where)

    def _advance(self, count: int, *, is_end: bool) -> None:
        self.taken += count
        self._given += count
        if is_end:
            self.is_done = not self._repeats or self._given == 0
            self._size, self._rows = self._given, None
            self.passes += 1

    def _open(self) -> Iterator[Row]:
        if self._rows is None:
            opened = iter(self._source() if callable(self._source) else self._source)
            if opened is self._source:
                raise ConfigError(
                    "C09",
                    f"rows is a {type(self._source).__name__}, which can be read only once, so a run could not resume "
                    "in it",
                    fix="give a list, a data set, or a function that opens the rows: lambda: open_source(...)",
                )
            rows = (_row(values, i) for i, values in enumerate(opened, 1))
            self._rows, self._given = keep_rows(rows, self._filter, self._leave_out), 0
        return self._rows


def _row(values: Any, number: int) -> Row:
    if isinstance(values, Row):
        return values
    if isinstance(values, Mapping):
        return Row("", number, dict(values))
    message = f"a row must be a mapping of columns, found {show_value(values)}"
    raise DataError("D01", message, where=f"row {number} of the stream", fix="hand out dicts")
