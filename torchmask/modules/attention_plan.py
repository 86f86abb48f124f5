"""The visible pairs of a batch as a few rectangles and triangles, so that no kernel needs a T x T mask.

Consecutive slots with the same `visible_until` are a *run*: they see each other causally (a triangle), and all slots
after them up to that limit see all of them (a rectangle). That holds for any `visible_until`: a document is one run; in
a tree of documents laid out depth first a run is a shared prefix or a branch, and a rectangle is "everything below this
prefix sees it". So a branch attends to its ancestors' keys and its own, the work is the number of visible pairs, and
nothing is gathered: rectangles are slices. Where several parts meet a query, their results are merged by their
log-sum-exps (as in cascade attention), see `attention_kernels`.

Chosen over one call a branch with its ancestors' keys copied beside its own: a hundred branches of one prefix would be
a hundred calls and copies. Closed stretches of at most `SMALL` slots (leaves, short documents, small subtrees) are
batched by length instead, with a mask where they are no plain triangle.

A hidden token inside a run takes its key out of the rectangle, and its query out of the triangle into a part with a
mask of its own. What follows no such pattern is cut into blocks of queries with masks: always exact, at worst
quadratic.

All rows of a batch are planned as one: slot s of row b is b * T + s. Legend: N = B * T such slots.
"""

import numpy as np
import torch
from torch import Tensor

from torchmask.modules.attention_parts import Array, AttentionParts, Limits, Part

SMALL = 128
"""Closed stretches of up to this many slots are batched."""

BLOCK_QUERIES = 128
"""Queries of a part that needs a mask but has no shape of its own."""

PAIRS_PER_PART = 12_000
"""Pairs under a mask that cost as much as a part: 0.5 ms a layer (fp32, 8 heads of 64, one thread of a Xeon)."""


def plan_parts(
    until: Tensor, *, since: Tensor | None = None, positions: Tensor | None = None, window: int | None = None
) -> AttentionParts:
    """The parts of a batch.

    Args:
        until, since, positions: [B, T] int64, see `Visibility`; positions None = slot numbers.
        window: see `Visibility`.

    A prefix of 200 slots with two branches of 100: a triangle of its own, two in a batch, and one rectangle.

    >>> tree = torch.tensor([[400] * 200 + [300] * 100 + [400] * 100])
    >>> plan = plan_parts(tree)
    >>> [p.queries if isinstance(p.queries, slice) else p.queries[:, 0].tolist() for p in plan.own]
    [slice(0, 200, None), [200, 300]]
    >>> [(p.queries, p.keys) for p in plan.across]
    [(slice(200, 400, None), slice(0, 200, None))]
    """
    num_rows, num_slots = until.shape
    rows = np.arange(num_rows)[:, None] * num_slots
    slots = rows + np.arange(num_slots)
    flat_until = np.clip(until.cpu().numpy(), np.arange(1, num_slots + 1), num_slots) + rows
    flat_since = slots if since is None else np.minimum(since.cpu().numpy() + rows, slots)
    flat_positions = slots - rows if positions is None else positions.cpu().numpy()
    flat_positions = np.broadcast_to(flat_positions, slots.shape)
    if window is not None and flat_positions.max() - flat_positions.min() < window:
        window = None  # nothing is that far
    flat_until, flat_since, flat_positions = (
        a.astype(np.int64).ravel() for a in (flat_until, flat_since, flat_positions)
    )
    limits = Limits(flat_until, flat_since, flat_positions, window, until.device)
    if window is None and since is None and (flat_until == (slots[:, -1:] + 1).repeat(num_slots)).all():
        ends = [slice(b * num_slots, (b + 1) * num_slots) for b in range(num_rows)]
        return AttentionParts(tuple(Part(row, row, True, False, limits) for row in ends), (), (), limits, True)
    return _Planner(flat_until, flat_since, flat_positions, window, limits).plan()


class _Runs:
    """Runs of slots with the same limits, and where the row falls into segments that do not see each other.

    A hidden slot (visible to nobody else) belongs to the run around it.
    """

    def __init__(self, until: Array, since: Array) -> None:
        slots = np.arange(len(until))
        nobody = (until == slots + 1) & (since == slots)
        last = np.maximum.accumulate(np.where(nobody, -1, slots))  # the nearest slot before that others see
        self.hidden = nobody & (last >= 0) & (until[last] > slots)
        until_of_run = np.where(self.hidden, until[last], until)
        both_ways = since < slots
        both_ways[:-1] |= both_ways[1:] & (since[1:] == slots[:-1])  # the slot that the next one starts from
        both_ways = np.where(self.hidden, both_ways[last], both_ways)
        new = np.ones(len(until), bool)
        new[1:] = (until_of_run[1:] != until_of_run[:-1]) | (both_ways[1:] != both_ways[:-1])
        new |= both_ways & (since == slots) & ~self.hidden
        starts = np.flatnonzero(new)
        stops = np.append(starts[1:], len(until))
        odd = both_ways & ~self.hidden & (since != np.repeat(starts, stops - starts))
        num_hidden = np.concatenate(([0], np.cumsum(self.hidden)))
        self.starts, self.stops = starts.tolist(), stops.tolist()
        self.until, self.both_ways = until_of_run[starts].tolist(), both_ways[starts].tolist()
        self.has_hidden = (num_hidden[stops] > num_hidden[starts]).tolist()
        # A hidden slot at the end of a causal triangle is a query like any other there.
        self.is_triangle = (~both_ways[starts] & (num_hidden[stops - 1] == num_hidden[starts])).tolist()

        self.odd = odd
        first_seen = np.minimum.accumulate(since[::-1])[::-1]
        self.closes = np.maximum.accumulate(until) == slots + 1  # nothing up to here is seen from after here ...
        self.closes[:-1] &= first_seen[1:] > slots[:-1]  # ... nor the other way round
        self.single = self.closes & np.concatenate(([True], self.closes[:-1]))

    def segments(self) -> list[tuple[int, int, bool]]:
        """(start, stop, whether the runs describe it) of every segment of two slots or more."""
        stops = np.flatnonzero(self.closes) + 1
        starts = np.concatenate(([0], stops[:-1]))
        odd = np.concatenate(([0], np.cumsum(self.odd)))
        usual = odd[stops] == odd[starts]
        several = stops - starts > 1
        return list(zip(*(a[several].tolist() for a in (starts, stops, usual))))

    def lonely(self) -> list[slice]:
        """Stretches of slots that are segments of their own."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self.single, [0]))))
        return [slice(a, b) for a, b in edges.reshape(-1, 2).tolist()]

    def keys(self, i: int, device: torch.device) -> slice | Tensor:
        """The slots of run i that others see."""
        start, stop = self.starts[i], self.stops[i]
        if not self.has_hidden[i]:
            return slice(start, stop)
        return torch.from_numpy(start + np.flatnonzero(~self.hidden[start:stop]))[None].to(device)

    def closed_until(self, i: int) -> int | None:
        """The first run that starts where run i's reach ends, if no run between reaches further."""
        end, j = self.until[i], i
        while j < len(self.starts) and self.starts[j] < end:
            if self.stops[j] > end or self.until[j] > end:
                return None
            j += 1
        return j


class _Planner:
    """The state of one call to `plan_parts`: numpy over slots, Python over runs."""

    def __init__(self, until: Array, since: Array, positions: Array, window: int | None, limits: Limits) -> None:
        self.since, self.positions, self.window, self.limits = since, positions, window, limits
        self.runs = _Runs(until, since)
        self.own: list[Part] = []
        self.across: list[Part] = []
        self.stretches: list[tuple[int, int, bool]] = []  # start, stop, whether a triangle

    def plan(self) -> AttentionParts:
        run_of = np.searchsorted(self.runs.starts, np.arange(len(self.since)), side="right") - 1
        for start, stop, usual in self.runs.segments():
            if stop - start <= SMALL:
                i = int(run_of[start])
                triangle = self.runs.stops[i] == stop and self.runs.is_triangle[i]
                self.stretches.append((start, stop, triangle))
            elif not usual or not self._segment(int(run_of[start]), start, stop):
                self._blocks(start, stop)
        self._batch()
        return AttentionParts(tuple(self.own), tuple(self.across), tuple(self.runs.lonely()), self.limits, False)

    def _segment(self, i: int, start: int, stop: int) -> bool:
        """Plans a segment by its runs; False, and nothing planned, if it is cheaper without."""
        runs, whole, small = self.runs, [], []
        while i < len(runs.starts) and runs.starts[i] < stop:
            after = runs.closed_until(i) if runs.until[i] - runs.starts[i] <= SMALL else None
            if after is None:
                whole.append(i)
                i += 1
            else:
                small.append((runs.starts[i], runs.until[i], after == i + 1 and runs.is_triangle[i]))
                i = after
        if len(whole) * PAIRS_PER_PART > (stop - start) ** 2:
            return False
        self.stretches += small
        for i in whole:
            self._run(i)
            if runs.until[i] > runs.stops[i]:
                keys = runs.keys(i, self.limits.until.device)
                if not isinstance(keys, Tensor) or keys.shape[1] > 0:
                    self._rectangle(runs.stops[i], runs.until[i], keys)
        return True

    def _run(self, i: int) -> None:
        """A run's queries over its own keys."""
        runs, limits = self.runs, self.limits
        start, stop = runs.starts[i], runs.stops[i]
        if stop - start <= SMALL:
            self.stretches.append((start, stop, runs.is_triangle[i]))
        elif self._far(slice(start, stop), slice(start, stop)) or (runs.both_ways[i] and runs.has_hidden[i]):
            self._blocks(start, stop)
        elif runs.is_triangle[i] or runs.both_ways[i]:
            slots = slice(start, stop)
            self.own.append(Part(slots, slots, runs.is_triangle[i], False, limits))
        else:
            seen = runs.keys(i, limits.until.device)
            self.own.append(Part(seen, seen, True, False, limits))
            hidden = start + np.flatnonzero(runs.hidden[start:stop])
            for at in range(0, len(hidden), BLOCK_QUERIES):
                block = hidden[at : at + BLOCK_QUERIES]
                queries = torch.from_numpy(block)[None].to(limits.until.device)
                self.own.append(Part(queries, slice(start, int(block[-1]) + 1), False, True, limits))

    def _rectangle(self, start: int, stop: int, keys: slice | Tensor) -> None:
        """Queries start .. stop over keys that all of them see, window aside."""
        queries = slice(start, stop)
        if not self._far(queries, keys):
            self.across.append(Part(queries, keys, False, False, self.limits))
            return
        assert self.window is not None
        slots = np.arange(keys.start, keys.stop) if isinstance(keys, slice) else keys[0].cpu().numpy()
        latest = self.positions[slots].max()
        device = self.limits.until.device
        for at in range(start, stop, BLOCK_QUERIES):
            block = np.arange(at, min(at + BLOCK_QUERIES, stop))
            block = block[self.positions[block] - latest < self.window]  # others see none of the keys
            if len(block):
                near = slots[self.positions[slots] > self.positions[block].min() - self.window]
                pair = [torch.from_numpy(a)[None].to(device) for a in (block, near)]
                self.across.append(Part(pair[0], pair[1], False, True, self.limits))

    def _blocks(self, start: int, stop: int) -> None:
        """Slots start .. stop among themselves, a block of queries at a time, under masks."""
        causal = bool((self.since[start:stop] == np.arange(start, stop)).all())
        for at in range(start, stop, BLOCK_QUERIES):
            end = min(at + BLOCK_QUERIES, stop)
            keys: slice | Tensor = slice(start, end if causal else stop)
            if self.window is not None:
                near = self.positions[keys] > self.positions[at:end].min() - self.window
                slots = start + np.flatnonzero(near)
                keys = slice(int(slots[0]), int(slots[-1]) + 1)
                if len(slots) < keys.stop - keys.start:
                    keys = torch.from_numpy(slots)[None].to(self.limits.until.device)
            self.own.append(Part(slice(at, end), keys, False, True, self.limits))

    def _far(self, queries: slice, keys: slice | Tensor) -> bool:
        """Whether the window hides a key from a query."""
        if self.window is None:
            return False
        index = keys if isinstance(keys, slice) else keys[0].cpu().numpy()
        return bool(self.positions[queries].max() - self.positions[index].min() >= self.window)

    def _batch(self) -> None:
        """Stretches of like length in one part each."""
        if not self.stretches:
            return
        device = self.limits.until.device
        groups: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        for start, stop, triangle in self.stretches:
            slots = slice(start, stop)
            triangle = triangle and not self._far(slots, slots)
            step = 8 if stop - start <= 64 else 16
            padded = -(-(stop - start) // step) * step
            groups.setdefault((padded, triangle), []).append((start, stop - start))
        for (_, triangle), members in groups.items():
            if len(members) == 1:
                ((start, length),) = members
                slots = slice(start, start + length)
                self.own.append(Part(slots, slots, triangle, not triangle, self.limits))
                continue
            starts, lengths = np.array(members, np.int64).T
            steps = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
            index = torch.from_numpy(starts[:, None] + steps).to(device)
            ragged = None if (lengths == lengths[0]).all() else torch.from_numpy(lengths.copy()).to(device)
            self.own.append(Part(index, index, triangle, not triangle, self.limits, ragged))
