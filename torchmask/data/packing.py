"""Packs: rows of documents, shifted once, that a model sees as if each document were alone.

Legend: T slots of one row, N samples, F fragments, R rows.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol, Self, overload

import numpy as np
import numpy.typing as npt

from torchmask.constants import IGNORE_INDEX
from torchmask.data.cached_rows import kept_with_samples
from torchmask.data.edges import apply_stop_policy, boundaries, policy_of
from torchmask.data.eos import EosPolicy
from torchmask.data.fragments import Fragments, Targets, prompt_slots
from torchmask.data.layout import Layout, Pack, RowOptions
from torchmask.data.ledger import build_ledger
from torchmask.data.normalization import normalizers
from torchmask.data.pack_options import check_options
from torchmask.data.plan import Plan, cut_stream, plan_packs
from torchmask.data.prefix_sharing import TreePlan, plan_trees
from torchmask.data.sample import Sample, Samples
from torchmask.data.selection import CutPolicy, select_fragments
from torchmask.errors import ConfigError, DataError, WeightsError

__all__ = ["DocumentLoss", "Pack", "PackedDataset", "Placement", "Plan", "plan_packs"]


class _Place(NamedTuple):
    sample: int
    start: int
    stop: int
    slot: int
    keeps_first: bool = False


class Placement(_Place):
    """Where a document (or a fragment of one) lies in a row: `tokens[start:stop]` of `sample` at slots `slot`...

    With `keeps_first` the first of these slots holds the document's first token in place of token `start`. In a tree
    these are the document's own tokens; those before `start` lie in slots of the document `parent`, and of that one's
    parents (`PackedDataset.path` lists the slots of all).

    Attributes:
        parent: place in the row's list of documents; -1 = the document shares none of its tokens with an earlier one.
    """

    parent: int = -1


class DocumentLoss(NamedTuple):
    """What one document (or fragment) adds to a loss: `loss / num_targets` is its mean; fragments add up."""

    sample: int
    loss: float
    num_targets: int


class ModelFacts(Protocol):
    """What a `DecoderSpec` says of the rows that its model can take."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def learned_positions(self) -> bool: ...
    @property
    def rope_changes_after(self) -> int | None: ...


class PackedDataset(Sequence[Pack]):
    """Samples packed into rows; `dataset[i]` is a `Pack`, `dataset.report` the ledger.

    Args:
        samples: a `Samples`, or any sequence of `Sample` (copied into one, once).
        max_seq_len: slots of a row; None = the longest document.
        strategy: see `plan_packs`. `none` gives every document a row of its own; `split` lays the documents end to end
            and cuts them at row ends, so that no document is too long.
        share_prefixes: documents that begin with the same untrained tokens become trees in which these take slots
            once. Losses and gradients are those of the separate documents. Rows gather documents that begin alike, so
            that the documents of one step are less diverse than those of a flat plan; `max_share` bounds it.
        max_share: with `share_prefixes`, at most so many documents of one prefix in a row, see `plan_trees`.
        attention: `document` = each sees itself only, `causal` = a row is one text.
        positions: `reset` = distances from each document's start, `continue` = from the row's.
        prefix: `bidirectional` = the tokens of a document's untrained prompt see each other both ways (prefix-LM).
        eos: what is done at the edges of documents, see `policy_of` and, for samples that no tokenizer made,
            `apply_stop_policy`.
        loss_normalization: what a step's loss is divided by, as `Pack.normalizer`: `tokens` (labels whose weight is not
            0), `weights` (their sum), `sequence` (documents, each one's labels scaled to its mean), `none` (1: rows say
            0, and a step whose sum is 0 divides by nothing).
        over_length: a document longer than a row is an `error`, or `truncate`, `split` into fragments (a label is kept
            across the cut) or `drop` it.
        truncate_side: `right` removes the end (`eos.on_truncate` says what becomes of the stop token), `left` what
            follows the first token (BOS).
        no_targets: documents without a trained token: `drop`, `keep` or `error`.
        trim_tail: leave out the tokens after the last target of a document, and of each piece of a split one, which
            change no loss and no gradient; pieces without a target go whole.
        max_truncated_away: share of the documents that may lose all targets to truncation before it is an error.
        epoch_repack: `for_epoch` plans the rows of later epochs anew, from a shuffled order; there are as many.

    Attributes:
        row_lengths: [R] int64, slots of each row.
        row_targets: [R] int64, labels of each row that are trained.
        rule_names: what `Pack.rules` points into.

    Raises:
        ConfigError: C06, C13, an option that does not exist or is out of range; C09, options that contradict.
        DataError: D05 no samples, D09 a document too long or none left, D10 truncation takes too many documents'
            targets, D11 no document has any.

    >>> rows = PackedDataset([Sample([1, 11, 2], [0, 0, 0]), Sample([1, 21, 2], [0, 0, 0])], max_seq_len=8)
    >>> rows[0].labels.tolist(), rows[0].positions.tolist(), rows[0].visible_until.tolist()
    ([11, 2, -100, 21, 2, -100], [0, 1, 2, 0, 1, 2], [3, 3, 3, 6, 6, 6])
    """

    @kept_with_samples
    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        max_seq_len: int | None,
        strategy: str = "best_fit",
        share_prefixes: bool = False,
        max_share: int | None = None,
        attention: str = "document",
        positions: str = "reset",
        prefix: str = "causal",
        eos: EosPolicy | str | Mapping[str, Any] | None = None,
        loss_normalization: str = "tokens",
        over_length: str = "error",
        truncate_side: str = "right",
        no_targets: str = "drop",
        trim_tail: bool = False,
        max_truncated_away: float = 0.05,
        epoch_repack: bool = False,
    ) -> None:
        self.samples = Samples.from_samples(samples)
        policy = policy_of(eos, self.samples)
        options: dict[str, Any] = {
            "max_seq_len": max_seq_len,
            "strategy": strategy,
            "share_prefixes": share_prefixes,
            "max_share": max_share,
            "attention": attention,
            "positions": positions,
            "prefix": prefix,
            "loss_normalization": loss_normalization,
            "over_length": over_length,
            "truncate_side": truncate_side,
            "no_targets": no_targets,
            "trim_tail": trim_tail,
            "epoch_repack": epoch_repack,
        }
        check_options(options, policy)
        self.samples = apply_stop_policy(self.samples, policy)
        self.max_seq_len = options["max_seq_len"] = max_seq_len or int(self.samples.lengths.max(initial=1))
        self.strategy, self.eos, self._options = strategy, policy, options
        self._trains_boundary = policy.boundary_loss == "train" and policy.boundary_weight != 0
        self.rule_names = self.samples.rule_names + (("boundary",) if self._trains_boundary else ())
        self._targets = Targets(self.samples, train_terminated=policy.train_on_eos != "none")
        selection = select_fragments(
            self.samples,
            self._targets,
            max_seq_len=self.max_seq_len,
            policy=CutPolicy(
                over_length=over_length,
                truncate_side=truncate_side,
                no_targets=no_targets,
                trim_tail=trim_tail,
                max_truncated_away=max_truncated_away,
                stream=strategy == "split",
                virtual_stops=policy.append == "virtual",
                on_truncate=policy.on_truncate,
            ),
        )
        self._uncut = selection.uncut if epoch_repack else None
        self._epoch: tuple[tuple[int, int], Self] | None = None
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None
        self._lay_out(selection.fragments)
        self.report: dict[str, Any] = build_ledger(
            self.samples,
            self._targets,
            selection,
            options={**options, "eos_policy": asdict(policy)},
            num_rows=len(self),
            num_slots=int(self.row_lengths.sum()),
            num_boundaries=self._num_boundaries,
        )

    def _lay_out(self, fragments: Fragments, words: npt.NDArray[np.uint64] | None = None) -> None:
        """Plans the rows of the fragments, in their order or that of random words, with what a fetch needs of them."""
        options, targets, samples = self._options, self._targets, self.samples
        if options["strategy"] == "split" and words is not None:
            fragments = fragments.select(np.argsort(words, kind="stable"))
            fragments = fragments.cut(*cut_stream(fragments.lengths, self.max_seq_len))
        plan, shared = self._plan(fragments, words)
        placed = fragments.select(plan.order)
        boundary = boundaries(samples, placed, plan.offsets) if self._trains_boundary else np.zeros(len(placed), bool)
        self._boundary, self._num_boundaries = boundary, int(boundary.sum())
        counts = targets.count(placed)
        share, self._scale = normalizers(
            options["loss_normalization"],
            documents=placed.samples,
            counts=counts,
            weights=targets.weight(placed),
            boundary=boundary.astype(np.float64) * self.eos.boundary_weight,
        )
        first = plan.offsets[:-1]  # every row has a fragment, so reduceat, which cannot say 0, sees no empty range
        self.row_targets: npt.NDArray[np.int64] = np.add.reduceat(counts + boundary, first)
        self._layout = Layout(
            samples,
            fragments,
            plan,
            options=RowOptions(
                attention=options["attention"],
                positions=options["positions"],
                mutes_terminated=self.eos.train_on_eos == "none",
                boundary_weight=self.eos.boundary_weight,
                boundary_rule=len(samples.rule_names),
            ),
            shared=shared,
            boundary=boundary,
            prompts=prompt_slots(samples, placed, targets) if options["prefix"] == "bidirectional" else None,
            scale=self._scale,
            normalizers=np.add.reduceat(share, first),
        )
        self.row_lengths: npt.NDArray[np.int64] = self._layout.row_lengths

    def _plan(
        self, fragments: Fragments, words: npt.NDArray[np.uint64] | None
    ) -> tuple[Plan, npt.NDArray[np.int64] | None]:
        """The rows, and for trees what each fragment shares ([F] int64)."""
        if self._options["share_prefixes"]:
            trees: TreePlan = plan_trees(
                self.samples,
                fragments,
                self._targets,
                max_seq_len=self.max_seq_len,
                strategy=self.strategy,
                max_share=self._options["max_share"],
                words=words,
            )
            return trees.plan, trees.shared
        if self.strategy == "split":
            # The stream's fragments fill their rows exactly when they are taken in order.
            return plan_packs(fragments.lengths, self.max_seq_len, "in_order"), None
        if words is None:
            return plan_packs(fragments.lengths, self.max_seq_len, self.strategy), None
        shuffled = np.argsort(words, kind="stable")
        plan = plan_packs(fragments.lengths[shuffled], self.max_seq_len, self.strategy)
        return Plan(shuffled[plan.order], plan.offsets), None

    def __len__(self) -> int:
        return len(self._layout.rows) - 1

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pack]: ...
    def __getitem__(self, index: int | slice) -> Pack | list[Pack]:
        if isinstance(index, slice):
            return [self._layout.fetch(i) for i in range(len(self))[index]]
        return self._layout.fetch(range(len(self))[index])

    def check_fits(self, model: "ModelFacts", *, warn: Callable[[str], None]) -> None:
        """Whether a model can be trained on these rows.

        Args:
            model: its `DecoderSpec`.
            warn: told of documents that are longer than the model was made for.

        Raises:
            WeightsError: D15, an id the model has no embedding for: the tokenizer is another model's.
            DataError: D09, a document longer than the model's learned positions.
            ConfigError: C09, documents share prefixes that a model would rotate by their different lengths.
        """
        largest = self.samples.largest_token
        if largest >= model.vocab_size:
            raise WeightsError(
                "D15",
                f"the data has token id {largest}, the model has {model.vocab_size} embeddings",
                where="tokenizer",
                fix="use the tokenizer that belongs to the model, or add_tokens for tokens of your own",
            )
        continues = self._options["positions"] == "continue"
        longest = int((self.row_lengths if continues else self._layout.fragments.lengths).max())
        limit = model.rope_changes_after
        if limit is not None and longest > limit and self._options["share_prefixes"]:
            raise ConfigError(
                "C09",
                f"share_prefixes with a document of {longest} tokens: beyond {limit} this model's positions rotate by "
                "the length of the document, so a prefix is not the same in all of them",
                where="packing",
                fix=f"set over_length with max_seq_len: {limit}, or share_prefixes: false",
            )
        if longest <= model.max_seq_len:
            return
        what = f"positions {longest}" if continues else f"a document of {longest} tokens"
        if model.learned_positions:
            message = f"{what} in a row; the model has learned {model.max_seq_len} positions"
            raise DataError(
                "D09", message, where="packing", fix=f"set over_length with max_seq_len: {model.max_seq_len}"
            )
        warn(f"WARNING {what} in a row; the model was made for {model.max_seq_len}")

    def documents(self, index: int) -> list[Placement]:
        """The documents of row `index` in the order of their slots."""
        i = range(len(self))[index]
        layout = self._layout
        a, b = int(layout.rows[i]), int(layout.rows[i + 1])
        part = layout.fragments.select(np.arange(a, b))
        slots = layout.slots[a:b] - layout.slots[a]
        columns = (part.samples, layout.starts[a:b], part.stops, slots, part.keeps_first)
        placements = [Placement(*values) for values in zip(*(column.tolist() for column in columns))]
        for f, placement in enumerate(placements, a):
            parent = layout.parent(f)
            placement.parent = parent - a if parent >= 0 else -1
        return placements

    @property
    def packed_samples(self) -> npt.NDArray[np.int64]:
        """[n] int64, the samples that have a place in some row, in data order."""
        return np.unique(self._layout.fragments.samples)

    def path(self, index: int, document: int) -> npt.NDArray[np.int64]:
        """[n] int64, the slots of all tokens of a document of row `index`: those it shares, then its own.

        Args:
            document: its place in `documents(index)`.
        """
        i = range(len(self))[index]
        a, b = int(self._layout.rows[i]), int(self._layout.rows[i + 1])
        return self._layout.path(range(a, b)[document])

    def document_losses(self, index: int, nll: npt.ArrayLike) -> list[DocumentLoss]:
        """The loss of each document of row `index`, in the order of `documents(index)`.

        It is the sum of weight times nll over the document's own targets, the same in any row and alone; predictions
        of a next document's first token belong to none. Where `loss_normalization` scales weights, this does not.

        Args:
            nll: [T] negative log likelihoods of the row's labels; what stands at slots without a label is not read.
        """
        i = range(len(self))[index]
        a, b = int(self._layout.rows[i]), int(self._layout.rows[i + 1])
        pack = self._layout.fetch(i)
        weights = (pack.labels != IGNORE_INDEX).astype(np.float64) if pack.weights is None else pack.weights
        slots = self._layout.slots[a : b + 1] - self._layout.slots[a]
        trained = (pack.labels != IGNORE_INDEX) & (weights != 0)
        trained[slots[1:][self._boundary[a:b]] - 1] = False
        own = np.where(trained, np.asarray(nll, np.float64)[: len(pack)] * weights, 0.0)
        sums, counts = np.add.reduceat(own, slots[:-1]), np.add.reduceat(trained.astype(np.int64), slots[:-1])
        if self._scale is not None:
            sums = sums / self._scale[a:b]
        of = self._layout.fragments.samples[a:b]
        return [DocumentLoss(*values) for values in zip(of.tolist(), sums.tolist(), counts.tolist())]

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

    def for_epoch(self, epoch: int, seed: int) -> Self:
        """The rows of an epoch: these, or with `epoch_repack` those of a plan from an order shuffled by (seed, epoch).

        Epoch 0 has the rows that the report describes. Every epoch has as many rows, and `row_order` is the same, so a
        place in the data stays one integer: row `row_order(epoch, seed)[n]` of `for_epoch(epoch, seed)`. With
        `max_share` the documents of one prefix that share a row stay together. Samples are not copied; one epoch's
        plan is kept.
        """
        if self._uncut is None or epoch == 0:
            return self
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            view = copy(self)
            view._epoch = None
            words = np.random.Philox(np.random.SeedSequence((seed, epoch, 1))).random_raw(len(self._uncut))
            view._lay_out(self._uncut, words)
            assert len(view) == len(self), "a plan's rows must depend on the lengths only"
            self._epoch = (seed, epoch), view
        return self._epoch[1]
