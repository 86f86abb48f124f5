"""Pieces of documents as three integers and two flags, and where their targets are.

Decisions are made by index: labels belong to tokens of the unshifted document, so a cut never needs to know what was on
its other side, and no token's value is ever looked at. Nothing is copied here.

Legend: N samples, S tokens of all samples, F fragments.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from torchmask.data.sample import Samples
from torchmask.messages import MaskFlag

Integers = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Fragments:
    """Contiguous pieces of documents, in data order; usually one a document.

    Attributes:
        samples: [F] int64, the document.
        starts, stops: [F] int64, its tokens `starts:stops`, one slot each.
        continues: [F] bool, the last slot keeps the next token of the document as its label, although that token is in
            another fragment (edge E5) or has no slot at all (virtual EOS). Otherwise the last slot predicts nothing
            of its document (E6).
        keeps_first: [F] bool, cut on the left: the first slot holds the document's first token (BOS) instead of token
            `starts` and predicts nothing, because what followed it is gone.
        terminated: [F] bool, cut on the right: the last slot holds the document's stop token instead of its own.
    """

    samples: Integers
    starts: Integers
    stops: Integers
    continues: Bools
    keeps_first: Bools
    terminated: Bools

    @classmethod
    def whole(cls, lengths: Integers) -> "Fragments":
        """Every document of [N] lengths, uncut."""
        nowhere = np.zeros(len(lengths), bool)
        return cls(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths, nowhere, nowhere, nowhere)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> Integers:
        """[F] int64, slots each fragment takes."""
        return self.stops - self.starts

    def select(self, chosen: npt.NDArray[np.bool_] | Integers) -> "Fragments":
        """The fragments that a boolean or index array chooses."""
        return Fragments(
            self.samples[chosen],
            self.starts[chosen],
            self.stops[chosen],
            self.continues[chosen],
            self.keeps_first[chosen],
            self.terminated[chosen],
        )

    def cut(self, parents: Integers, starts: Integers, stops: Integers) -> "Fragments":
        """Pieces `starts:stops` (slots, [F'] int64 each) of the fragments `parents`."""
        whole = self.select(parents)
        return Fragments(
            samples=whole.samples,
            starts=whole.starts + starts,
            stops=whole.starts + stops,
            continues=np.where(stops < whole.lengths, True, whole.continues),
            keeps_first=whole.keeps_first & (starts == 0),
            terminated=whole.terminated & (stops == whole.lengths),
        )


class Targets:
    """Where the targets of all samples are; found once, so that any fragment's are counted by two look-ups.

    The edges of whole documents, which nearly all fragments have, are looked up by document. Only where a document was
    cut are the places of all targets listed and searched.

    Args:
        train_terminated: a stop token put in place of a trained token (`Fragments.terminated`) is a target, too.
    """

    def __init__(self, samples: Samples, *, train_terminated: bool = True) -> None:
        self._train_terminated = train_terminated
        self._samples, self._offsets = samples, samples.offsets
        full = samples.lengths > 0  # reduceat takes an empty document for one of one token
        counts = np.zeros(len(samples), np.int64)
        counts[full] = np.add.reduceat(self._trained(), self._offsets[:-1][full], dtype=np.int32)
        self._before = np.concatenate([[0], np.cumsum(counts)])  # targets before each document, and in all

    def _trained(self) -> Bools:
        """[S] bool: the tokens that are targets."""
        trained = (self._samples.mask & np.uint8(MaskFlag.LOSS)) == 0
        trained[self._offsets[:-1][self._samples.lengths > 0]] = False  # nothing predicts a document's first token
        return trained

    @cached_property
    def _places(self) -> Integers:
        """The targets, in the flat columns."""
        return np.flatnonzero(self._trained())

    @cached_property
    def _weight_before(self) -> npt.NDArray[np.float64] | None:
        """The weight of the targets before each target, and of all; None where every weight is 1."""
        if self._samples.weights is None:
            return None
        result = np.zeros(len(self._places) + 1)
        np.cumsum(self._samples.weights[self._places], dtype=np.float64, out=result[1:])
        return result

    def _bounds(self, fragments: Fragments) -> tuple[Integers, Integers]:
        """First and one past the last token that slots of each fragment predict, as places in their documents."""
        stops = fragments.stops + fragments.continues
        if not self._train_terminated:
            stops = stops - fragments.terminated
        return np.minimum(fragments.starts + 1 + fragments.keeps_first, stops), stops

    def _num_before(self, documents: Integers, places: Integers) -> Integers:
        """[F] int64, targets before place `places` of document `documents`, of all samples."""
        ends = places == self._offsets[documents + 1] - self._offsets[documents]
        result = self._before[documents + ends]
        inside = np.flatnonzero((places > 1) & ~ends)  # a document's first token is no target
        if len(inside):
            result[inside] = np.searchsorted(self._places, self._offsets[documents[inside]] + places[inside])
        return result

    def _range(self, fragments: Fragments) -> tuple[Integers, Integers]:
        """The same bounds as indexes into the list of targets."""
        starts, stops = self._bounds(fragments)
        return self._num_before(fragments.samples, starts), self._num_before(fragments.samples, stops)

    def count(self, fragments: Fragments) -> Integers:
        """[F] int64, targets of each fragment."""
        first, end = self._range(fragments)
        return end - first

    def weight(self, fragments: Fragments) -> npt.NDArray[np.float64]:
        """[F] float64, the sum of the weights of each fragment's targets."""
        if self._weight_before is None:
            return self.count(fragments).astype(np.float64)
        first, end = self._range(fragments)
        return self._weight_before[end] - self._weight_before[first]

    def holds(self, fragments: Fragments, tokens: Integers) -> Bools:
        """[F] bool: whether a slot of the fragment predicts token `tokens` ([F], place in its document, -1 = none)."""
        starts, stops = self._bounds(fragments)
        result = (tokens > 0) & (starts <= tokens) & (tokens < stops)
        places = self._offsets[fragments.samples[result]] + tokens[result]
        result[result] = (self._samples.mask[places] & np.uint8(MaskFlag.LOSS)) == 0
        return result

    def first(self, fragments: Fragments) -> Integers:
        """[F] int64, place in its document of each fragment's first target, for fragments that have one."""
        return self._places[self._range(fragments)[0]] - self._offsets[fragments.samples]

    def last(self, fragments: Fragments) -> Integers:
        """[F] int64, place in its document of each fragment's last target, for fragments that have one."""
        return self._places[self._range(fragments)[1] - 1] - self._offsets[fragments.samples]


def prompt_slots(samples: Samples, fragments: Fragments, targets: Targets) -> Integers:
    """[F] int64, how many first slots of each fragment are its document's prompt: tokens before its first target."""
    whole = Fragments.whole(samples.lengths)
    ends = samples.lengths.copy()
    some = targets.count(whole) > 0
    ends[some] = targets.first(whole.select(some))
    prompts = ends[fragments.samples]
    # Of a document that was cut on the left, what is left of it says where its prompt ends.
    some = targets.count(fragments) > 0
    prompts = np.where(fragments.keeps_first, fragments.stops, prompts)
    cut = fragments.keeps_first & some
    prompts[cut] = targets.first(fragments.select(cut))
    return np.clip(prompts - fragments.starts, 0, fragments.lengths)
