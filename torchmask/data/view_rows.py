"""The rows of the page that `torchmask.data.view` writes: strips, documents, tokens, and who sees whom."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from torchmask.constants import IGNORE_INDEX
from torchmask.data.inspection import Segment, Slots, segments_of, slots_of
from torchmask.data.packing import Pack, PackedDataset, Placement
from torchmask.data.readable import Readable
from torchmask.data.report import short_place

RolesOf = Callable[[int], list[str] | None]
"""Number of a sample -> the role of each of its tokens, or None."""

_MAX_BYTES = 900_000
_MAX_SEGMENT_TOKENS = 4096
_GOLDEN_ANGLE = 137.508
_LANE_HEIGHT = 7


def write_rows(
    dataset: PackedDataset,
    id_to_piece: Callable[[int], str],
    rows: Sequence[int],
    *,
    control: Mapping[int, str] | None = None,
    roles_of: RolesOf | None = None,
) -> tuple[str, int]:
    """The markup of the rows that fit on a page, and how many those are."""
    packs = [dataset[i] for i in rows]
    ids = {int(t) for pack in packs for column in (pack.tokens, pack.labels) for t in column if t >= 0}
    page = _Page(dataset, Readable(ids, id_to_piece, control), roles_of)
    sections: list[str] = []
    left = _MAX_BYTES
    for i, pack in zip(rows, packs):
        section, left = page.row(i, pack, left)
        sections.append(section)
        if left <= 0:
            break
    return "\n".join(sections), len(sections)


class _Page:
    """What all rows of a page need to be written."""

    def __init__(self, dataset: PackedDataset, read: Readable, roles_of: RolesOf | None) -> None:
        self._dataset, self._read = dataset, read
        self._roles_of: RolesOf = roles_of or (lambda sample: None)

    def row(self, i: int, pack: Pack, left: int) -> tuple[str, int]:
        """One row, with as many of its segments as the bytes left allow, and the bytes left after it."""
        dataset, placements = self._dataset, self._dataset.documents(i)
        segments = segments_of(placements)
        parts, trained = [], np.zeros(len(pack), bool)
        for shown, segment in enumerate(segments):
            slots = slots_of(dataset, pack, placements[segment.document], segment)
            trained[segment.slot : segment.slot + len(slots.tokens)] = slots.weights != 0
            if left > 0:
                parts.append(self._segment(pack, placements[segment.document], segment, slots))
                left -= len(parts[-1].encode())
                if left <= 0 and shown + 1 < len(segments):
                    parts.append(f'<div class="more">… {len(segments) - shown - 1:,} more in this row, not shown</div>')
        what = "fragment" if dataset.report["fragments"] > dataset.report["documents"] else "document"
        facts = (
            f"{len(pack):,} of {dataset.max_seq_len:,} slots · {len(placements):,} {what}{'s' * (len(placements) != 1)}"
            f" · {int((pack.labels != IGNORE_INDEX).sum()):,} targets"
        )
        strip = _strip(dataset.max_seq_len, segments, trained)
        head = f"<header><strong>Row {i}</strong><span>{facts}</span>{strip}</header>"
        data = f'data-until="{_runs(pack.visible_until.tolist())}" data-hues="{_hues(segments)}"'
        if pack.visible_from is not None:
            data += f' data-from="{_runs(pack.visible_from.tolist())}"'
        return f'<section class="row" {data}>{head}{"".join(parts)}{_ATTENTION}</section>', left

    def _segment(self, pack: Pack, placement: Placement, segment: Segment, slots: Slots) -> str:
        samples, size = self._dataset.samples, len(slots.tokens)
        tokens, weights = slots.tokens.tolist(), slots.weights.tolist()
        parts = [
            self._token(token, weights[k], hidden=bool(slots.hidden[k]), stop=k == slots.stop)
            for k, token in enumerate(tokens[:_MAX_SEGMENT_TOKENS])
        ]
        data = f'data-slot="{segment.slot}" data-position="{pack.positions[segment.slot]}" data-ids="{_words(tokens)}"'
        if samples.weights is not None:
            data += f' data-weights="{" ".join(f"{w:g}" for w in weights)}"'
        if slots.rules is not None:
            data += f' data-rules="{_runs(slots.rules)}"'
        roles = self._roles_of(placement.sample)
        if roles is not None:
            data += f' data-roles="{_runs(roles[segment.start : segment.stop])}"'
        if slots.next_label >= 0:
            data += f' data-next="{escape(self._next(pack, placement, slots.next_label))}"'
        more = f'<div class="more">… {size - len(parts):,} more tokens</div>' if size > len(parts) else ""
        shared = segment.num_documents > 1
        style = f"--hue:{_hue(segment.document)};--depth:{segment.depth}"
        return (
            f'<div class="doc{" shared" * shared}" style="{style}"><h4>{self._title(placement, segment, slots)}</h4>'
            f'<div class="tokens" {data}>{"".join(parts)}</div>{more}</div>'
        )

    def _token(self, token: int, weight: float, *, hidden: bool, stop: bool) -> str:
        names = " ".join(
            name
            for name, holds in zip(
                "echnm", (stop, not weight and token in self._read.control, hidden, weight < 0, weight > 1)
            )
            if holds
        )
        attributes = f' class="{names}"' if names else ""
        if weight not in (0, 1):
            attributes += f' style="--w:{_strength(weight)}"'
        tag = "b" if weight else "i"
        return f"<{tag}{attributes}>{escape(self._read.visible(token))}</{tag}>"

    def _title(self, placement: Placement, segment: Segment, slots: Slots) -> str:
        samples, size = self._dataset.samples, len(slots.tokens)
        whole = int(samples.lengths[placement.sample])
        part = f", tokens {segment.start:,} to {segment.stop - 1:,} of {whole:,}" if size < whole else ""
        trained = f", {int((slots.weights != 0).sum()):,} trained" if segment.num_documents == 1 else ""
        shared = f"<em>shared by {segment.num_documents:,} documents</em>" if segment.num_documents > 1 else ""
        place = escape(short_place(samples.where(placement.sample)))
        slots_text = f"slots {segment.slot:,} to {segment.slot + size - 1:,}"
        return f"{shared}<b>{place}</b> · {size:,} tokens{part}{trained} · {slots_text}"

    def _next(self, pack: Pack, placement: Placement, label: int) -> str:
        """What the last slot of a document predicts, and where that token is."""
        whole = int(self._dataset.samples.lengths[placement.sample])
        end = placement.slot + placement.stop - placement.start
        spelled = f"{label} “{self._read.visible(label).strip()}”"
        if placement.stop < whole and self._dataset.samples[placement.sample].tokens[placement.stop] == label:
            virtual = int(self._dataset.samples.stops[placement.sample]) == placement.stop
            return f"{spelled}, " + ("the stop token, which takes no slot" if virtual else "in the next fragment")
        following = end < len(pack) and int(pack.tokens[end]) == label
        return f"{spelled}, " + ("the next document's first" if following else "which takes no slot")


_ATTENTION = (
    '<details class="attention" hidden><summary>Who sees whom</summary><div class="plot"><canvas></canvas>'
    "<p>A line is a slot that looks, a column a slot that is looked at, both from the first to the last; coloured "
    "where attention is allowed, in the colour of the document looked at, grey for a shared prefix. Click a token to "
    "mark its line.<output></output></p></div></details>"
)


def _strip(width: int, segments: Sequence[Segment], trained: Any) -> str:
    """The whole row as a bar: a lane of documents for each depth of its trees, and one for what is trained."""
    gap = width / 800
    lanes = 1 + max(segment.depth for segment in segments)
    boxes = []
    for s in segments:
        name = "d shared" if s.num_documents > 1 else "d"
        box = f'x="{s.slot}" y="{s.depth}" width="{max(s.stop - s.start - gap, gap):.2f}" height=".9"'
        boxes.append(f'<rect class="{name}" style="--hue:{_hue(s.document)}" {box}/>')
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    for a, b in edges.reshape(-1, 2).tolist():
        boxes.append(f'<rect class="t" x="{a}" y="{lanes}" width="{max(b - a, gap):.2f}" height="1"/>')
    frame = f'viewBox="0 0 {width} {lanes + 1}" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="strip" style="height:{_LANE_HEIGHT * (lanes + 1)}px" {frame}>{"".join(boxes)}</svg>'


def _hue(document: int) -> int:
    return round(200 + document * _GOLDEN_ANGLE) % 360


def _hues(segments: Sequence[Segment]) -> str:
    """The hue of every slot, -1 for shared ones."""
    return _pairs((-1 if s.num_documents > 1 else _hue(s.document), s.stop - s.start) for s in segments)


def _runs(values: Iterable[Any]) -> str:
    """Equal neighbours as [value, count], in JSON fit for an attribute."""
    return _pairs((value, len(list(group))) for value, group in groupby(values))


def _pairs(pairs: Iterable[tuple[Any, int]]) -> str:
    return escape(json.dumps(list(pairs), separators=(",", ":")))


def _words(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _strength(weight: float) -> str:
    """How strongly a weight is coloured: never invisible, full from 1 on."""
    return f"{0.25 + 0.75 * min(abs(float(weight)), 1.0):.2f}"
