"""Packs of a stream that does not fit: rows are tokenised and packed window by window, and forgotten.

A window is a fixed number of rows, in the order of the stream. It becomes samples and a `PackedDataset` of its own, so
every option of either means what it means elsewhere, and its rows are shuffled by (seed, window). Windows are the same
whoever reads them; rank r packs every world_size-th of them and passes over the rows of the others, which are read but
neither parsed nor tokenised. So ranks share nothing, and where a run is in its stream is two integers: the window, and
how many of its packs are taken. The price is that no document is packed with one of another window; with a few
thousand documents in one this costs under 1 % of fill.

A mixture takes the rows of each window from several sources, by weight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from torchmask.data.columns import add_reports
from torchmask.data.fingerprints import key_of
from torchmask.data.layout import Pack
from torchmask.data.mixture import interleaved
from torchmask.data.packing import PackedDataset
from torchmask.data.rows import Row, show_value
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError, DataError

STATE_VERSION = 1
_EMPTY = ("D05", "D11")  # a window without samples or targets

RowSource = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class StreamPart:
    """One source of a stream.

    Attributes:
        builder: rows -> samples, called as `builder(source=rows)`: a data set builder with its tokenizer and options,
            `partial(alpaca_dataset, tokenizer)`.
        rows: an iterable of mappings or `Row`s that begins anew each time it is iterated (a list, a data set of the Hub
            opened with streaming=True), or a function that opens one: `lambda: open_source("big.jsonl")`.
        weight: share of the documents of each window, relative to the other parts.
    """

    builder: Callable[..., Samples]
    rows: RowSource
    weight: float = 1.0


@dataclass
class _Reader:
    """The rows of one part, and how many of them were taken."""

    part: StreamPart
    repeats: bool
    taken: int = 0
    is_done: bool = False
    rows: Iterator[Row] = field(default_factory=lambda: iter(()))
    given: int = 0  # in this pass over the source

    def open(self) -> None:
        source = self.part.rows
        opened = iter(source() if callable(source) else source)
        if opened is source:
            raise ConfigError(
                "C09",
                f"rows is a {type(source).__name__}, which can be read only once, so a run could not resume in it",
                fix="give a list, a data set, or a function that opens the rows: lambda: open_source(...)",
            )
        self.rows, self.given = (_row(values, i) for i, values in enumerate(opened, 1)), 0

    def take(self, count: int) -> list[Row]:
        """The next rows, fewer where the source ends; with `repeats` it begins again."""
        result: list[Row] = []
        while len(result) < count and not self.is_done:
            new = list(islice(self.rows, count - len(result)))
            result += new
            self.given += len(new)
            if len(result) < count:
                self.is_done = not self.repeats or self.given == 0
                if not self.is_done:
                    self.open()
        self.taken += len(result)
        return result

    def skip(self, count: int) -> int:
        """Leaves out rows without keeping them; how many there were."""
        skipped = 0
        while skipped < count and not self.is_done:
            some = len(self.take(min(count - skipped, 10_000)))
            skipped += some
        return skipped


def _row(values: Any, number: int) -> Row:
    if isinstance(values, Row):
        return values
    if isinstance(values, Mapping):
        return Row("", number, dict(values))
    message = f"a row must be a mapping of columns, found {show_value(values)}"
    raise DataError("D01", message, where=f"row {number} of the stream", fix="hand out dicts")


class PackedStream:
    """An iterator of `Pack`s over a stream; `state_dict()` after any pack leads back to the next one.

    Args:
        parts: the sources; their rows are mixed by weight within each window.
        max_seq_len: slots of a row.
        window: rows of the stream that are packed together, over all parts.
        packing: further options of `PackedDataset`.
        seed: of the order of the packs of a window.
        repeat: begin each source again when it ends (the stream has no end); else a source that has ended gives no
            more, and the stream ends with the last.
        rank, world_size: this process takes windows `rank, rank + world_size, ...`.

    Attributes:
        report: what was read and skipped in the windows that this process has packed since it began.

    Raises:
        ConfigError: C13, a number out of its range; C09, a source that can be read only once.
        DataError: what the builders and `PackedDataset` find wrong with a window; D05, the stream has no rows.

    >>> def build(source):
    ...     return Samples.from_samples([Sample([1, row.values["n"], 2], [1, 0, 0]) for row in source])
    >>> from torchmask.data.sample import Sample
    >>> stream = PackedStream([StreamPart(build, [{"n": n} for n in range(10, 15)])], max_seq_len=6, window=4)
    >>> [pack.tokens.tolist() for pack in stream][-1]
    [1, 14, 2]
    """

    def __init__(
        self,
        parts: Sequence[StreamPart],
        *,
        max_seq_len: int,
        window: int = 4096,
        packing: Mapping[str, Any] | None = None,
        seed: int = 0,
        repeat: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if window < 1 or not 0 <= rank < world_size:
            message = f"window is {window}, rank {rank} of {world_size}"
            raise ConfigError("C13", message, fix="window is at least 1, rank from 0 to world_size - 1")
        if not parts or any(not part.weight > 0 for part in parts):
            raise ConfigError("C13", "a stream needs parts with weights above 0", fix="give each part a weight")
        self._parts, self._max_seq_len, self._window = list(parts), max_seq_len, window
        self._packing = dict(packing or {})
        self._seed, self._repeat, self._rank, self._world_size = seed, repeat, rank, world_size
        shares = np.array([part.weight for part in parts], np.float64)
        self._weights = (shares / shares.sum()).tolist()
        self._readers: list[_Reader] = []
        self._next_window, self._taken = rank, 0
        self._packs: list[Pack] | None = None
        self.report: dict[str, Any] = add_reports([])

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        while self._packs is None or self._taken >= len(self._packs):
            if self._packs is not None:
                self._next_window, self._taken, self._packs = self._next_window + self._world_size, 0, None
            rows = self._read_window(self._next_window)
            if rows is None:
                if not any(reader.taken for reader in self._readers):
                    raise DataError("D05", "the stream has no rows", fix="check its source, split and filters")
                raise StopIteration
            skip = self._taken
            self._packs = self._pack(rows)
            self._taken = skip
        self._taken += 1
        return self._packs[self._taken - 1]

    def _read_window(self, number: int) -> list[list[Row]] | None:
        """The rows of each part in window `number`; None after the end. Windows before it are passed over."""
        bounds = [
            _given_before(self._weights, number * self._window),
            _given_before(self._weights, (number + 1) * self._window),
        ]
        if not self._readers:
            self._readers = [_Reader(part, self._repeat) for part in self._parts]
            for reader in self._readers:
                reader.open()
        rows = []
        for reader, first, stop in zip(self._readers, *bounds, strict=True):
            reader.skip(first - reader.taken)
            rows.append(reader.take(stop - first))
        if any(rows):
            return rows
        return None if all(reader.is_done for reader in self._readers) else rows

    def _pack(self, rows: Sequence[list[Row]]) -> list[Pack]:
        built = []
        for part, mine in zip(self._parts, rows, strict=True):
            if not mine:
                continue
            try:
                built.append(part.builder(source=mine))
            except DataError as error:
                if error.id != "D05":
                    raise
                self._count("windows_without_samples")
        if not built:
            return []
        samples = Samples.concatenate(built) if len(built) > 1 else built[0]
        self.report = {**self.report, **add_reports([self.report, samples.report])}
        try:
            packs = PackedDataset(samples, **{**self._packing, "max_seq_len": self._max_seq_len})
        except DataError as error:
            if error.id not in _EMPTY and not error.message.startswith("no document is left"):
                raise
            self._count("windows_without_targets")
            return []
        return [packs[i] for i in packs.row_order(self._next_window, self._seed).tolist()]

    def _count(self, name: str) -> None:
        self.report[name] = self.report.get(name, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Where this process (each rank has its own place) is in the stream: a few numbers for JSON."""
        return {
            "version": STATE_VERSION,
            "window": self._next_window,
            "taken": self._taken,
            "rank": self._rank,
            "options": self._options_key(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the pack before which `state_dict` was called; the sources must hand out what they did.

        The rows before are passed over without being parsed or tokenised.

        Raises:
            ConfigError: K09, the state is of a stream with other options or another number of processes.
        """
        wanted = {"version": STATE_VERSION, "rank": self._rank, "options": self._options_key()}
        differing = [key for key, value in wanted.items() if state.get(key) != value]
        if differing:
            shown = ", ".join(f"{key} {state.get(key)!r}, now {wanted[key]!r}" for key in differing)
            fix = "resume with the same max_seq_len, window, packing, weights, seed, repeat and number of processes"
            raise ConfigError("K09", f"the saved place is of another stream: {shown}", fix=fix)
        self._readers, self._packs = [], None
        self._next_window, self._taken = int(state["window"]), int(state["taken"])

    def _options_key(self) -> str:
        options = {
            "max_seq_len": self._max_seq_len,
            "window": self._window,
            "packing": {key: repr(value) for key, value in sorted(self._packing.items())},
            "weights": self._weights,
            "seed": self._seed,
            "repeat": self._repeat,
            "world_size": self._world_size,
        }
        return key_of(options)[:16]


def _given_before(weights: Sequence[float], total: int) -> list[int]:
    """How many of the first `total` documents of a mixture are of each part."""
    if len(weights) == 1:
        return [total]
    period = 1 << 16  # the proportions begin anew after so many, so that late windows cost no more than early ones
    whole, rest = divmod(total, period)
    counts = np.bincount(interleaved(weights, rest), minlength=len(weights))
    if whole:
        counts = counts + whole * np.bincount(interleaved(weights, period), minlength=len(weights))
    return [int(count) for count in counts]
