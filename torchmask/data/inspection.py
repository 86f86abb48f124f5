"""What a person or a program is told of documents and rows: the facts behind every view.

The terminal, the page, `--json`, `diff` and `snapshot` all show these, so that they cannot disagree.

Legend: n tokens of one document, T slots of one row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchmask.constants import IGNORE_INDEX
from torchmask.data.packing import Pack, PackedDataset, Placement
from torchmask.data.sample import Samples
from torchmask.messages import MaskFlag


@dataclass(frozen=True, eq=False)
class Document:
    """One document, target-aligned: entry i speaks of token i.

    Attributes:
        place: `file:row`.
        tokens: [n] int32.
        mask: [n] uint8 of `MaskFlag`.
        weights: [n] float32, what each token's loss is scaled by as a target; 0 where it is none.
        rules: [n] names of the rules that decided, or None where nobody said.
        stop: place of the token that ends the document; -1 = none.
    """

    place: str
    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32]
    rules: list[str] | None
    stop: int

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """[n] bool: the targets."""
        return self.weights != 0

    @property
    def hidden(self) -> npt.NDArray[np.bool_]:
        """[n] bool: tokens that later ones cannot attend to."""
        return (self.mask & np.uint8(MaskFlag.ATTENTION)) != 0


def look_at(samples: Samples, i: int) -> Document:
    """Document `i` of a store.

    >>> from torchmask.data.sample import Sample
    >>> document = look_at(Samples.from_samples([Sample([1, 5, 2], [0, 1, 0])]), 0)
    >>> document.weights.tolist(), document.rules
    ([0.0, 0.0, 1.0], None)
    """
    sample = samples[i]
    weights = np.ones(len(sample), np.float32) if sample.weights is None else sample.weights.copy()
    weights[~sample.trained] = 0
    weights[:1] = 0  # nothing predicts the first
    rules = None if sample.rules is None else [samples.rule_names[r] for r in sample.rules.tolist()]
    return Document(samples.where(i), sample.tokens, sample.mask, weights, rules, int(samples.stops[i]))


class Segment(NamedTuple):
    """A stretch of a row's slots that belongs to one place in its trees.

    A row without shared prefixes has one a document, all of depth 0. Where documents share a prefix, its slots are a
    segment of their own and what follows lies one deeper.

    Attributes:
        document: number of the placement in the row whose tokens these are.
        start, stop: its tokens `start:stop`.
        slot: of the first of them.
        depth: segments above this one on the way to the root.
        num_documents: documents of the row that these slots belong to.
    """

    document: int
    start: int
    stop: int
    slot: int
    depth: int
    num_documents: int


def segments_of(placements: Sequence[Placement]) -> list[Segment]:
    """The segments of a row in the order of its slots.

    >>> first, second = Placement(0, 0, 8, 0), Placement(1, 5, 9, 8)
    >>> second.parent = 0
    >>> [(s.document, s.start, s.stop, s.depth, s.num_documents) for s in segments_of([first, second])]
    [(0, 0, 5, 0, 2), (0, 5, 8, 1, 1), (1, 5, 9, 1, 1)]
    """
    forks: list[dict[int, int]] = [{} for _ in placements]  # of each document: token of a fork -> documents below it
    above = [placement.parent for placement in placements]
    below = [1] * len(placements)
    for i in reversed(range(len(placements))):  # children come after their parents
        if above[i] >= 0:
            at = placements[i].start
            forks[above[i]][at] = forks[above[i]].get(at, 0) + below[i]
            below[above[i]] += below[i]
    segments: list[Segment] = []
    depth_at: list[dict[int, int]] = [{} for _ in placements]  # of each document: token of a fork -> depth after it
    for i, placement in enumerate(placements):
        depth = depth_at[above[i]][placement.start] if above[i] >= 0 else 0
        begin, num_documents = placement.start, 1 + sum(forks[i].values())
        for at in sorted(forks[i]):
            if begin < at:
                segments.append(_segment(i, placement, begin, at, depth, num_documents))
                begin, depth = at, depth + 1
            depth_at[i][at] = depth
            num_documents -= forks[i][at]
        if begin < placement.stop:
            segments.append(_segment(i, placement, begin, placement.stop, depth, num_documents))
    return segments


def _segment(i: int, placement: Placement, begin: int, end: int, depth: int, num_documents: int) -> Segment:
    return Segment(i, begin, end, placement.slot + begin - placement.start, depth, num_documents)


class Slots(NamedTuple):
    """The slots of a segment, target-aligned.

    Attributes:
        tokens: [n] int32.
        weights: [n] float32, what each is scaled by as a target; 0 where it is none.
        hidden: [n] bool.
        rules: [n] names, or None.
        stop: place of the document's stop token among them; -1 = it is not here.
        next_label: what the last of them predicts beyond this segment; -1 = nothing.
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.bool_]
    rules: list[str] | None
    stop: int
    next_label: int


def slots_of(dataset: PackedDataset, pack: Pack, placement: Placement, segment: Segment) -> Slots:
    """What a row holds in the slots of a segment, as the labels of the slots before say it."""
    size, slot = segment.stop - segment.start, segment.slot
    document = look_at(dataset.samples, placement.sample)
    cut = slice(segment.start, segment.stop)
    own = np.arange(segment.start, segment.stop)
    begins = segment.start == placement.start
    if begins and placement.keeps_first:
        own[0] = 0
    labels = pack.labels[slot : slot + size]
    weights = np.zeros(size, np.float32)
    weights[1:] = _label_weights(pack, slot, slot + size - 1)
    if not begins:  # goes on where the segment before, of the same document, ends
        weights[0] = _label_weights(pack, slot - 1, slot)[0]
    elif placement.start and not placement.keeps_first and placement.parent < 0:
        weights[0] = document.weights[segment.start]  # predicted by the row that holds the fragment before
    last = int(labels[-1]) if segment.stop == placement.stop and labels[-1] != IGNORE_INDEX else -1
    return Slots(
        tokens=pack.tokens[slot : slot + size],
        weights=weights,
        hidden=document.hidden[own],
        rules=None if document.rules is None else [document.rules[k] for k in own.tolist()],
        stop=document.stop - segment.start if cut.start <= document.stop < cut.stop else -1,
        next_label=last,
    )


def _label_weights(pack: Pack, start: int, stop: int) -> npt.NDArray[np.float32]:
    """The weights of the labels of slots `start:stop`; 0 where there is no label."""
    trained = (pack.labels[start:stop] != IGNORE_INDEX).astype(np.float32)
    return trained if pack.weights is None else trained * pack.weights[start:stop]


def dead_rows(report: Mapping[str, Any]) -> list[tuple[str, int, list[str]]]:
    """(cause, how many, first places) of rows that teach nothing: skipped by the source, or left out of the packs."""
    found: dict[str, tuple[int, list[str]]] = {}
    for entries in (report["source"].get("skipped", {}), report["dropped_documents"]):
        for cause, entry in entries.items():
            count, places = found.get(cause, (0, []))
            found[cause] = count + entry["count"], [*places, *entry["places"]]
    return [(cause, count, places) for cause, (count, places) in found.items()]


# For programs


def document_line(samples: Samples, i: int) -> dict[str, Any]:
    """A document as one JSON object: `row`, `tokens`, `mask`, `weights` (null: 1 for every target), `rules`."""
    document = look_at(samples, i)
    return {
        "row": document.place,
        "tokens": document.tokens.tolist(),
        "mask": document.mask.tolist(),
        "weights": None if samples.weights is None else _floats(samples[i].weights),
        "rules": document.rules,
    }


def pack_line(dataset: PackedDataset, i: int) -> dict[str, Any]:
    """A packed row as one JSON object: the columns of `Pack`, and where its documents lie."""
    pack = dataset[i]
    columns = {name: _list(getattr(pack, name)) for name in ("tokens", "labels", "positions", "visible_until")}
    names = dataset.rule_names
    return {
        "row": i,
        **columns,
        "visible_from": _list(pack.visible_from),
        "weights": None if pack.weights is None else _floats(pack.weights),
        "rules": None if pack.rules is None else [names[r] for r in pack.rules.tolist()],
        "normalizer": pack.normalizer,
        "documents": [
            {
                "row": dataset.samples.where(placement.sample),
                "sample": placement.sample,
                "start": placement.start,
                "stop": placement.stop,
                "slot": placement.slot,
                "parent": placement.parent if placement.parent >= 0 else None,
            }
            for placement in dataset.documents(i)
        ],
    }


def _list(column: npt.NDArray[Any] | None) -> list[int] | None:
    return None if column is None else column.tolist()


def _floats(column: npt.NDArray[np.float32] | None) -> list[float] | None:
    """As short as the float32 allows: 0.1, not 0.10000000149011612."""
    return None if column is None else [float(str(w)) for w in column]


def chosen_documents(samples: Samples, rows: Sequence[str], count: int | None) -> Iterator[int]:
    """The documents to show: those of the named rows, else the first `count` (None = all).

    Args:
        rows: row numbers of the source, or `file:row` (the file's name is enough).
    """
    if rows:
        yield from (i for i in range(len(samples)) if any(_is_row(samples, i, row) for row in rows))
    else:
        yield from range(len(samples) if count is None else min(count, len(samples)))


def _is_row(samples: Samples, i: int, row: str) -> bool:
    if row.isdecimal():
        return int(samples.source_rows[i]) == int(row)
    place = samples.where(i)
    return place == row or place.replace("\\", "/").endswith("/" + row)
