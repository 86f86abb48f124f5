"""Masks in a terminal: trained tokens on green, the stronger the more they weigh, hidden ones struck through.

Where there are no colours (a pipe, `NO_COLOR`) the same is said with signs: `[[trained]]`, `~~hidden~~`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.console import Console
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from torchmask.data.inspection import Document, Segment, Slots, dead_rows
from torchmask.data.readable import Readable
from torchmask.data.report import format_ledger, short_place

_PALE, _FULL, _MORE = (217, 242, 227), (52, 190, 124), (10, 122, 72)
_DARK_TEXT, _LIGHT_TEXT = Color.from_rgb(4, 45, 25), Color.from_rgb(255, 255, 255)
_AGAINST = Color.from_rgb(196, 72, 72)
_STOP = Style(bold=True, underline=True)
_HIDDEN = Style(strike=True, dim=True)
_CONTROL = Style(color="cyan")
_ID = Style(dim=True, italic=True)
_BARS = "▏▎▍▌▋▊▉█"
_BAR_WIDTH = 40


class _Pipe(Console):
    """A console that leaves it to the verb what a closed pipe means; rich's own exits with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console_for(stream: TextIO | None = None) -> Console:
    """A console that writes text as it is: no markup, no highlighting."""
    return _Pipe(file=stream, markup=False, highlight=False, emoji=False)


def print_indented(console: Console, text: Text, by: int = 2) -> None:
    """Prints a text some columns to the right: wrapped for a person, line by line as it is for a pipe."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, by)))
        return
    for line in text.split("\n"):
        console.print(Text(" " * by) + line, soft_wrap=True)


def trained_style(weight: float) -> Style:
    """The background of a target: pale for a small weight, strong from 1 on, red below 0."""
    if weight < 0:
        return Style(color=_LIGHT_TEXT, bgcolor=_AGAINST)
    if weight > 1:
        return Style(color=_LIGHT_TEXT, bgcolor=Color.from_rgb(*_MORE))
    mixed = [low + weight * (high - low) for low, high in zip(_PALE, _FULL)]
    return Style(color=_DARK_TEXT, bgcolor=Color.from_rgb(*mixed))


def document_text(document: Document | Slots, read: Readable, *, ids: bool = False, colours: bool = True) -> Text:
    """The tokens of a document or of a segment of a row.

    Args:
        ids: write each token's id behind it.
        colours: False = signs in place of colours.
    """
    text = Text(overflow="fold")
    tokens, weights, hidden = document.tokens.tolist(), document.weights.tolist(), document.hidden.tolist()
    for k, token in enumerate(tokens):
        style = trained_style(weights[k]) if weights[k] else _CONTROL if token in read.control else Style.null()
        style += _HIDDEN if hidden[k] else Style.null()
        style += _STOP if k == document.stop else Style.null()
        if not colours:
            text.append(_opening(weights, hidden, k))
        body = read.visible(token)
        word, line_break = (body[:-1], "\n") if body.endswith("\n") else (body, "")
        text.append(word, style)
        if ids:
            text.append(f"({token})", _ID)
        if not colours:
            text.append(_closing(weights, hidden, k))
        text.append(line_break if k + 1 < len(tokens) else "")
    return text


def _opening(weights: Sequence[float], hidden: Sequence[bool], k: int) -> str:
    """The signs in front of token k."""
    begins = weights[k] and (k == 0 or weights[k - 1] != weights[k] or hidden[k - 1] != hidden[k])
    weight = "" if weights[k] == 1 else f"{weights[k]:g}:"
    sign = f"[[{weight}" if begins else ""
    return sign + ("~~" if hidden[k] and (k == 0 or not hidden[k - 1]) else "")


def _closing(weights: Sequence[float], hidden: Sequence[bool], k: int) -> str:
    last = k + 1 == len(weights)
    ends = weights[k] and (last or weights[k + 1] != weights[k] or hidden[k + 1] != hidden[k])
    return ("~~" if hidden[k] and (last or not hidden[k + 1]) else "") + ("]]" if ends else "")


def heading(place: str, facts: str) -> Text:
    """The line above a document."""
    return Text.assemble((short_place(place), "bold"), (f"  {facts}", "dim"))


def document_facts(document: Document) -> str:
    """A document in figures: tokens, targets, rules that chose them."""
    trained = document.trained
    facts = [f"{len(document.tokens):,} tokens", f"{int(trained.sum()):,} trained"]
    if document.rules is not None and trained.any():
        facts.append("by " + ", ".join(dict.fromkeys(r for r, t in zip(document.rules, trained) if t)))
    others = sorted({float(w) for w in document.weights[trained]} - {1.0})
    if others:
        facts.append("weights " + ", ".join(f"{w:g}" for w in others[:5]) + (", ..." if len(others) > 5 else ""))
    if document.hidden.any():
        facts.append(f"{int(document.hidden.sum()):,} hidden")
    return " · ".join(facts)


def segment_heading(segment: Segment, place: str) -> Text:
    """The line above a segment of a row."""
    size = segment.stop - segment.start
    shared = f"shared by {segment.num_documents} documents · " if segment.num_documents > 1 else ""
    part = f"tokens {segment.start:,} to {segment.stop - 1:,} · " if segment.start or segment.num_documents > 1 else ""
    return heading(place, f"{shared}{part}slots {segment.slot:,} to {segment.slot + size - 1:,}")


def legend(weights: Iterable[float], *, colours: bool) -> Text:
    """What the colours (or signs) mean."""
    if not colours:
        return Text("[[trained]]  [[0.5:trained with weight 0.5]]  ~~hidden from later tokens~~  context", style="dim")
    text = Text.assemble((" trained ", trained_style(1)), "  ")
    for weight in sorted({float(f"{w:.2g}") for w in weights} - {0.0, 1.0})[:6]:
        text.append(f" weight {weight:g} ", trained_style(weight))
        text.append("  ")
    text.append(" stop ", trained_style(1) + _STOP)
    return text.append("  context  ").append("<control>", _CONTROL).append("  ").append("hidden", _HIDDEN)


def print_summary(console: Console, report: Mapping[str, Any]) -> None:
    """The ledger, the lengths as a histogram, and the rows that teach nothing."""
    console.print(format_ledger(report), soft_wrap=True)
    console.print()
    console.print(Text("documents by length, in tokens", style="bold"))
    for line in histogram_lines(report["lengths"]["histogram"]):
        console.print(line)
    dead = dead_rows(report)
    if dead:
        console.print()
        console.print(Text("rows that teach nothing", style="bold"))
    for cause, count, places in dead:
        shown = ", ".join(short_place(place) for place in places) + (", ..." if count > len(places) else "")
        console.print(f"  {cause}: {count:,}  {shown}", soft_wrap=True)


def histogram_lines(bins: Sequence[tuple[int, int, int]]) -> list[Text]:
    """One line for each octave of lengths.

    >>> [line.plain for line in histogram_lines([[4, 8, 1], [8, 16, 2]])]
    ['   4 to 7  ████████████████████ 1', '  8 to 15  ████████████████████████████████████████ 2']
    """
    most = max((count for *_, count in bins), default=1)
    names = [f"{low:,} to {high - 1:,}" for low, high, _ in bins]
    width = max((len(name) for name in names), default=0)
    lines = []
    for name, (*_, count) in zip(names, bins):
        eighths = max(1, round(8 * _BAR_WIDTH * count / most))
        bar = "█" * (eighths // 8) + (_BARS[eighths % 8 - 1] if eighths % 8 else "")
        lines.append(Text.assemble(f"  {name:>{width}}  ", (bar, "#34be7c"), f" {count:,}"))
    return lines


def used_weights(weights: npt.NDArray[np.float32] | None) -> list[float]:
    """The different weights of a data set, a few of them, for the legend."""
    if weights is None:
        return []
    return np.unique(weights)[:64].tolist()
