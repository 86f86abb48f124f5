"""Packs: rows of documents, shifted once, that a model sees as if each document were alone.

The plan and the fragments are flat arrays and a row is gathered from the samples when it is asked for, so that building
the data set costs no copy of the tokens. The alternative, writing all rows out at once, makes a row a slice; it pays
when the rows go to a file and belongs there.

Legend: T slots of one row, N samples, F fragments, R rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from torchmask.constants import IGNORE_INDEX
from torchmask.data.fragments import Fragments, Targets
from torchmask.data.plan import STRATEGIES, Plan, check_choice, plan_packs
from torchmask.data.report import build_report
from torchmask.data.sample import MAX_PLACES, Sample, Samples
from torchmask.data.selection import (
    CAUSES,
    NO_TARGETS,
    OVER_LENGTH,
    TRUNCATE_SIDES,
    CutPolicy,
    Selection,
    select_fragments,
)
from torchmask.errors import ConfigError, WeightsError
from torchmask.messages import MaskFlag

__all__ = ["Pack", "PackedDataset", "Placement", "Plan", "plan_packs"]


@dataclass(frozen=True, eq=False)
class Pack:
    """One unpadded row of documents.

    Attributes:
        tokens: [T] int32.
        labels: [T] int32, the target of each slot inside its own document; `IGNORE_INDEX` where there is none.
        positions: [T] int32, distance from the start of the slot's document (or fragment).
        visible_until: [T] int32; a later slot q sees slot k iff `q < visible_until[k]`. The end of k's document, or
            k + 1 where nothing may see it.
        weights: [T] float32, weight of each slot's label (0 where there is none), or None: 1 for every label.
    """

    tokens: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    visible_until: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class Placement(NamedTuple):
    """Where a document (or a fragment of one) lies in a row: `tokens[start:stop]` of `sample` at slots `slot`...

    With `keeps_first` the first of these slots holds the document's first token in place of token `start`.
    """

    sample: int
    start: int
    stop: int
    slot: int
    keeps_first: bool = False


class PackedDataset(Sequence[Pack]):
    """Samples packed into rows; `dataset[i]` is a `Pack`, `dataset.report` the ledger.

    Args:
        samples: a `Samples`, or any sequence of `Sample` (copied into one, once).
        max_seq_len: slots of a row; None = the longest document.
        strategy: see `plan_packs`. `none` gives every document a row of its own; `split` lays the documents end to end
            and cuts them at row ends, so that no document is too long.
        over_length: a document longer than a row is an `error`, or `truncate` (no stop token is made up), `split` into
            fragments (a label is kept across the cut) or `drop` it.
        truncate_side: `right` removes the end, `left` what follows the first token (BOS).
        no_targets: documents without a trained token: `drop`, `keep` or `error`.
        trim_tail: leave out the tokens after a document's last target, which change no loss and no gradient.
        max_truncated_away: share of the documents that may lose all targets to truncation before it is an error.

    Raises:
        ConfigError: C06, C13, an option that does not exist or is out of range.
        DataError: D05 no samples, D09 a document too long or none left, D10 truncation takes too many documents'
            targets, D11 no document has any.

    >>> rows = PackedDataset([Sample([1, 11, 2], [0, 0, 0]), Sample([1, 21, 2], [0, 0, 0])], max_seq_len=8)
    >>> rows[0].labels.tolist(), rows[0].positions.tolist(), rows[0].visible_until.tolist()
    ([11, 2, -100, 21, 2, -100], [0, 1, 2, 0, 1, 2], [3, 3, 3, 6, 6, 6])
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        max_seq_len: int | None,
        strategy: str = "best_fit",
        over_length: str = "error",
        truncate_side: str = "right",
        no_targets: str = "drop",
        trim_tail: bool = False,
        max_truncated_away: float = 0.05,
    ) -> None:
        check_choice("packing strategy", strategy, STRATEGIES)
        check_choice("over_length", over_length, OVER_LENGTH)
        check_choice("truncate_side", truncate_side, TRUNCATE_SIDES)
        check_choice("no_targets", no_targets, NO_TARGETS)
        if max_seq_len is not None and max_seq_len < 1:
            raise ConfigError("C13", f"max_seq_len must be at least 1, got {max_seq_len}")
        self.samples = Samples.from_samples(samples)
        self.max_seq_len = max_seq_len or int(self.samples.lengths.max(initial=1))
        self.strategy = strategy
        policy = CutPolicy(
            over_length=over_length,
            truncate_side=truncate_side,
            no_targets=no_targets,
            trim_tail=trim_tail,
            max_truncated_away=max_truncated_away,
            stream=strategy == "split",
        )
        targets = Targets(self.samples)
        selection = select_fragments(self.samples, targets, max_seq_len=self.max_seq_len, policy=policy)
        fragments = selection.fragments
        # The stream's fragments fill their rows exactly when they are taken in order.
        plan = plan_packs(fragments.lengths, self.max_seq_len, "in_order" if policy.stream else strategy)
        options = {
            "max_seq_len": self.max_seq_len,
            "strategy": strategy,
            "over_length": over_length,
            "truncate_side": truncate_side,
            "no_targets": no_targets,
            "trim_tail": trim_tail,
        }
        num_targets = targets.count(fragments)
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None
        self.report: dict[str, Any] = _ledger(self.samples, targets, selection, len(plan), options)
        self._store(fragments, plan, num_targets)

    def _store(self, fragments: Fragments, plan: Plan, num_targets: npt.NDArray[np.int64]) -> None:
        """Fragments in the order of the rows, with what a row fetch needs of them."""
        self._rows = plan.offsets
        self._fragments = fragments.select(plan.order)
        self._begins = self.samples.offsets[self._fragments.samples] + self._fragments.starts
        self._slots = np.concatenate([[0], np.cumsum(self._fragments.lengths)])
        self._plain = not (fragments.continues.any() or fragments.keeps_first.any())
        self._hides = bool((self.samples.mask & np.uint8(MaskFlag.ATTENTION)).any())
        # Every row has a fragment, so reduceat, which cannot say 0, sees no empty range.
        self.row_targets: npt.NDArray[np.int64] = np.add.reduceat(num_targets[plan.order], plan.offsets[:-1])
        self.row_lengths: npt.NDArray[np.int64] = np.diff(self._slots[plan.offsets])
        self._slot_numbers = np.arange(int(self.row_lengths.max()) + 1)

    def __len__(self) -> int:
        return len(self._rows) - 1

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pack]: ...
    def __getitem__(self, index: int | slice) -> Pack | list[Pack]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(len(self))[index]]
        return self._row(range(len(self))[index])

    def _row(self, i: int) -> Pack:
        a, b = self._rows[i], self._rows[i + 1]
        edges = self._slots[a : b + 1] - self._slots[a]
        slots, ends, lengths = edges[:-1], edges[1:], np.diff(edges)
        numbers = self._slot_numbers[: edges[-1]]
        places = np.repeat(self._begins[a:b] - slots, lengths)  # [T], of each slot's token in the flat columns
        places += numbers
        heads = slots[:0] if self._plain else slots[self._fragments.keeps_first[a:b]]
        if len(heads):
            places[heads] = self.samples.offsets[self._fragments.samples[a:b][self._fragments.keeps_first[a:b]]]
        columns = self.samples
        tokens, flags = columns.tokens.take(places), columns.mask.take(places)
        weights = None if columns.weights is None else _shifted(columns.weights.take(places))
        # The shift: within a fragment the next slot holds the next token. What this says of last slots is wrong and
        # replaced below.
        labels, ignored = _shifted(tokens), _shifted((flags & np.uint8(MaskFlag.LOSS)) != 0)
        ignored[ends - 1] = True
        ignored[heads] = True
        if not self._plain:
            onward = ends[self._fragments.continues[a:b]] - 1
            following = places[onward] + 1
            labels[onward] = columns.tokens[following]
            ignored[onward] = (columns.mask[following] & np.uint8(MaskFlag.LOSS)) != 0
            if weights is not None and columns.weights is not None:
                weights[onward] = columns.weights[following]
        np.putmask(labels, ignored, IGNORE_INDEX)
        if weights is not None:
            np.putmask(weights, ignored, 0)
        visible_until = np.repeat(ends.astype(np.int32), lengths)
        if self._hides:
            hidden = (flags & np.uint8(MaskFlag.ATTENTION)) != 0
            np.copyto(visible_until, numbers + 1, where=hidden, casting="same_kind")
        positions = np.subtract(numbers, np.repeat(slots, lengths), dtype=np.int32, casting="same_kind")
        return Pack(tokens, labels, positions, visible_until, weights)

    def check_fits(self, *, vocab_size: int, max_seq_len: int, warn: Callable[[str], None]) -> None:
        """Whether a model can be trained on these rows.

        Args:
            vocab_size: embeddings the model has.
            max_seq_len: the longest sequence the model was made for; longer rows are told to `warn`.

        Raises:
            WeightsError: D15, an id the model has no embedding for: the tokenizer is another model's.
        """
        largest = int(self.samples.tokens.max())
        if largest >= vocab_size:
            raise WeightsError(
                "D15",
                f"the data has token id {largest}, the model has {vocab_size} embeddings",
                where="tokenizer",
                fix="use the tokenizer that belongs to the model",
            )
        longest = int(self._fragments.lengths.max())
        if longest > max_seq_len:
            warn(f"WARNING a document of {longest} tokens in a row; the model was made for {max_seq_len}")

    def documents(self, index: int) -> list[Placement]:
        """The documents of row `index` in the order of their slots."""
        i = range(len(self))[index]
        cut = slice(self._rows[i], self._rows[i + 1])
        part = self._fragments.select(np.arange(cut.start, cut.stop))
        slots = self._slots[cut] - self._slots[cut.start]
        columns = (part.samples, part.starts, part.stops, slots, part.keeps_first)
        return [Placement(*values) for values in zip(*(column.tolist() for column in columns))]

    def row_order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        """[R] int64, the permutation of the rows for an epoch: a pure function of (seed, epoch) and the row count.

        Rows are sorted by one raw 64-bit word each of a Philox generator seeded with (seed, epoch). NumPy guarantees
        that raw streams stay the same across versions, which it does not for `Generator.permutation`. So a place in
        the data is one integer, and any rank or later run finds it again.
        """
        if self._order is None or self._order[0] != (seed, epoch):  # every step of an epoch asks for it
            words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(len(self))
            self._order = (seed, epoch), np.argsort(words, kind="stable")
        return self._order[1]


def _shifted(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[T], each slot's right neighbour; the last slot, which has none, gets its own value."""
    result = np.empty_like(column)
    result[:-1] = column[1:]
    result[-1] = column[-1]
    return result


def _ledger(
    samples: Samples, targets: Targets, selection: Selection, num_rows: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The report of a selection: every token, weight and document of `samples` under one heading."""
    fragments, causes, lengths = selection.fragments, selection.causes, samples.lengths
    kept = causes == 0
    slots_of = np.bincount(fragments.samples, fragments.lengths, len(samples)).astype(np.int64)
    whole = Fragments.whole(lengths)
    weight_before, weight_after = targets.weight(whole), targets.weight(fragments)
    truncated = int((lengths - slots_of - selection.trimmed)[kept].sum())
    dropped, dropped_weight, documents = {}, {}, {}
    for code, cause in enumerate(CAUSES):
        lost = np.flatnonzero(causes == code)
        if code and len(lost):
            dropped[cause] = int(lengths[lost].sum())
            dropped_weight[cause] = float(weight_before[lost].sum())
            places = [samples.where(int(i)) for i in lost[:MAX_PLACES]]
            documents[cause] = {"count": len(lost), "places": places}
    if truncated:
        dropped["truncated"] = truncated
        dropped_weight["truncated"] = float(weight_before[kept].sum() - weight_after.sum())
    if trimmed := int(selection.trimmed[kept].sum()):
        dropped["trimmed"] = trimmed
    stops = samples.stops[fragments.samples].astype(np.int64)
    trained_stops = int(targets.holds(fragments, stops).sum())
    without_stop = int((samples.stops[kept] < 0).sum())
    num_cut = int(selection.cut.sum())
    num_documents = int(kept.sum())
    return build_report(
        options=options,
        lengths=lengths,
        counts={
            "documents": num_documents,
            "fragments": len(fragments),
            "rows": num_rows,
            "trained": int(targets.count(fragments).sum()),
            "slots": int(fragments.lengths.sum()),
        },
        dropped=dropped,
        dropped_documents=documents,
        weights={
            "before": float(weight_before.sum()),
            "after": float(weight_after.sum()),
            "dropped": dropped_weight,
        },
        eos={
            "trained_stops": trained_stops,
            "masked_stops": num_documents - trained_stops - without_stop - num_cut,
            "without_stop": without_stop,
            "cut": num_cut,
        },
        source=samples.report,
    )
