"""Which documents share a row: pure, deterministic functions of the lengths.

Best-fit decreasing never looks at one document at a time: all documents of one length are placed together, and rows
with the same room left are interchangeable, so the work is one small step for each pair of (length, room) and
everything within a step is numpy. The price is that a row mixes long and short documents from all over the data set;
`in_order` keeps neighbours together and fills less. Every strategy numbers rows by their first document and lists a
row's documents in data order, so that the first rows of a plan show the first documents.

Legend: N documents, R rows.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import overload

import numpy as np
import numpy.typing as npt

from torchmask.errors import ConfigError, DataError

STRATEGIES = ("best_fit", "first_fit", "in_order", "split", "none")


@dataclass(frozen=True, eq=False)
class Plan(Sequence[npt.NDArray[np.int64]]):
    """The documents of each row, kept in two arrays; `plan[i]` is a view.

    Attributes:
        order: [N] int64, document indexes, row after row.
        offsets: [R + 1] int64; row i is `order[offsets[i]:offsets[i + 1]]`.
    """

    order: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.int64]: ...
    @overload
    def __getitem__(self, index: slice) -> list[npt.NDArray[np.int64]]: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[np.int64] | list[npt.NDArray[np.int64]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        return self.order[self.offsets[i] : self.offsets[i + 1]]


def plan_packs(lengths: npt.ArrayLike, max_seq_len: int, strategy: str = "best_fit") -> Plan:
    """The documents of each row, every document once.

    Args:
        lengths: [N] integers, tokens of each document, none above `max_seq_len` except with `split`.
        max_seq_len: slots of a row.
        strategy: `best_fit` (longest first, into the fullest row with room), `first_fit` (longest first, into the first
            row with room), `in_order` (neighbours share a row), `none` (a row each), `split` (the documents are one
            stream, cut at every row's end; a document that is cut is listed in each of its rows).

    Raises:
        ConfigError: C06 for an unknown strategy, C13 for a `max_seq_len` below 1.
        DataError: D09, a document that is longer than a row.

    >>> [row.tolist() for row in plan_packs([3, 6, 2, 5], 8)]
    [[0, 3], [1, 2]]
    >>> [row.tolist() for row in plan_packs([3, 6, 2, 5], 8, "in_order")]
    [[0], [1, 2], [3]]
    >>> [row.tolist() for row in plan_packs([3, 6, 2, 5], 8, "split")]
    [[0, 1], [1, 2, 3]]
    """
    check_choice("packing strategy", strategy, STRATEGIES)
    if max_seq_len < 1:
        raise ConfigError("C13", f"max_seq_len must be at least 1, got {max_seq_len}")
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.ndim != 1 or (sizes < 0).any():
        raise ValueError(f"lengths must be a list of integers >= 0, got shape {sizes.shape}")
    if strategy == "split":
        documents, starts, stops = cut_stream(sizes, max_seq_len)
        return Plan(documents, _in_order(stops - starts, max_seq_len).offsets)  # the cuts fill every row exactly
    if len(sizes) and sizes.max() > max_seq_len:
        i = int(np.argmax(sizes > max_seq_len))
        raise DataError("D09", f"document {i} has {sizes[i]} tokens, max_seq_len is {max_seq_len}")
    if strategy == "none":
        return Plan(np.arange(len(sizes)), np.arange(len(sizes) + 1))
    if strategy == "in_order":
        return _in_order(sizes, max_seq_len)
    assign = _best_fit if strategy == "best_fit" else _first_fit
    return number_rows(assign(sizes, max_seq_len))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices, naming the nearest (ConfigError C06)."""
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        fix = f"did you mean {near[0]}?" if near else None
        raise ConfigError("C06", f"unknown {name} {value!r}; one of {', '.join(choices)}", fix=fix)


def cut_stream(
    lengths: npt.NDArray[np.int64], max_seq_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The fragments (document, start, stop), each [F] int64, of documents laid end to end and cut every `max_seq_len`.

    >>> [a.tolist() for a in cut_stream(np.array([3, 6]), 4)]
    [[0, 1, 1, 1], [0, 0, 1, 5], [3, 1, 5, 6]]
    """
    ends = np.cumsum(lengths)
    begins = ends - lengths
    full = np.flatnonzero(lengths > 0)
    total = int(ends[-1]) if len(ends) else 0
    # A fragment begins wherever a document or a row does.
    cuts = np.concatenate([begins[full], np.arange(0, total, max_seq_len)])
    cuts.sort(kind="stable")  # two sorted runs: merged, not sorted
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    documents = full[np.searchsorted(begins[full], cuts, side="right") - 1]
    stops = np.append(cuts[1:], total)[: len(cuts)]
    return documents, cuts - begins[documents], stops - begins[documents]


def _in_order(lengths: npt.NDArray[np.int64], max_seq_len: int) -> Plan:
    """Next fit: a row ends where the next document does not fit. One step of Python for each row."""
    ends = np.cumsum(lengths)
    following = np.searchsorted(ends, ends - lengths + max_seq_len, side="right").tolist()
    firsts, i = [], 0
    while i < len(following):
        firsts.append(i)
        i = following[i]
    return Plan(np.arange(len(lengths)), np.array([*firsts, i], np.int64))


def _best_fit(lengths: npt.NDArray[np.int64], max_seq_len: int) -> npt.NDArray[np.int64]:
    """[N] int64, the row of each document, best-fit decreasing.

    Rows are kept by the room they have left. The best row for a document is one with the least sufficient room r, and
    once a document of length l is in it, it is the best for the next of that length as well: so each takes r // l.
    """
    row_of = np.zeros(len(lengths), np.int64)
    rows_with: dict[int, list[npt.NDArray[np.int64]]] = {}
    rooms: list[int] = []  # sorted keys of rows_with
    num_rows = 0
    for length, documents in _longest_first(lengths, max_seq_len):
        placed = 0
        while placed < len(documents):
            left = len(documents) - placed
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms.pop(at)
                stacked = rows_with.pop(room)
                rows = stacked[0] if len(stacked) == 1 else np.concatenate(stacked)
            else:
                room = max_seq_len
                needed = -(-left // (room // length))
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            each = room // length
            used = min(len(rows), -(-left // each))
            count = min(left, used * each)
            row_of[documents[placed : placed + count]] = np.repeat(rows[:used], each)[:count]
            placed += count
            in_last = count - (used - 1) * each
            for group, now in (
                (rows[: used - 1], room - each * length),
                (rows[used - 1 : used], room - in_last * length),
                (rows[used:], room),
            ):
                if len(group) and now > 0:
                    if now not in rows_with:
                        insort(rooms, now)
                    rows_with.setdefault(now, []).append(group)
    return row_of


def _first_fit(lengths: npt.NDArray[np.int64], max_seq_len: int) -> npt.NDArray[np.int64]:
    """[N] int64, the row of each document, first-fit decreasing: each row takes what fits before the next is asked."""
    row_of = np.zeros(len(lengths), np.int64)
    shortest = int(lengths[lengths > 0].min(initial=max_seq_len))
    rows, room = np.empty(0, np.int64), np.empty(0, np.int64)  # rows that may still take something
    num_rows = 0
    for length, documents in _longest_first(lengths, max_seq_len):
        able = np.flatnonzero(room >= length)
        takes = room[able] // length
        missing = len(documents) - int(takes.sum())
        if missing > 0:
            fresh = -(-missing // (max_seq_len // length))
            able = np.append(able, np.arange(len(rows), len(rows) + fresh))
            takes = np.append(takes, np.full(fresh, max_seq_len // length))
            rows = np.append(rows, np.arange(num_rows, num_rows + fresh))
            room = np.append(room, np.full(fresh, max_seq_len))
            num_rows += fresh
        before = np.cumsum(takes) - takes
        takes = np.clip(len(documents) - before, 0, takes)
        row_of[documents] = np.repeat(rows[able], takes)
        room[able] -= takes * length
        alive = room >= shortest
        if np.count_nonzero(alive) < len(alive) // 2:  # now and then, so that it costs nothing
            rows, room = rows[alive], room[alive]
    return row_of


def _longest_first(lengths: npt.NDArray[np.int64], max_seq_len: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """(length, documents of that length) from the longest down; documents in data order, empty ones left out."""
    if not len(lengths):
        return []
    # 16-bit keys take numpy's radix sort, ten times faster than its merge sort.
    keys = (max_seq_len - lengths).astype(np.uint16 if max_seq_len < 1 << 16 else np.int64)
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(np.bincount(keys))
    present = np.flatnonzero(np.diff(ends, prepend=0))
    begins = np.append(0, ends)[present]
    groups = zip((max_seq_len - present).tolist(), begins.tolist(), ends[present].tolist())
    return [(length, order[a:b]) for length, a, b in groups if length]


def number_rows(row_of: npt.NDArray[np.int64]) -> Plan:
    """The plan of [N] int64 rows of documents: rows numbered by their first document, their documents in data order."""
    if not len(row_of):
        return Plan(np.empty(0, np.int64), np.zeros(1, np.int64))
    count = int(row_of.max()) + 1
    first = np.zeros(count, np.int64)
    first[row_of[::-1]] = np.arange(len(row_of) - 1, -1, -1)  # the last write, the smallest index, stays
    number = np.empty(count, np.int64)
    number[np.argsort(first)] = np.arange(count)
    row_of = number[row_of]
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=count), out=offsets[1:])
    return Plan(np.argsort(row_of, kind="stable"), offsets)
