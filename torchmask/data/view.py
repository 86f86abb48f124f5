"""A data set as one self-contained HTML page: what is trained, what is seen, and the ledger.

The text is plain markup that any browser or mail reader shows; a script adds what a token says of itself when it is
pointed at, the toggles and the attention pictures, from a few lists for each stretch of tokens, so that a page of
thousands of tokens stays small. Everything that comes from the data is escaped, nothing is loaded from anywhere, and
the page's own policy forbids other scripts. `torchmask.data.view_rows` writes the rows.
"""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from torchmask import __version__
from torchmask.data.inspection import dead_rows
from torchmask.data.packing import PackedDataset
from torchmask.data.report import short_place
from torchmask.data.view_rows import RolesOf, write_rows
from torchmask.messages import MaskFlag

_TOGGLES = (
    ("ids", "ids", False),
    ("even", "weights", True),
    ("no-hidden", "hidden tokens", True),
    ("only", "trained only", False),
    ("sight", "what a clicked token sees", False),
)
"""(class of the page's body, words, whether the box is ticked at first and takes the class away)."""


def write_masks_html(
    path: str | os.PathLike[str],
    dataset: PackedDataset,
    id_to_piece: Callable[[int], str],
    *,
    num_rows: int = 8,
    rows: Sequence[int] | None = None,
    title: str = "What the model learns from",
    control: Mapping[int, str] | None = None,
    roles_of: RolesOf | None = None,
    config: str = "",
) -> None:
    """Writes a page that shows rows of a data set, token by token, and its ledger; below 1 MB.

    Args:
        path: the file to write, such as `masks.html`.
        dataset: the rows and their report.
        id_to_piece: a tokenizer's spelling of an id (`▁the`, `Ġthe`, `<0x0A>` and plain text are understood).
        num_rows: rows to show, the first ones; fewer where the page would grow too large.
        rows: numbers of the rows to show in place of the first.
        title: the page's heading.
        control: the texts of control tokens by id.
        roles_of: number of a sample -> the role of each of its tokens, or None where it is not known.
        config: name of the configuration, for the last line.
    """
    chosen = list(range(min(num_rows, len(dataset)))) if rows is None else list(rows)
    markup, shown = write_rows(dataset, id_to_piece, chosen, control=control, roles_of=roles_of)
    script = _resource("view_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    report = dataset.report
    hides = bool((dataset.samples.mask & np.uint8(MaskFlag.ATTENTION)).any())
    values = {
        "title": escape(title),
        "version": escape(__version__),
        "config": f" from {escape(config)}" if config else "",
        "script": script,
        "script_hash": f"sha256-{digest}",
        "lead": _lead(report),
        "share": _share(report),
        "tiles": _tiles(report),
        "ledger": _ledger_table(report),
        "histogram": _histogram(report),
        "dead": _dead_rows(report),
        "rows_heading": _heading(chosen[:shown], len(dataset)),
        "legend_extra": _legend_extra(dataset, hides=hides),
        "toggles": _toggles(hides=hides, weighted=dataset.samples.weights is not None),
        "rows": markup,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _resource("view_page.html"))
    Path(path).write_text(page, encoding="utf-8")


def _resource(name: str) -> str:
    return files("torchmask.data").joinpath(name).read_text(encoding="utf-8")


def _heading(shown: Sequence[int], total: int) -> str:
    if len(shown) == 1:
        return f"Row {shown[0]} of {total:,}"
    if shown == list(range(len(shown))):
        return f"Rows 0 to {len(shown) - 1} of {total:,}"
    return f"Rows {', '.join(map(str, shown))} of {total:,}"


def _legend_extra(dataset: PackedDataset, *, hides: bool) -> str:
    extra = ""
    if hides:
        extra += '<span><span class="tokens"><i class="h">hidden</i></span> later tokens cannot see it</span>'
    if dataset.samples.weights is not None:
        extra += '<span><span class="tokens"><b style="--w:0.4">lighter</b></span> smaller weight</span>'
    return extra


def _toggles(*, hides: bool, weighted: bool) -> str:
    wanted = [t for t in _TOGGLES if (t[0] != "no-hidden" or hides) and (t[0] != "even" or weighted)]
    return "".join(
        f'<label><input type="checkbox" data-toggle="{name}"{" checked data-inverse" if ticked else ""}>{words}</label>'
        for name, words, ticked in wanted
    )


# The ledger


def _lead(report: dict[str, Any]) -> str:
    share = 100 * report["trained"] / max(report["tokens_in"], 1)
    packs = "one document a row" if report["strategy"] == "none" else f"{100 * report['fill']:.1f} % filled"
    saved = report["slots_saved"]
    shared = f" Shared prefixes save {saved:,} slots." if saved else ""
    return (
        f"<strong>{share:.1f} %</strong> of {report['tokens_in']:,} tokens are trained: the highlighted ones below. "
        f"{report['documents']:,} documents lie in {report['rows']:,} rows of up to {report['max_seq_len']:,} slots, "
        f"{packs}.{shared}"
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
        note = f"<small>{_places(entry['count'], entry['places'][:5], 'document')}</small>" if entry else ""
        dot = f'<span class="dot bg-{kind}"></span>'
        share = 100 * count / max(report["tokens_in"], 1)
        label = f"<td>{dot}{escape(name)}{note}</td>"
        lines.append(f'<tr>{label}<td class="n">{count:,}</td><td class="n">{share:.2f} %</td></tr>')
    total = f'<tr class="sum"><td>tokens in</td><td class="n">{report["tokens_in"]:,}</td><td class="n"></td></tr>'
    return f"<table>{''.join(lines)}{total}</table>"


def _dead_rows(report: dict[str, Any]) -> str:
    dead = dead_rows(report)
    if not dead:
        return ""
    lines = "".join(
        f'<tr><td>{escape(cause)}<small>{_places(count, places, "row")}</small></td><td class="n">{count:,}</td></tr>'
        for cause, count, places in dead
    )
    return f'<section class="card"><h3>Rows that teach nothing</h3><table>{lines}</table></section>'


def _places(count: int, places: Sequence[str], noun: str) -> str:
    more = ", …" if count > len(places) else ""
    return f"{count:,} {noun}{'s' * (count != 1)}: {escape(', '.join(map(short_place, places)))}{more}"


def _histogram(report: dict[str, Any]) -> str:
    bins = report["lengths"]["histogram"]
    most = max((count for *_, count in bins), default=1)
    lines = "".join(
        f'<b>{low:,}–{high - 1:,}</b><i style="width:{max(100 * count / most, 0.5):.1f}%"></i><span>{count:,}</span>'
        for low, high, count in bins
    )
    return f'<div class="bars">{lines}</div>'
