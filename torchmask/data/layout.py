"""Rows of fragments: what a row fetch needs, in the order of the rows, and the fetch itself.

Everything is flat arrays and a row is gathered from the samples when it is asked for, so that building the data set
costs no copy of the tokens. The alternative, writing all rows out at once, makes a row a slice; it pays when the rows
go to a file and belongs there.

Legend: T slots of one row, N samples, F fragments, R rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.constants import IGNORE_INDEX
from torchmask.data.fragments import Bools, Fragments, Integers
from torchmask.data.plan import Plan
from torchmask.data.sample import Samples
from torchmask.data.segments import Segments, segments_of, smaller_before
from torchmask.messages import MaskFlag

_MASKED, _HIDDEN = np.uint8(MaskFlag.LOSS), np.uint8(MaskFlag.ATTENTION)


@dataclass(frozen=True, eq=False)
class Pack:
    """One unpadded row of documents.

    Attributes:
        tokens: [T] int32.
        labels: [T] int32, the target of each slot inside its own document; `IGNORE_INDEX` where there is none.
        positions: [T] int32, distance from the start of the slot's document (or fragment), along its path in a tree.
        visible_until: [T] int32; a later slot q sees slot k iff `q < visible_until[k]`. The end of k's document (in a
            tree: of the documents that share k), or k + 1 where nothing may see it.
        weights: [T] float32, weight of each slot's label (0 where there is none), or None: 1 for every label.
        visible_from: [T] int32, the first slot that sees each slot: slot q sees k iff `visible_from[k] <= q <
            visible_until[k]`; None = itself, that is causal.
        rules: [T] uint8, the rule that decided each slot's label, an index into `PackedDataset.rule_names`; 0 where
            no token follows. None where the samples have none.
        normalizer: this row's share of what the loss of a step is divided by; None = its number of targets.
    """

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    visible_until: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None
    visible_from: npt.NDArray[np.int32] | None = None
    rules: npt.NDArray[np.uint8] | None = None
    normalizer: float | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How rows are seen; `PackedDataset` documents the fields."""

    attention: str = "document"
    positions: str = "reset"
    prefix: str = "causal"
    mutes_terminated: bool = False  # a stop put in place of a cut-off token is never trained
    boundary_weight: float = 1.0
    boundary_rule: int = 0


class Layout:
    """Fragments in the order of their rows.

    Args:
        plan: rows of `fragments`.
        shared: [F] int64, of `TreePlan`; None = rows are flat.
        boundary: [F] bool in the order of the plan, see `edges.boundaries`.
        prompts: [F] int64 in the order of the plan, slots of each fragment that are its unsupervised prompt.
        scale: [F] float32 in the order of the plan, what the weights of each fragment's labels are multiplied with.
        normalizers: [R] float64.
    """

    def __init__(
        self,
        samples: Samples,
        fragments: Fragments,
        plan: Plan,
        *,
        options: RowOptions,
        shared: Integers | None = None,
        boundary: Bools | None = None,
        prompts: Integers | None = None,
        scale: npt.NDArray[np.float32] | None = None,
        normalizers: npt.NDArray[np.float64],
    ) -> None:
        self.samples, self.options, self.rows = samples, options, plan.offsets
        self.fragments = fragments.select(plan.order)
        part = self.fragments
        self.starts = part.starts if shared is None else part.starts + shared
        self.slots = np.concatenate([[0], np.cumsum(part.stops - self.starts)])
        self.row_lengths: Integers = np.diff(self.slots[plan.offsets])
        self._begins = samples.offsets[part.samples] + self.starts
        self._numbers = np.arange(int(self.row_lengths.max(initial=0)) + 1)
        self._hides = bool((samples.mask & _HIDDEN).any())
        self._prompts, self._scale, self._normalizers = prompts, scale, normalizers
        # What each last slot predicts: the place of a token in the flat columns, -1 for nothing.
        self._boundary = np.zeros(len(part), bool) if boundary is None else boundary
        # A first token that was kept on its own predicts nothing: what followed it is gone.
        goes_on = part.continues & ~(part.keeps_first & (part.lengths == 1))
        self._onward = np.where(goes_on, samples.offsets[part.samples] + part.stops, -1)
        at = np.flatnonzero(self._boundary)
        self._onward[at] = samples.offsets[part.samples[at + 1]]
        self._plain = not ((self._onward >= 0).any() or part.keeps_first.any() or part.terminated.any())
        self._weighted = samples.weights is not None or scale is not None
        self._weighted |= bool(self._boundary.any()) and options.boundary_weight != 1
        self._shared = shared
        self._segments: Segments | None = None
        if shared is not None:
            self._segments = segments_of(self.starts, part.stops, shared, self.slots)
            self._holders = np.where(shared > 0, smaller_before(shared), -1)

    def fetch(self, i: int) -> Pack:
        """Row i of R."""
        a, b = int(self.rows[i]), int(self.rows[i + 1])
        edges = self.slots[a : b + 1] - self.slots[a]
        slots, ends, lengths = edges[:-1], edges[1:], np.diff(edges)
        numbers = self._numbers[: edges[-1]]
        places = np.repeat(self._begins[a:b] - slots, lengths)  # [T], of each slot's token in the flat columns
        places += numbers
        heads = slots[:0] if self._plain else slots[self.fragments.keeps_first[a:b]]
        if len(heads):
            places[heads] = self.samples.offsets[self.fragments.samples[a:b][self.fragments.keeps_first[a:b]]]
        columns = self.samples
        tokens, flags = columns.tokens.take(places), columns.mask.take(places)
        rules = None if columns.rules is None else columns.rules.take(places)
        weights = None
        if self._weighted:
            weights = np.ones(len(places), np.float32) if columns.weights is None else columns.weights.take(places)
            weights = _shifted(weights)
        # The shift: within a fragment the next slot holds the next token. What this says of last slots is wrong and
        # replaced below.
        masked = (flags & _MASKED) != 0
        if not self._plain:
            self._terminate(a, b, ends, tokens, masked, rules)
        labels, ignored = _shifted(tokens), _shifted(masked)
        ignored[ends - 1] = True
        ignored[heads] = True
        if rules is not None:
            rules = _shifted(rules)
            rules[ends - 1] = 0
        if not self._plain:
            self._predict_onward(a, b, ends, labels, ignored, weights, rules)
        np.putmask(labels, ignored, IGNORE_INDEX)
        if weights is not None:
            if self._scale is not None:
                weights *= np.repeat(self._scale[a:b], lengths)
            np.putmask(weights, ignored, 0)
        return Pack(
            tokens,
            labels,
            self._positions(a, b, slots, lengths, numbers),
            self._visible_until(a, b, ends, lengths, numbers, flags),
            weights,
            self._visible_from(a, b, slots, lengths, numbers, flags),
            rules,
            float(self._normalizers[i]),
        )

    def _terminate(
        self,
        a: int,
        b: int,
        ends: Integers,
        tokens: npt.NDArray[np.int32],
        masked: Bools,
        rules: npt.NDArray[np.uint8] | None,
    ) -> None:
        """Puts stop tokens into the last slots of terminated fragments; their flags stay those of the cut-off ones."""
        terminated = self.fragments.terminated[a:b]
        if not terminated.any():
            return
        at = ends[terminated] - 1
        documents = self.fragments.samples[a:b][terminated]
        stops = self.samples.offsets[documents] + self.samples.stops[documents]
        tokens[at] = self.samples.tokens[stops]
        masked[at] |= self.options.mutes_terminated
        if rules is not None and self.samples.rules is not None:
            rules[at] = self.samples.rules[stops]

    def _predict_onward(
        self,
        a: int,
        b: int,
        ends: Integers,
        labels: npt.NDArray[np.int32],
        ignored: Bools,
        weights: npt.NDArray[np.float32] | None,
        rules: npt.NDArray[np.uint8] | None,
    ) -> None:
        """Labels of last slots: of fragments that go on elsewhere (E5, virtual stops) and between documents (E2)."""
        chosen = np.flatnonzero(self._onward[a:b] >= 0)
        if not len(chosen):
            return
        slots, places = ends[chosen] - 1, self._onward[a:b][chosen]
        across = self._boundary[a:b][chosen]
        labels[slots] = self.samples.tokens[places]
        ignored[slots] = ((self.samples.mask[places] & _MASKED) != 0) & ~across
        if weights is not None:
            own = 1.0 if self.samples.weights is None else self.samples.weights[places]
            weights[slots] = np.where(across, self.options.boundary_weight, own)
        if rules is not None and self.samples.rules is not None:
            rules[slots] = np.where(across, self.options.boundary_rule, self.samples.rules[places])

    def _positions(
        self, a: int, b: int, slots: Integers, lengths: Integers, numbers: Integers
    ) -> npt.NDArray[np.int32]:
        if self.options.positions == "continue":
            return numbers.astype(np.int32)
        zeros = slots if self._shared is None else slots - self._shared[a:b]
        return np.subtract(numbers, np.repeat(zeros, lengths), dtype=np.int32, casting="same_kind")

    def _visible_until(
        self, a: int, b: int, ends: Integers, lengths: Integers, numbers: Integers, flags: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int32]:
        if self.options.attention == "causal":
            visible_until = np.full(len(numbers), len(numbers), np.int32)
        elif self._segments is None:
            visible_until = np.repeat(ends.astype(np.int32), lengths)
        else:
            cut = slice(int(self._segments.first[a]), int(self._segments.first[b]))
            own = (self._segments.ends[cut] - self.slots[a]).astype(np.int32)
            visible_until = np.repeat(own, self._segments.lengths[cut])
        if self._hides:
            hidden = (flags & _HIDDEN) != 0
            np.copyto(visible_until, numbers + 1, where=hidden, casting="same_kind")
        return visible_until

    def _visible_from(
        self, a: int, b: int, slots: Integers, lengths: Integers, numbers: Integers, flags: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int32] | None:
        """Prefix-LM: the slots of a prompt are seen from its first slot on, hidden ones only by themselves."""
        if self._prompts is None:
            return None
        inside = numbers < np.repeat(slots + self._prompts[a:b], lengths)
        if self._hides:
            inside &= (flags & _HIDDEN) == 0
        return np.where(inside, np.repeat(slots, lengths), numbers).astype(np.int32)

    def parent(self, f: int) -> int:
        """The fragment in whose slots the last token that fragment f shares lies; -1 = it shares none."""
        return -1 if self._segments is None else int(self._holders[f])

    def path(self, f: int) -> Integers:
        """[n] int64, the slots of all tokens of fragment f in its row, shared ones included."""
        row = int(np.searchsorted(self.rows, f, side="right")) - 1
        first = self.slots[self.rows[row]]
        pieces, upto = [], int(self.fragments.stops[f])
        while f >= 0:
            start = int(self.starts[f])
            pieces.append(np.arange(start, upto) - start + self.slots[f] - first)
            upto, f = start, self.parent(f)
        return np.concatenate(pieces[::-1])


def _shifted(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[T], each slot's right neighbour; the last slot, which has none, gets its own value."""
    result = np.empty_like(column)
    result[:-1] = column[1:]
    result[-1] = column[-1]
    return result
