"""What is suspicious about a data set: findings with stable codes, from the samples, the packs and their ledger.

A finding is no error of the program: the data can be trained on, and what is learned is probably not what was meant.
Each code says one thing, has an entry with cause and cure in docs/lint.md, and a level: an `error` teaches something
wrong, a `warning` wastes data or compute or wants a second look, an `info` is good to know.

Legend: N samples, S tokens of all samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from torchmask.data.packing import PackedDataset
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError
from torchmask.messages import MaskFlag

Level = Literal["error", "warning", "info"]

MAX_PLACES = 10


@dataclass(frozen=True)
class Code:
    """One thing that is looked for.

    Args:
        title: in a few words.
        cure: what to do.
        threshold: the share above (TM012: below) which it is reported; None where one case is enough.
    """

    title: str
    cure: str
    threshold: float | None = None


CODES: dict[str, Code] = {
    "TM001": Code(
        "no trained stop token",
        "end each answer in a stop token that generation knows, and train it: eos_policy: target, a chat_format that "
        "fits the model",
        0.05,
    ),
    "TM002": Code("BOS twice", "take bos_token out of the chat template, or the BOS out of the text"),
    "TM003": Code(
        "rows without targets",
        "look at masking_strategy, the roles (column_map), max_seq_len and the rows themselves",
        0.05,
    ),
    "TM004": Code(
        "a span rule matched nothing, or several places",
        "mend the rule; `torchmask inspect --row ROW` shows the text",
        0.0,
    ),
    "TM005": Code(
        "tokens across an edge", "set straddle to split or inside, or end the prompt where a token ends", 0.02
    ),
    "TM006": Code("the template rewrites history", "set unstable_template to expand, or choose another chat_format"),
    "TM007": Code("tool output or header trained", "take tool out of roles_to_train; set train_on_header to false"),
    "TM008": Code("special-token text in user content", "nothing, if users typed it: it is encoded as plain text"),
    "TM009": Code(
        "cut but trained", "raise max_seq_len, or set over_length to drop or split, or eos.on_truncate to drop", 0.05
    ),
    "TM010": Code(
        "trained prompt differs from the inference prompt",
        "set straddle to split, or choose the chat_format that serving uses",
    ),
    "TM011": Code("a trained token is outside the output vocabulary", "use the tokenizer that belongs to the model"),
    "TM012": Code(
        "rows are not full", "use strategy best_fit, another max_seq_len, or over_length: split for long documents", 0.7
    ),
}
"""Every code; docs/lint.md has cause and cure of each at length."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Args:
        code: `TM001` ...
        level: `error`, `warning` or `info`.
        message: what was found, with numbers.
        count: how many documents, rows or tokens.
        share: of how many of them, where that decided.
        places: the first places.
    """

    code: str
    level: Level
    message: str
    count: int
    share: float | None = None
    places: tuple[str, ...] = ()

    @property
    def cure(self) -> str:
        """What to do."""
        return CODES[self.code].cure


def read_thresholds(words: Sequence[str]) -> dict[str, float]:
    """The thresholds of all codes that have one, some of them given as `TM003=0.02`.

    Raises:
        ConfigError: C16, an unknown code, one without a threshold, or a share that is none.

    >>> read_thresholds(["TM003=0.02"])["TM003"]
    0.02
    """
    thresholds = {code: entry.threshold for code, entry in CODES.items() if entry.threshold is not None}
    for word in words:
        code, _, text = word.partition("=")
        if code not in thresholds:
            fix = f"these have one: {', '.join(thresholds)}"
            raise ConfigError("C16", f"{code!r} is no code with a threshold", where="--threshold", fix=fix)
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise ConfigError("C16", f"{code} wants a share from 0 to 1, got {text!r}", where="--threshold")
        thresholds[code] = share
    return thresholds


def check_data(
    packs: PackedDataset,
    thresholds: Mapping[str, float],
    *,
    bos_id: int | None,
    stop_ids: Sequence[int],
    output_size: int | None,
) -> Iterator[Finding]:
    """Everything that tokens, flags and the ledger say.

    Args:
        packs: the rows, with their samples and report.
        thresholds: of `read_thresholds`.
        bos_id: of the tokenizer.
        stop_ids: tokens at which generation stops.
        output_size: tokens that the model can produce; None = not known.
    """
    samples, report = packs.samples, packs.report
    yield from _stops(samples, report, thresholds["TM001"], stop_ids)
    yield from _double_bos(samples, bos_id)
    yield from _without_targets(samples, report, thresholds["TM003"])
    yield from _spans(samples.report.get("spans", {}), thresholds["TM004"])
    yield from _straddlers(report, thresholds["TM005"])
    yield from _cut(report, thresholds["TM009"])
    yield from _outside(samples, output_size)
    yield from _fill(report, thresholds["TM012"])


def _stops(samples: Samples, report: Mapping[str, Any], threshold: float, stop_ids: Sequence[int]) -> Iterator[Finding]:
    eos = report["eos"]
    whole = eos["documents"] - eos["cut"]
    untrained = eos["masked_stops"] + eos["without_stop"]
    if whole and untrained / whole > threshold:
        asked = samples.eos.train_on_eos == "none" or samples.eos.weight == 0
        level: Level = "info" if asked else "error" if untrained == whole else "warning"
        why = ", as eos.train_on_eos: none asks for" if asked else ": the model does not learn to stop"
        message = f"{untrained:,} of {whole:,} documents end without a trained stop token{why}"
        yield Finding("TM001", level, message, untrained, untrained / whole, _untrained_stops(samples))
    ends = samples.offsets[:-1] + samples.stops
    ends = ends[samples.stops >= 0]
    trained = ends[(samples.mask[ends] & np.uint8(MaskFlag.LOSS)) == 0]
    unknown = np.setdiff1d(samples.tokens[trained], np.array(stop_ids, np.int32))
    if len(unknown):
        count = int(np.isin(samples.tokens[trained], unknown).sum())
        ids = ", ".join(map(str, unknown[:5].tolist()))
        message = f"{count:,} documents end in token {ids}, at which generation does not stop"
        yield Finding("TM001", "warning", message, count)


def _untrained_stops(samples: Samples) -> tuple[str, ...]:
    at = samples.offsets[:-1] + np.maximum(samples.stops, 0)
    filled = samples.lengths > 0
    masked = np.ones(len(samples), bool)
    masked[filled] = (samples.mask[at[filled]] & np.uint8(MaskFlag.LOSS)) != 0
    return _places(samples, np.flatnonzero(masked | (samples.stops < 0)))


def _double_bos(samples: Samples, bos_id: int | None) -> Iterator[Finding]:
    if bos_id is None:
        return
    firsts = samples.offsets[:-1][samples.lengths > 1]
    twice = (samples.tokens[firsts] == bos_id) & (samples.tokens[firsts + 1] == bos_id)
    if twice.any():
        documents = np.flatnonzero(samples.lengths > 1)[twice]
        message = f"{len(documents):,} of {len(samples):,} documents begin with BOS twice"
        yield Finding("TM002", "error", message, len(documents), places=_places(samples, documents))


def _without_targets(samples: Samples, report: Mapping[str, Any], threshold: float) -> Iterator[Finding]:
    none = np.flatnonzero(~_has_target(samples))
    cut_away = report["dropped_documents"].get("truncated_away", {"count": 0, "places": []})
    skipped = report["source"].get("skipped", {})
    empty = [skipped[cause] for cause in ("empty_answer", "empty_text", "no_span_match") if cause in skipped]
    count = len(none) + cut_away["count"] + sum(entry["count"] for entry in empty)
    total = len(samples) + sum(entry["count"] for entry in empty)
    if total and count / total > threshold:
        level: Level = "error" if count / total > 0.5 else "warning"
        message = f"{count:,} of {total:,} rows have no target ({100 * count / total:.3g} %)"
        places = [
            *_places(samples, none),
            *cut_away["places"],
            *(place for entry in empty for place in entry["places"]),
        ]
        yield Finding("TM003", level, message, count, count / total, tuple(places[:MAX_PLACES]))


def _has_target(samples: Samples) -> npt.NDArray[np.bool_]:
    """[N] bool: whether any token but the first is trained."""
    trained = (samples.mask & np.uint8(MaskFlag.LOSS)) == 0
    trained[samples.offsets[:-1][samples.lengths > 0]] = False
    before = np.concatenate([[0], np.cumsum(trained)])
    found: npt.NDArray[np.bool_] = before[samples.offsets[1:]] > before[samples.offsets[:-1]]
    return found


def _spans(spans: Mapping[str, Mapping[str, Any]], threshold: float) -> Iterator[Finding]:
    for name, found in spans.items():
        missed = found["rows_unmatched"] + found["rows_no_token"]
        total = missed + found["rows_matched"]
        places = tuple(found["places"][:MAX_PLACES])
        if total and not found["rows_matched"]:
            message = f"span rule {name!r} matches nothing in any of {total:,} rows"
            yield Finding("TM004", "error", message, missed, 1.0, places)
        elif missed / max(total, 1) > threshold:
            message = f"span rule {name!r} matches nothing in {missed:,} of {total:,} rows"
            yield Finding("TM004", "warning", message, missed, missed / total, places)
        if found["rows_many"]:
            message = f"span rule {name!r} matches more than one place in {found['rows_many']:,} of {total:,} rows"
            yield Finding("TM004", "info", message, found["rows_many"], found["rows_many"] / total)


def _straddlers(report: Mapping[str, Any], threshold: float) -> Iterator[Finding]:
    count, trained = report["straddlers"], max(report["trained"], 1)
    if count / trained > threshold:
        message = (
            f"{count:,} tokens reach over the edge of what is trained, {100 * count / trained:.3g} % of the targets"
        )
        yield Finding("TM005", "warning", message, count, count / trained)


def _cut(report: Mapping[str, Any], threshold: float) -> Iterator[Finding]:
    count, total = report["eos"]["cut"], max(report["documents"], 1)
    if count / total > threshold:
        message = (
            f"{count:,} of {total:,} documents are trained although their end is cut off at {report['max_seq_len']:,}"
        )
        yield Finding("TM009", "warning", message, count, count / total)


def _outside(samples: Samples, output_size: int | None) -> Iterator[Finding]:
    if output_size is None:
        return
    trained = (samples.mask & np.uint8(MaskFlag.LOSS)) == 0
    outside = np.flatnonzero(trained & (samples.tokens >= output_size))
    if len(outside):
        documents = np.unique(np.searchsorted(samples.offsets, outside, side="right") - 1)
        worst = int(samples.tokens[outside].max())
        message = (
            f"{len(outside):,} trained tokens are outside the model's vocabulary of {output_size:,}, up to {worst:,}"
        )
        yield Finding("TM011", "error", message, len(outside), places=_places(samples, documents))


def _fill(report: Mapping[str, Any], threshold: float) -> Iterator[Finding]:
    if report["strategy"] == "none" or report["rows"] < 2 or report["fill"] >= threshold:
        return
    message = f"rows are {100 * report['fill']:.1f} % full: the rest is padding that is computed and thrown away"
    yield Finding("TM012", "warning", message, report["rows"], report["fill"])


def _places(samples: Samples, documents: npt.NDArray[np.int64]) -> tuple[str, ...]:
    return tuple(samples.where(int(i)) for i in documents[:MAX_PLACES])
