"""Packs of a stream that does not fit: rows are tokenised and packed window by window, and forgotten.

A window is a fixed number of rows, in the order of the stream. It becomes samples and a `PackedDataset` of its own, so
every option of either means what it means elsewhere, and its rows are shuffled by (seed, window). Windows are the same
whoever reads them; rank r packs every world_size-th of them and passes over the rows of the others, which are read but
neither parsed nor tokenised. So ranks share nothing, and where a run is in its stream is two integers: the window, and
how many of its packs are taken. The price is that no document is packed with one of another window; with a few
thousand documents in one this costs under 1 % of fill.

A mixture takes the rows of each window from several sources, by weight. No more rows are held than one window has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.data.columns import add_reports
from torchmask.data.fingerprints import key_of
from torchmask.data.layout import Pack
from torchmask.data.mixture import interleaved
from torchmask.data.packing import PackedDataset
from torchmask.data.rows import Row
from torchmask.data.sample import Samples
from torchmask.data.stream_parts import Reader, StreamPart
from torchmask.errors import ConfigError, DataError

STATE_VERSION = 1
_EMPTY = ("D05", "D11")  # a window without samples or targets
_PREVIEW_ROWS = 64
_OTHER_RULE = "other"  # of a rule that the first rows did not show


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
        check: called with the rows of each window before any of them is handed out; raises if they cannot be used.

    Attributes:
        report: what was read and skipped in the windows that this process has packed since it began; `parts` has the
            documents and tokens of each source in them.

    Raises:
        ConfigError: C13, a number out of its range; C09, a source that can be read only once.
        DataError: what the builders and `PackedDataset` find wrong with a window; D05, the stream has no rows, or a
            whole pass over its sources gave none to train on.

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
        check: Callable[[PackedDataset], None] | None = None,
    ) -> None:
        if window < 1 or not 0 <= rank < world_size:
            message = f"window is {window}, rank {rank} of {world_size}"
            raise ConfigError("C13", message, fix="window is at least 1, rank from 0 to world_size - 1")
        if not parts or any(not 0 < part.weight < float("inf") for part in parts):
            raise ConfigError("C13", "a stream needs parts with weights above 0", fix="give each part a weight")
        self._parts, self._max_seq_len, self._window = list(parts), max_seq_len, window
        self._packing = dict(packing or {})
        self._seed, self._repeat, self._rank, self._world_size = seed, repeat, rank, world_size
        self._check = check
        shares = np.array([part.weight for part in parts], np.float64)
        self._weights = (shares / shares.sum()).tolist()
        self._readers: list[Reader] = []
        self._next_window, self._taken, self._passes = rank, 0, 0
        self._empty: DataError | None = None  # why a window had nothing to train on
        self._packs: PackedDataset | None = None
        self._order: npt.NDArray[np.int64] | None = None
        self.report: dict[str, Any] = {**add_reports([]), "parts": [{"documents": 0, "tokens": 0} for _ in parts]}

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        while self._order is None or self._taken >= len(self._order):
            if self._order is not None:
                self._next_window, self._taken = self._next_window + self._world_size, 0
                self._packs = self._order = None
            rows = self._read_window(self._next_window)
            if rows is None:
                if not any(reader.taken for reader in self._readers):
                    raise DataError("D05", "the stream has no rows", fix="check its source, split and filters")
                raise StopIteration
            self._packs = self._pack(rows)
            self._order = np.zeros(0, np.int64)
            if self._packs is not None:
                self._order = self._packs.row_order(self._next_window, self._seed)
            self._refuse_barren_passes()
        assert self._packs is not None
        self._taken += 1
        return self._named(self._packs, int(self._order[self._taken - 1]))

    def _named(self, packs: PackedDataset, row: int) -> Pack:
        """A row whose rules are numbered as in `rule_names`; a window may lack a part, and numbers what it has."""
        pack = packs[row]
        if pack.rules is None or len(self._parts) == 1:
            return pack
        numbers = {name: i for i, name in enumerate(self.rule_names)}
        other = len(self.rule_names) - 1
        lookup = np.array([numbers.get(name, other) for name in packs.rule_names], np.uint8)
        return replace(pack, rules=lookup[pack.rules])

    def _refuse_barren_passes(self) -> None:
        """Stops where a stream that begins again and again has nothing to give."""
        passes = min(reader.passes for reader in self._readers)
        if self._order is not None and len(self._order):
            self._passes = passes
        elif passes > self._passes + 1:
            message = "a whole pass over the sources gave no row to train on"
            raise DataError("D05", message, fix="look at filters and masks: what was dropped, why")

    def _read_window(self, number: int) -> list[list[Row]] | None:
        """The rows of each part in window `number`; None after the end. Windows before it are passed over."""
        bounds = [
            _given_before(self._weights, number * self._window),
            _given_before(self._weights, (number + 1) * self._window),
        ]
        if not self._readers:
            self._readers = [Reader(part.rows, self._repeat) for part in self._parts]
        rows = []
        for reader, first, stop in zip(self._readers, *bounds, strict=True):
            reader.skip(first - reader.taken)
            rows.append(reader.take(stop - first))
        if any(rows):
            return rows
        return None if all(reader.is_done for reader in self._readers) else rows

    def _pack(self, rows: Sequence[list[Row]]) -> PackedDataset | None:
        """A window's rows; None where nothing is left to train on."""
        built = []
        for part, mine, entry in zip(self._parts, rows, self.report["parts"], strict=True):
            if not mine:
                continue
            try:
                built.append(part.builder(source=mine))
            except DataError as error:
                if error.id != "D05":
                    raise
                self._empty = error
                self._count("windows_without_samples")
                continue
            entry["documents"] += len(built[-1])
            entry["tokens"] += int(built[-1].offsets[-1])
        if not built:
            return None
        samples = Samples.concatenate(built) if len(built) > 1 else built[0]
        self.report = {**self.report, **add_reports([self.report, samples.report])}
        try:
            packs = PackedDataset(samples, **{**self._packing, "max_seq_len": self._max_seq_len})
        except DataError as error:
            if error.id not in _EMPTY and not error.message.startswith("no document is left"):
                raise
            self._empty = error
            self._count("windows_without_targets")
            return None
        if self._check is not None:
            self._check(packs)
        return packs

    def _count(self, name: str) -> None:
        self.report[name] = self.report.get(name, 0) + 1

    @property
    def shares(self) -> list[tuple[str, float]]:
        """The name of each part and its share of the documents."""
        return [(part.name or f"part {i}", share) for i, (part, share) in enumerate(zip(self._parts, self._weights))]

    @cached_property
    def preview(self) -> PackedDataset:
        """The first rows of the stream, some of every part, packed as its windows are: to look at and to check by.

        It reads the sources on its own; the stream's place does not change.

        Raises:
            DataError: as the stream; where it gives nothing to train on, why.
        """
        floor = 0.5 / len(self._parts)  # a rare part is looked at too
        parts = [replace(part, weight=max(share, floor)) for part, share in zip(self._parts, self._weights)]
        number = min(self._window, _PREVIEW_ROWS)
        first = PackedStream(parts, max_seq_len=self._max_seq_len, window=number, packing=self._packing)
        for window in range(1 << 62):
            rows = first._read_window(window)
            if rows is None:
                break
            packs = first._pack(rows)
            if packs is not None:
                return packs
        raise first._empty or DataError("D05", "the stream has no rows", fix="check its sources, splits and filters")

    @cached_property
    def rule_names(self) -> tuple[str, ...]:
        """What `Pack.rules` of this stream points into, the same for all ranks: what the first rows name."""
        return (*self.preview.rule_names, _OTHER_RULE)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when names or sizes of files do, or what becomes of the first rows.

        Later rows are not read for it: a stream may be longer than anybody would wait for.
        """
        facts = {"files": [part.files for part in self._parts], "first": self.preview.samples.fingerprint}
        return key_of(facts)[:16]

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
        self._readers, self._packs, self._order, self._passes = [], None, None, 0
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
