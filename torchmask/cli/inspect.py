"""`torchmask inspect --config NAME|PATH`: what is trained, what is seen, and what became of every row.

Documents in the terminal, or rows as they are packed; one line of JSON each for programs; one page of HTML for people.
torch is not imported: a mask is looked at in the time that tokenising takes.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from torchmask.cli.open_config import DataConfig
from torchmask.cli.terminal import (
    console_for,
    document_facts,
    document_text,
    heading,
    legend,
    print_indented,
    print_summary,
    segment_heading,
    used_weights,
)
from torchmask.data.inspection import chosen_documents, document_line, look_at, pack_line, segments_of, slots_of
from torchmask.data.readable import Readable
from torchmask.data.view import write_masks_html
from torchmask.errors import ConfigError

SHOWN_DOCUMENTS, SHOWN_ROWS = 3, 1
MAX_WATCHED = 5000
"""Rows of the source that are read again for the roles on a page."""
SVG_WIDTH = 104


@dataclass(frozen=True)
class InspectOptions:
    """What to show, and as what.

    Args:
        count: how many documents or rows; None = a few in the terminal, all with `json`.
        rows: rows of the source (`17`, `train.jsonl:17`); of packs, their numbers.
        packs: rows as they are packed in place of documents.
        ids: write each token's id behind it.
        json: one line of JSON each.
        html: write a page here.
        svg: write the terminal's picture here.
        summary: end with the ledger, the lengths and the rows that teach nothing.
    """

    count: int | None = None
    rows: tuple[str, ...] = ()
    packs: bool = False
    ids: bool = False
    json: bool = False
    html: str | None = None
    svg: str | None = None
    summary: bool = True


def inspect(data: DataConfig, options: InspectOptions) -> int:
    """Shows a configuration's data.

    Raises:
        ConfigError: C16, a row that is not there; and what is wrong with the data set's options.
        DataError: what is wrong with its rows.
    """
    if options.json:
        _print_json(data, options)
        return 0
    if options.html is not None:
        rows = _pack_rows(data, options, 8)
        write_masks_html(
            options.html,
            data.packs,
            data.tokenizer.id_to_piece,
            rows=rows,
            control=data.control,
            roles_of=_roles_of(data, rows),
            config=data.name,
        )
        print(f"{options.html}: {len(rows):,} of {len(data.packs):,} rows, {Path(options.html).stat().st_size:,} bytes")
        return 0
    if options.svg is None:
        _print_view(console_for(), data, options)
        return 0
    with open(options.svg, "w", encoding="utf-8") as file:
        file.write(_picture(data, options))
    print(f"{options.svg}: {Path(options.svg).stat().st_size:,} bytes")
    return 0


def _print_json(data: DataConfig, options: InspectOptions) -> None:
    if options.packs:
        lines = (pack_line(data.packs, i) for i in _pack_rows(data, options, None))
    else:
        lines = (document_line(data.samples, i) for i in _documents(data, options, None))
    for line in lines:
        sys.stdout.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def _documents(data: DataConfig, options: InspectOptions, default: int | None) -> list[int]:
    count = default if options.count is None else options.count
    chosen = list(chosen_documents(data.samples, options.rows, count))
    if not chosen and options.rows:
        known = f"documents come from {data.samples.where(0)} to {data.samples.where(len(data.samples) - 1)}"
        raise ConfigError("C16", f"no document comes from row {', '.join(options.rows)}", where="--row", fix=known)
    return chosen if options.count is None else chosen[: options.count]


def _pack_rows(data: DataConfig, options: InspectOptions, default: int | None) -> list[int]:
    total = len(data.packs)
    if not options.rows:
        count = default if options.count is None else options.count
        return list(range(total if count is None else min(count, total)))
    wrong = [row for row in options.rows if not row.isdecimal() or int(row) >= total]
    if wrong:
        fix = f"packed rows have the numbers 0 to {total - 1}"
        raise ConfigError("C16", f"there is no packed row {', '.join(wrong)}", where="--row", fix=fix)
    return [int(row) for row in options.rows]


def _roles_of(data: DataConfig, rows: list[int]) -> Callable[[int], list[str] | None]:
    """The roles of the tokens of the documents in these rows, from a second look at the source's first rows."""
    packs = data.packs
    shown = {placement.sample for i in rows for placement in packs.documents(i)}
    last = max(int(packs.samples.source_rows[sample]) for sample in shown)
    watching, _ = data.watch(min(last or MAX_WATCHED, MAX_WATCHED))
    return lambda sample: watching.roles_of(packs.samples[sample].tokens)


# The terminal


def _print_view(console: Console, data: DataConfig, options: InspectOptions) -> None:
    samples, colours = data.samples, console.color_system is not None
    console.print(legend(used_weights(samples.weights), colours=colours), soft_wrap=not console.is_terminal)
    if options.packs:
        _print_packs(console, data, options, colours=colours)
    else:
        chosen = _documents(data, options, SHOWN_DOCUMENTS)
        documents = [look_at(samples, i) for i in chosen]
        ids = {token for document in documents for token in document.tokens.tolist()}
        read = Readable(ids, data.tokenizer.id_to_piece, data.control)
        for document in documents:
            console.print()
            console.print(heading(document.place, document_facts(document)), soft_wrap=not console.is_terminal)
            text = document_text(document, read, ids=options.ids, colours=colours)
            print_indented(console, text)
        if len(chosen) < len(samples):
            console.print(Text(f"\n{len(chosen):,} of {len(samples):,} documents; -n shows more", style="dim"))
    if options.summary:
        console.print()
        print_summary(console, data.packs.report)


def _print_packs(console: Console, data: DataConfig, options: InspectOptions, *, colours: bool) -> None:
    dataset = data.packs
    for i in _pack_rows(data, options, SHOWN_ROWS):
        pack, placements = dataset[i], dataset.documents(i)
        read = Readable(set(pack.tokens.tolist()), data.tokenizer.id_to_piece, data.control)
        facts = f"{len(pack):,} of {dataset.max_seq_len:,} slots · {len(placements):,} documents"
        console.print()
        console.print(Text(f"row {i}  {facts}", style="bold"))
        for segment in segments_of(placements):
            placement = placements[segment.document]
            slots = slots_of(dataset, pack, placement, segment)
            text = document_text(slots, read, ids=options.ids, colours=colours)
            head = segment_heading(segment, dataset.samples.where(placement.sample))
            indent = 2 + 2 * segment.depth
            print_indented(console, head, indent)
            print_indented(console, text, indent)


def _picture(data: DataConfig, options: InspectOptions) -> str:
    """The terminal view as SVG that loads nothing: the viewer's own monospaced font in place of a web font."""
    console = Console(
        file=StringIO(),
        record=True,
        width=SVG_WIDTH,
        force_terminal=True,
        color_system="truecolor",
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    _print_view(console, data, options)
    title = f"torchmask inspect --config {data.name}"
    svg = console.export_svg(title=title, unique_id="mask")
    return re.sub(r"\s*@font-face \{.*?\n    \}", "", svg, flags=re.DOTALL)
