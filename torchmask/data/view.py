"""The first packs as one self-contained HTML page: what is trained, what is context, and the ledger.

The text is plain markup that any browser or mail reader shows; a few lines of script add what a token says of itself
when it is pointed at, from one list of ids a document, so that a page of thousands of tokens stays small. Everything
that comes from the data is escaped, nothing is loaded from anywhere, and the page's own policy forbids other scripts.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask import __version__
from torchmask.constants import IGNORE_INDEX
from torchmask.data.packing import Pack, PackedDataset, Placement
from torchmask.data.report import short_place
from torchmask.messages import MaskFlag

_MAX_BYTES = 900_000
_MAX_DOCUMENT_TOKENS = 4096
_WHITE = str.maketrans({"\n": "⏎\n", "\t": "⇥\t", "\r": "␍", "\u00a0": "⍽"})


def write_masks_html(
    path: str | os.PathLike[str],
    dataset: PackedDataset,
    id_to_piece: Callable[[int], str],
    *,
    num_rows: int = 8,
    title: str = "What the model learns from",
) -> None:
    """Writes a page that shows the first rows of a data set, token by token, and its ledger; below 1 MB.

    Args:
        path: the file to write, such as `masks.html`.
        dataset: the rows and their report.
        id_to_piece: a tokenizer's spelling of an id (`▁the`, `Ġthe`, `<0x0A>` and plain text are understood).
        num_rows: rows to show; fewer where the page would grow too large.
        title: the page's heading.
    """
    rows, shown = _rows(dataset, id_to_piece, min(num_rows, len(dataset)))
    script = _resource("view_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    report = dataset.report
    heading = f"Row 0 of {len(dataset):,}" if shown == 1 else f"Rows 0 to {shown - 1} of {len(dataset):,}"
    hides = bool((dataset.samples.mask & np.uint8(MaskFlag.ATTENTION)).any())
    hidden = '<span><span class="tokens"><i class="h">hidden</i></span> later tokens cannot see it</span>'
    values = {
        "title": escape(title),
        "version": escape(__version__),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "lead": _lead(report),
        "share": _share(report),
        "tiles": _tiles(report),
        "ledger": _ledger_table(report),
        "histogram": _histogram(report),
        "rows_heading": heading,
        "legend_extra": hidden if hides else "",
        "rows": rows,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _resource("view_page.html"))
    Path(path).write_text(page, encoding="utf-8")


def _resource(name: str) -> str:
    return files("torchmask.data").joinpath(name).read_text(encoding="utf-8")


# The ledger


def _lead(report: dict[str, Any]) -> str:
    share = 100 * report["trained"] / max(report["tokens_in"], 1)
    packs = "one document a row" if report["strategy"] == "none" else f"{100 * report['fill']:.1f} % filled"
    return (
        f"<strong>{share:.1f} %</strong> of {report['tokens_in']:,} tokens are trained: the highlighted ones below. "
        f"{report['documents']:,} documents lie in {report['rows']:,} rows of up to {report['max_seq_len']:,} slots, "
        f"{packs}; no document sees another."
    )


def _parts(report: dict[str, Any]) -> list[tuple[str, str, int]]:
    """(css name, words, tokens) of every line of the ledger."""
    parts = [("trained", "trained", report["trained"]), ("masked", "context, not learned", report["masked"])]
    return parts + [("dropped", f"dropped: {cause}", count) for cause, count in report["dropped"].items()]


def _share(report: dict[str, Any]) -> str:
    bars = "".join(
        f'<span class="bg-{kind}" style="flex:{count}" title="{escape(name)}: {count:,} tokens"></span>'
        for kind, name, count in _parts(report)
        if count
    )
    return f'<div class="share">{bars}</div>'


def _tiles(report: dict[str, Any]) -> str:
    eos = report["eos"]
    tiles = [
        ("documents", f"{report['documents']:,}"),
        ("rows", f"{report['rows']:,}"),
        ("fill", f"{100 * report['fill']:.2f} %"),
        ("trained tokens", f"{report['trained']:,}"),
        ("trained stops", f"{100 * eos['trained_stops'] / max(eos['documents'], 1):.1f} %"),
    ]
    return '<dl class="tiles">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles) + "</dl>"


def _ledger_table(report: dict[str, Any]) -> str:
    lines = []
    for kind, name, count in _parts(report):
        entry = report["dropped_documents"].get(name.removeprefix("dropped: "))
        note = ""
        if entry:
            places = ", ".join(short_place(place) for place in entry["places"][:5]) + (
                ", …" if entry["count"] > 5 else ""
            )
            noun = "document" if entry["count"] == 1 else "documents"
            note = f"<small>{entry['count']:,} {noun}: {escape(places)}</small>"
        dot = f'<span class="dot bg-{kind}"></span>'
        share = 100 * count / max(report["tokens_in"], 1)
        label = f"<td>{dot}{escape(name)}{note}</td>"
        lines.append(f'<tr>{label}<td class="n">{count:,}</td><td class="n">{share:.2f} %</td></tr>')
    total = f'<tr class="sum"><td>tokens in</td><td class="n">{report["tokens_in"]:,}</td><td class="n"></td></tr>'
    return f"<table>{''.join(lines)}{total}</table>"


def _histogram(report: dict[str, Any]) -> str:
    bins = report["lengths"]["histogram"]
    most = max((count for *_, count in bins), default=1)
    lines = "".join(
        f'<b>{low:,}–{high - 1:,}</b><i style="width:{max(100 * count / most, 0.5):.1f}%"></i><span>{count:,}</span>'
        for low, high, count in bins
    )
    return f'<div class="bars">{lines}</div>'


# The rows


def _rows(dataset: PackedDataset, id_to_piece: Callable[[int], str], count: int) -> tuple[str, int]:
    """The markup of the first rows that fit on the page, and how many those are."""
    packs = [dataset[i] for i in range(count)]
    texts = _readable({int(t) for pack in packs for t in pack.tokens}, id_to_piece)
    sections: list[str] = []
    left = _MAX_BYTES
    for i, pack in enumerate(packs):
        section, left = _row(dataset, i, pack, texts, left)
        sections.append(section)
        if left <= 0:
            break
    return "\n".join(sections), len(sections)


def _row(dataset: PackedDataset, i: int, pack: Pack, texts: dict[int, str], left: int) -> tuple[str, int]:
    """One row, with as many of its documents as the bytes left allow, and the bytes left after it."""
    placements = dataset.documents(i)
    what = "fragment" if dataset.report["fragments"] > dataset.report["documents"] else "document"
    documents = []
    for shown, placement in enumerate(placements):
        if left <= 0:
            documents.append(f'<div class="more">… {len(placements) - shown:,} more in this row, not shown</div>')
            break
        documents.append(_document(dataset, pack, placement, texts))
        left -= len(documents[-1].encode())
    targets = int((pack.labels != IGNORE_INDEX).sum())
    facts = (
        f"{len(pack):,} of {dataset.max_seq_len:,} slots · {len(placements):,} {what}{'s' * (len(placements) != 1)} · "
        f"{targets:,} targets"
    )
    head = f"<header><strong>Row {i}</strong><span>{facts}</span>{_strip(dataset, pack, placements)}</header>"
    return f'<section class="row">{head}{"".join(documents)}</section>', left


def _strip(dataset: PackedDataset, pack: Pack, placements: Sequence[Placement]) -> str:
    """The whole row as a bar: a box for each document, trained stretches in colour."""
    width = dataset.max_seq_len
    gap = width / 800
    boxes = [
        f'<rect class="d" x="{p.slot}" width="{max(p.stop - p.start - gap, gap):.2f}" height="1"/>' for p in placements
    ]
    trained = np.concatenate([[False], *(_as_targets(dataset, pack, p)[0] for p in placements), [False]])
    runs = np.flatnonzero(np.diff(trained)).reshape(-1, 2).tolist()
    boxes += [f'<rect class="t" x="{a}" width="{max(b - a, gap):.2f}" height="1"/>' for a, b in runs]
    frame = f'viewBox="0 0 {width} 1" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="strip" {frame}>{"".join(boxes)}</svg>'


def _document(dataset: PackedDataset, pack: Pack, placement: Placement, texts: dict[int, str]) -> str:
    samples, slot, size = dataset.samples, placement.slot, placement.stop - placement.start
    cut = slice(slot, slot + size)
    tokens, trained, weights = pack.tokens[cut], *_as_targets(dataset, pack, placement)
    flags = samples[placement.sample].mask[placement.start : placement.stop].copy()
    if placement.keeps_first:
        flags[0] = samples[placement.sample].mask[0]
    stop = int(samples.stops[placement.sample]) - placement.start
    parts = []
    for k, token in enumerate(tokens[:_MAX_DOCUMENT_TOKENS].tolist()):
        names = "e" * (k == stop) + " h" * bool(flags[k] & MaskFlag.ATTENTION)
        style = f' style="--w:{_strength(weights[k])}"' if trained[k] and weights[k] != 1 else ""
        attributes = (f' class="{names.strip()}"' if names else "") + style
        tag = "b" if trained[k] else "i"
        parts.append(f"<{tag}{attributes}>{escape(texts[token])}</{tag}>")
    data = f'data-slot="{slot}" data-ids="{" ".join(map(str, tokens.tolist()))}"'
    if samples.weights is not None:
        data += f' data-weights="{" ".join(f"{w:g}" for w in weights)}"'
    if pack.labels[slot + size - 1] != IGNORE_INDEX:
        data += f' data-next="{pack.labels[slot + size - 1]}, in the next fragment"'
    whole = int(samples.lengths[placement.sample])
    part = f", tokens {placement.start:,} to {placement.stop - 1:,} of {whole:,}" if size < whole else ""
    facts = f"{size:,} tokens{part}, {int(trained.sum()):,} trained · slots {slot:,} to {slot + size - 1:,}"
    more = f'<div class="more">… {size - len(parts):,} more tokens</div>' if size > len(parts) else ""
    return (
        f'<div class="doc"><h4><b>{escape(short_place(samples.where(placement.sample)))}</b> · {facts}</h4>'
        f'<div class="tokens" {data}>{"".join(parts)}</div>{more}</div>'
    )


def _as_targets(
    dataset: PackedDataset, pack: Pack, placement: Placement
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """(trained, weight) of each token of a document, read from the labels one slot before it."""
    slot, size = placement.slot, placement.stop - placement.start
    trained, weights = np.zeros(size, bool), np.zeros(size, np.float32)
    trained[1:] = pack.labels[slot : slot + size - 1] != IGNORE_INDEX
    weights[1:] = trained[1:] if pack.weights is None else pack.weights[slot : slot + size - 1]
    if placement.start and not placement.keeps_first:  # a later fragment: the last slot of the one before predicts it
        sample = dataset.samples[placement.sample]
        trained[0] = sample.trained[placement.start]
        weights[0] = trained[0] * (1 if sample.weights is None else sample.weights[placement.start])
    return trained, weights


def _strength(weight: float) -> str:
    """How strongly a weight is coloured: never invisible, full from 1 on."""
    return f"{0.25 + 0.75 * min(abs(float(weight)), 1.0):.2f}"


# Pieces


def _readable(ids: Iterable[int], id_to_piece: Callable[[int], str]) -> dict[int, str]:
    """The text of each id as a person should see it: real spaces, and visible marks for other white space.

    Vocabularies spell white space and bytes in one of three ways; which one shows in the pieces themselves.
    """
    pieces = {i: id_to_piece(i) for i in sorted(ids)}
    everything = "".join(pieces.values())
    if "▁" in everything:
        texts = {i: _sentencepiece_text(piece) for i, piece in pieces.items()}
    elif "Ġ" in everything or "Ċ" in everything:
        characters = _byte_characters()
        texts = {i: _byte_level_text(piece, characters) for i, piece in pieces.items()}
    else:
        texts = pieces
    return {i: _visible(text) for i, text in texts.items()}


def _sentencepiece_text(piece: str) -> str:
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    if match and int(match[1], 16) < 128:
        return chr(int(match[1], 16))
    return piece.replace("▁", " ")


def _byte_level_text(piece: str, characters: dict[str, int]) -> str:
    if not all(c in characters for c in piece):
        return piece  # a control token, spelled as it is
    return bytes(characters[c] for c in piece).decode(errors="backslashreplace")


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte: itself if printable, else one from 256 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _visible(text: str) -> str:
    """White space that would not be seen gets a mark; a line break keeps breaking the line after its mark.

    >>> [_visible(t) for t in (" the", "  ", "\\n", "")]
    [' the', '␣␣', '⏎\\n', '∅']
    """
    if not text:
        return "∅"
    if text.strip(" ") == "":
        return "␣" * len(text)
    return "".join(c if c.isprintable() or c in "\n\t\r\u00a0" else f"\\x{ord(c):02x}" for c in text).translate(_WHITE)
