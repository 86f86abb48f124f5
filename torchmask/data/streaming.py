"""Packs of a stream that does not fit: rows are tokenised and packed window by window, and forgotten.

A window is a fixed number of rows that pass their source's filter, in the order of the stream. It becomes samples and a
`PackedDataset` of its own, so every option of either means what it means elsewhere, and its rows are shuffled by
(seed, window). Windows are the same whoever reads them; rank r packs every world_size-th of them and passes over the
rows of the others, which are read and filtered but neither parsed nor tokenised. So ranks share nothing, and where a
run is in its stream is two integers: the window, and how many of its packs are taken. The price is that no document is
packed with one of another window; with a few thousand documents in one this costs under 1 % of fill.

A mixture takes the rows of each window from several sources, by weight. No more rows are held than one window has.
What becomes of a row is known only after it is tokenised, so weights are shares of rows and not of documents: what is
skipped or dropped is missing from its source's share. The ledger tells how many documents came of each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.data.collect import NoRowsLeft
from torchmask.data.columns import add_reports
from torchmask.data.fingerprints import key_of
from torchmask.data.layout import Pack
from torchmask.data.ledger import ledger_of_nothing
from torchmask.data.mixture import given_before
from torchmask.data.packing import PackedDataset
from torchmask.data.rows import Row
from torchmask.data.sample import Samples
from torchmask.data.selection import NothingToTrain
from torchmask.data.stream_ledger import (
    add_ledgers,
    barren_parts,
    check_truncation,
    empty_ledger,
    short_parts,
    skipped_causes,
)
from torchmask.data.stream_options import LOOSE
from torchmask.data.stream_parts import Reader, StreamPart, without_filter
from torchmask.errors import ConfigError, DataError

STATE_VERSION = 2

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
        warn: told once of each source that gives less than half of its share of the documents, and of each cause for
            which rows are skipped after the first ones.

    Raises:
        ConfigError: C13, a number out of its range; C09, a source that can be read only once.
        DataError: what the builders and `PackedDataset` find wrong with a window; D05, the stream has no rows, or a
            whole pass over its sources gave none to train on; D10, `max_truncated_away`, judged over all documents
            packed so far when they are some thousand and at the end of the stream.

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
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if window < 1 or not 0 <= rank < world_size:
            message = f"window is {window}, rank {rank} of {world_size}"
            raise ConfigError("C13", message, fix="window is at least 1, rank from 0 to world_size - 1")
        if not parts or any(not 0 < part.weight < float("inf") for part in parts):
            raise ConfigError("C13", "a stream needs parts with weights above 0", fix="give each part a weight")
        self._parts, self._max_seq_len, self._window = list(parts), max_seq_len, window
        self._packing = {**(packing or {}), "max_seq_len": max_seq_len}
        self._seed, self._repeat, self._rank, self._world_size = seed, repeat, rank, world_size
        self._check, self._warn = check, warn
        self._warned: set[str] = set()
        shares = np.array([part.weight for part in parts], np.float64)
        self._weights = (shares / shares.sum()).tolist()
        self._readers: list[Reader] = []
        self._next_window, self._taken, self._passes = rank, 0, 0
        self._empty: DataError | None = None  # why a window had nothing to train on
        self._packs: PackedDataset | None = None
        self._order: npt.NDArray[np.int64] | None = None
        self._past = empty_ledger(self._packing, self.shares)  # of the windows before the present one
        self._present: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        while self._order is None or self._taken >= len(self._order):
            if self._order is not None:
                self._next_window, self._taken = self._next_window + self._world_size, 0
                self._past, self._present = self.report, None
                self._packs = self._order = None
            rows = self._read_window(self._next_window)
            if rows is None:
                if not any(reader.taken for reader in self._readers):
                    raise _no_rows(self._readers)
                self._judge(is_end=True)
                raise StopIteration
            self._packs = self._pack(rows)
            self._judge(is_end=False)
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
        passes = min((reader.passes for reader in self._readers if not reader.is_done), default=0)
        if self._order is not None and len(self._order):
            self._passes = passes
        elif passes > self._passes + 1:
            message = "a whole pass over the sources gave no row to train on"
            raise DataError("D05", message, fix="look at filters and masks: what was dropped, why")

    def _read_window(self, number: int) -> list[list[Row]] | None:
        """The rows of each part in window `number`; None after the end. Windows before it are passed over."""
        bounds = [given_before(self._weights, n * self._window) for n in (number, number + 1)]
        if not self._readers:
            self._readers = [Reader(p.rows, self._repeat, without_filter(p.builder)[1]) for p in self._parts]
        rows = []
        for reader, first, stop in zip(self._readers, *bounds, strict=True):
            reader.skip(first - reader.taken)
            rows.append(reader.take(stop - first))
        if any(rows):
            return rows
        return None if all(reader.is_done for reader in self._readers) else rows

    def _pack(self, rows: Sequence[list[Row]]) -> PackedDataset | None:
        """A window's rows; None where nothing is left to train on. Its ledger is `_present`."""
        built, sources, sizes = list[Samples](), list[dict[str, Any]](), []
        for part, reader, mine in zip(self._parts, self._readers, rows, strict=True):
            filtered = reader.left_out
            sources.append(
                {"rows_read": filtered["count"], "skipped": {"filtered": filtered} if filtered["count"] else {}}
            )
            sizes.append(0)
            if not mine:
                continue
            try:
                built.append(without_filter(part.builder)[0](source=mine))
            except NoRowsLeft as error:
                self._empty = error
                sources.append(error.report)
                continue
            sizes[-1] = len(built[-1])
        packs, samples, found = None, None, empty_ledger(self._packing, self.shares)
        if built:
            samples = Samples.concatenate(built) if len(built) > 1 else built[0]
            packs, found = self._pack_samples(samples)
            sources.append(samples.report)
        counted = "packed" if packs else "without_targets" if built else "without_samples"
        parts = self._count_parts(rows, sizes, samples, packs)
        present = {**found, "source": add_reports(sources), "windows": {counted: 1}, "parts": parts}
        self._present = present
        if packs is not None and self._check is not None:
            self._check(packs)
        return packs

    def _pack_samples(self, samples: Samples) -> tuple[PackedDataset | None, dict[str, Any]]:
        """The rows and the ledger of a window's documents."""
        # Whether truncation robs too many documents of their targets is judged over many windows, not here.
        judged = self._packing.get("no_targets", "drop") == "drop"
        options = {**self._packing, "max_truncated_away": 1.0} if judged else self._packing
        try:
            packs = PackedDataset(samples, **options)
        except NothingToTrain as error:
            if self._packing.get("no_targets") == "error":
                raise
            self._empty = error
            return None, ledger_of_nothing(samples, error.causes, options=self._packing)
        return packs, packs.report

    def _count_parts(
        self, rows: Sequence[list[Row]], sizes: Sequence[int], samples: Samples | None, packs: PackedDataset | None
    ) -> list[dict[str, Any]]:
        """Of each part: rows taken, documents that are in the packs, and their tokens; `sizes`: documents of each."""
        bounds = np.cumsum([0, *sizes])
        kept = np.zeros(0, np.int64) if packs is None else packs.packed_samples
        counts = np.diff(np.searchsorted(kept, bounds)).tolist()
        lengths = np.zeros(0, np.int64) if samples is None else samples.lengths[kept]
        tokens = np.diff(np.concatenate([[0], np.cumsum(lengths)])[np.searchsorted(kept, bounds)]).tolist()
        return [
            {"name": name, "share": share, "rows": len(mine), "documents": documents, "tokens": size}
            for (name, share), mine, documents, size in zip(self.shares, rows, counts, tokens, strict=True)
        ]

    def _judge(self, *, is_end: bool) -> None:
        """Looks at what came of all rows so far: warns, and stops where truncation took too much."""
        report = self.report
        if self._packing.get("no_targets", "drop") == "drop":
            check_truncation(report, self._packing.get("max_truncated_away", 0.05), is_end=is_end)
        if self._warn is not None:
            told = self.preview.report["source"]["skipped"]
            found = [*skipped_causes(report, told), *short_parts(report, [reader.is_done for reader in self._readers])]
            for name, text in found:
                self._warn_once(name, text)

    def _warn_once(self, name: str, text: str) -> None:
        if self._warn is not None and name not in self._warned:
            self._warned.add(name)
            self._warn(f"WARNING {text}")

    @property
    def report(self) -> dict[str, Any]:
        """The ledger of the windows that this process has begun, those before a resume included: see `add_ledgers`."""
        return self._past if self._present is None else add_ledgers([self._past, self._present])

    @property
    def num_left(self) -> int:
        """Rows that are packed and not handed out yet."""
        return 0 if self._order is None else len(self._order) - self._taken

    @property
    def shares(self) -> list[tuple[str, float]]:
        """The name of each part and its share of the rows that are read, after its filter."""
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
                for name, text in barren_parts(first.report):
                    self._warn_once(name, text)
                return packs
        raise first._empty or _no_rows(first._readers)

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
        """Where this process (each rank has its own place) is in the stream, and its ledger up to there, for JSON."""
        return {
            "version": STATE_VERSION,
            "window": self._next_window,
            "taken": self._taken,
            "rank": self._rank,
            "options": self._options_key(),
            "ledger": self._past,
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
            fix = f"resume as it was; of packing only {', '.join(LOOSE)} may change"
            raise ConfigError("K09", f"the saved place is of another stream: {shown}", fix=fix)
        self._readers, self._packs, self._order, self._passes = [], None, None, 0
        self._past, self._present = {**state["ledger"], **self._packing}, None
        self._next_window, self._taken = int(state["window"]), int(state["taken"])

    def _options_key(self) -> str:
        options = {
            "max_seq_len": self._max_seq_len,
            "window": self._window,
            "packing": {key: repr(value) for key, value in sorted(self._packing.items()) if key not in LOOSE},
            "weights": self._weights,
            "seed": self._seed,
            "repeat": self._repeat,
            "world_size": self._world_size,
        }
        return key_of(options)[:16]


def _no_rows(readers: Sequence[Reader]) -> DataError:
    left_out = sum(reader.left_out["count"] for reader in readers)
    why = f": {left_out:,} were read and all left out by filter_fn" if left_out else ""
    return DataError("D05", f"the stream has no rows{why}", fix="check its sources, splits and filters")
