"""`torchmask diff A.yaml B.yaml`: which tokens two configurations treat differently, document by document."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.text import Text

from torchmask.cli.open_config import DataConfig, open_config
from torchmask.cli.terminal import console_for, document_text, heading, legend, print_indented
from torchmask.data.inspection import Document, look_at
from torchmask.data.readable import Readable
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError

AROUND, MAX_SHOWN = 8, 160
"""Tokens shown on either side of a difference, and at most."""


@dataclass
class Counts:
    """What differs.

    Args:
        documents: documents that both have.
        only_first, only_second: documents that one of them has.
        differing: documents in which anything differs.
        ids: documents whose ids differ; their flags are not compared.
        trained, hidden, weights: tokens whose flag or weight differs, in documents of the same ids. A token that only
            one of them trains counts as trained, not as another weight.
        only_first_trains, only_second_trains: of the tokens under `trained`, who trains them.
    """

    documents: int = 0
    only_first: int = 0
    only_second: int = 0
    differing: int = 0
    ids: int = 0
    trained: int = 0
    hidden: int = 0
    weights: int = 0
    only_first_trains: int = 0
    only_second_trains: int = 0

    @property
    def any(self) -> bool:
        """Whether the two make different data."""
        return bool(self.differing or self.only_first or self.only_second)


@dataclass(frozen=True, eq=False)
class Example:
    """A document that differs: as each of the two has it, and the first and last token of the difference."""

    first: Document
    second: Document
    start: int
    stop: int
    what: str


def diff(words: Sequence[str], *, count: int = 3, as_json: bool = False, trust: Sequence[str] = ()) -> int:
    """Prints what differs, and examples.

    Args:
        words: one or two configurations, then overrides: of both, or of the second where it is the first again.
        count: how many examples.
        as_json: print JSON.
        trust: modules whose components are allowed.

    Returns:
        1 where anything differs, 0 where not.

    Raises:
        ConfigError: C16, no configuration or more than two; and whatever is wrong with one of them.
    """
    first, second = _open_both(words, trust)
    counts, examples = compare(first.samples, second.samples, count)
    if as_json:
        shown = [_as_dict(example) for example in examples]
        print(
            json.dumps(
                {
                    "first": [first.name, *first.overrides],
                    "second": [second.name, *second.overrides],
                    **asdict(counts),
                    "examples": shown,
                }
            )
        )
    else:
        _print(first, second, counts, examples)
    return int(counts.any)


def _open_both(words: Sequence[str], trust: Sequence[str]) -> tuple[DataConfig, DataConfig]:
    names = [word for word in words if "=" not in word and not word.startswith("~")]
    overrides = [word for word in words if word not in names]
    if len(names) not in (1, 2) or (len(names) == 1 and not overrides):
        form = "torchmask diff A.yaml B.yaml [key=value ...], or torchmask diff A.yaml key=value ..."
        raise ConfigError("C16", f"diff compares two configurations, got {len(names)}", where="command line", fix=form)
    first = open_config(names[0], overrides if len(names) == 2 else (), trust=trust)
    samples = first.samples  # built before the second one's trust replaces the first one's
    assert samples is first.samples
    return first, open_config(names[-1], overrides, trust=trust)


def compare(first: Samples, second: Samples, count: int) -> tuple[Counts, list[Example]]:
    """What differs between two stores, documents matched by their places in the sources."""
    places, other_places = _places(first), _places(second)
    counts = Counts(
        only_first=len(places.keys() - other_places.keys()), only_second=len(other_places.keys() - places.keys())
    )
    examples: list[Example] = []
    for place in places:
        if place not in other_places:
            continue
        counts.documents += 1
        i, k = places[place], other_places[place]
        if _same(first, i, second, k):
            continue
        example = _compare(look_at(first, i), look_at(second, k), counts)
        if example is not None and len(examples) < count:
            examples.append(example)
    return counts, examples


def _places(samples: Samples) -> dict[tuple[str, int], int]:
    """Documents by place; several of one row are told apart by their order."""
    found: dict[tuple[str, int], int] = {}
    seen: dict[str, int] = {}
    for i in range(len(samples)):
        place = samples.where(i)
        found[place, seen.setdefault(place, 0)] = i
        seen[place] += 1
    return found


def _same(first: Samples, i: int, second: Samples, k: int) -> bool:
    a, b = first[i], second[k]
    same = np.array_equal(a.tokens, b.tokens) and np.array_equal(a.mask, b.mask)
    return same and a.weights is None and b.weights is None


def _compare(a: Document, b: Document, counts: Counts) -> Example | None:
    """Adds one document to the counts; what differs in it, None for nothing."""
    if not np.array_equal(a.tokens, b.tokens):
        counts.differing += 1
        counts.ids += 1
        start, stop = _first_difference(a.tokens, b.tokens)
        return Example(a, b, start, stop, "ids differ")
    trained, hidden = a.trained != b.trained, a.hidden != b.hidden
    weights = (a.weights != b.weights) & ~trained
    places = np.flatnonzero(trained | hidden | weights)
    if not len(places):
        return None
    counts.differing += 1
    counts.trained += int(trained.sum())
    counts.hidden += int(hidden.sum())
    counts.weights += int(weights.sum())
    counts.only_first_trains += int((trained & a.trained).sum())
    counts.only_second_trains += int((trained & b.trained).sum())
    parts = [
        f"{int(flags.sum()):,} tokens {words}"
        for flags, words in (
            (trained & a.trained, "trained by the first only"),
            (trained & b.trained, "trained by the second only"),
            (weights, "of another weight"),
            (hidden, "hidden by one only"),
        )
        if flags.any()
    ]
    return Example(a, b, int(places[0]), int(places[-1]) + 1, ", ".join(parts))


def _first_difference(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Where two different lists of ids part, and a few tokens on."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    start = int(differ[0]) if len(differ) else shorter
    return start, start + AROUND


def _as_dict(example: Example) -> dict[str, Any]:
    cut = slice(example.start, example.stop)
    return {
        "row": example.first.place,
        "what": example.what,
        "start": example.start,
        "first": {"tokens": example.first.tokens[cut].tolist(), "weights": example.first.weights[cut].tolist()},
        "second": {"tokens": example.second.tokens[cut].tolist(), "weights": example.second.weights[cut].tolist()},
    }


# The terminal


def _print(first: DataConfig, second: DataConfig, counts: Counts, examples: Sequence[Example]) -> None:
    console = console_for()
    for line in _summary(first, second, counts):
        console.print(line, soft_wrap=True)
    colours = console.color_system is not None
    if examples:
        console.print()
        console.print(legend((), colours=colours), soft_wrap=not console.is_terminal)
    for example in examples:
        console.print()
        console.print(heading(example.first.place, example.what), soft_wrap=not console.is_terminal)
        for sign, data, document in (("-", first, example.first), ("+", second, example.second)):
            lines = _window(data, document, example, colours=colours).split("\n")
            print_indented(console, Text("\n").join(Text(f"{sign} ", "bold") + line for line in lines))


def _summary(first: DataConfig, second: DataConfig, counts: Counts) -> Iterator[str]:
    if not counts.any:
        yield f"no difference: {counts.documents:,} documents have the same ids, flags and weights"
        return
    for sign, data in (("-", first), ("+", second)):
        yield " ".join([sign, data.name, *data.overrides])
    yield f"{counts.differing:,} of {counts.documents:,} documents differ"
    details = (
        (counts.only_first, "documents are in the first only"),
        (counts.only_second, "documents are in the second only"),
        (counts.ids, "documents have other ids (their flags are not compared)"),
        (counts.only_first_trains, "tokens are trained by the first only"),
        (counts.only_second_trains, "tokens are trained by the second only"),
        (counts.weights, "tokens have another weight"),
        (counts.hidden, "tokens are hidden by one only"),
    )
    yield from (f"  {number:,} {words}" for number, words in details if number)


def _window(data: DataConfig, document: Document, example: Example, *, colours: bool) -> Text:
    """The tokens around the difference as one of the two has them."""
    start = max(0, example.start - AROUND)
    stop = min(len(document.tokens), example.stop + AROUND, start + MAX_SHOWN)
    cut = Document(
        document.place,
        document.tokens[start:stop],
        document.mask[start:stop],
        document.weights[start:stop],
        None,
        document.stop - start,
    )
    read = Readable(document.tokens.tolist(), data.tokenizer.id_to_piece, data.control)
    text = document_text(cut, read, colours=colours)
    return Text.assemble("… " * (start > 0), text, " …" * (stop < len(document.tokens)))
