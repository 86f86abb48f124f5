"""Which tokens of which documents go into packs: trimming, the over-length policy, documents without targets.

All of it happens before packing and on whole documents in data order, so that a plan never meets a document that does
not fit and a document without targets never takes a slot. Every document and token left out is counted with its cause.

Legend: N samples, F fragments.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from torchmask.data.edges import make_stops_virtual
from torchmask.data.fragments import Bools, Fragments, Integers, Targets
from torchmask.data.plan import cut_stream
from torchmask.data.report import length_table
from torchmask.data.sample import Samples
from torchmask.errors import DataError

OVER_LENGTH = ("error", "truncate", "split", "drop")
TRUNCATE_SIDES = ("right", "left")
NO_TARGETS = ("drop", "keep", "error")

CAUSES = ("kept", "empty", "all_masked", "over_length", "truncated_away", "no_span_match")
"""Why a whole document is not in any pack; an index into this is kept for every document."""


class NothingToTrain(DataError):
    """No document is left to pack. `causes` ([N] uint8, index into `CAUSES`) says why, of each."""

    def __init__(
        self, id: str, message: str, *, causes: npt.NDArray[np.uint8], fix: str, excerpt: str | None = None
    ) -> None:
        super().__init__(id, message, fix=fix, excerpt=excerpt)
        self.causes = causes


@dataclass(frozen=True, eq=False)
class Selection:
    """What goes into packs, and what became of the rest.

    Attributes:
        fragments: F of them, in data order.
        uncut: the same before the stream of strategy `split` was cut at row ends; otherwise `fragments`.
        causes: [N] uint8, index into `CAUSES`; 0 = the document is in the fragments.
        trimmed: [N] int64, tokens after the last target that were left out of a document that was kept.
        cut: [N] bool, the document's stop token was cut off.
        virtual: [N] bool, the document's stop token is a label and takes no slot.
    """

    fragments: Fragments
    uncut: Fragments
    causes: npt.NDArray[np.uint8]
    trimmed: Integers
    cut: Bools
    virtual: Bools


@dataclass(frozen=True, kw_only=True)
class CutPolicy:
    """How documents that do not fit or teach nothing are treated; `PackedDataset` documents the fields."""

    over_length: str
    truncate_side: str
    no_targets: str
    trim_tail: bool
    max_truncated_away: float
    stream: bool  # strategy `split`: documents are cut at row ends, so none is too long
    virtual_stops: bool = False  # of the EOS policy, `append: virtual`
    on_truncate: str = "keep"  # of the EOS policy


def select_fragments(samples: Samples, targets: Targets, *, max_seq_len: int, policy: CutPolicy) -> Selection:
    """The fragments to pack, none longer than `max_seq_len` slots.

    Raises:
        NothingToTrain: D05 no samples, D09 none is left, D11 no document has a target.
        DataError: D09 a document is too long, D10 truncation removes too many documents' targets.
    """
    count = len(samples)
    causes = np.zeros(count, np.uint8)
    trimmed = np.zeros(count, np.int64)
    cut = np.zeros(count, np.bool_)
    virtual = np.zeros(count, np.bool_)
    everything = Fragments.whole(samples.lengths)
    had_targets = targets.count(everything) > 0
    causes[samples.lengths == 0] = CAUSES.index("empty")
    if policy.no_targets != "keep":
        none = ~had_targets & (causes == 0)
        causes[none] = CAUSES.index("all_masked")
        if samples.unmatched is not None:
            causes[none & samples.unmatched] = CAUSES.index("no_span_match")
    _require_samples(samples, had_targets, causes, policy)
    if policy.no_targets == "error" and not had_targets.all():
        raise _no_targets_error(samples, np.flatnonzero(~had_targets))
    fragments = everything.select(causes == 0)

    if policy.virtual_stops:
        fragments, virtual = make_stops_virtual(samples, fragments, targets, trimmed)
    if policy.trim_tail:
        fragments = _trim(fragments, targets, trimmed)
    long = fragments.lengths > max_seq_len
    over_length = _over_length(policy)
    if over_length == "error" and long.any():
        raise _too_long_error(samples, fragments, max_seq_len)
    if over_length == "drop":
        causes[fragments.samples[long]] = CAUSES.index("over_length")
        fragments = fragments.select(~long)
    elif over_length == "truncate" and long.any():
        before = fragments
        fragments = _truncate(fragments, long, max_seq_len, policy.truncate_side)
        cut[before.samples] = samples.stops[before.samples] >= fragments.stops  # a trimmed stop is no cut one
        cut[before.samples] &= fragments.stops < before.stops
        if policy.on_truncate == "terminate":
            fragments = replace(fragments, terminated=cut[fragments.samples])
        lost = (targets.count(fragments) == 0) & had_targets[fragments.samples]
        _check_truncated_away(before, targets, had_targets, lost, max_seq_len, policy)
        if policy.no_targets != "keep":
            causes[fragments.samples[lost]] = CAUSES.index("truncated_away")
            fragments = fragments.select(~lost)
        if policy.trim_tail:
            fragments = _trim(fragments, targets, trimmed)
    if not len(fragments):
        raise _nothing_left_error(samples, causes, max_seq_len)
    uncut = fragments
    if policy.stream or over_length == "split":
        fragments = _split(fragments, max_seq_len, stream=policy.stream)
        if policy.trim_tail:
            fragments = _trim(fragments, targets, trimmed)
    uncut = uncut if policy.stream else fragments
    labels = np.zeros(count, np.bool_)  # whose virtual stop is a label still; other ones were trimmed or cut off
    labels[fragments.samples[fragments.continues & (fragments.stops == samples.stops[fragments.samples])]] = True
    trimmed += virtual & ~labels & ~cut
    kept = causes == 0
    return Selection(fragments, uncut, causes, trimmed, cut & kept, virtual & labels & kept)


def _over_length(policy: CutPolicy) -> str:
    """What becomes of documents that are too long, with the EOS policy's word about truncation."""
    if policy.stream and policy.over_length == "error":
        return "split"
    cuts_stops = policy.over_length == "truncate" and policy.truncate_side == "right"
    return "drop" if cuts_stops and policy.on_truncate == "drop" else policy.over_length


def _trim(fragments: Fragments, targets: Targets, trimmed: Integers) -> Fragments:
    """Without the tokens after each fragment's last target, and without targetless parts of trained documents.

    A document without any target is left whole: `no_targets` decides about it. Adds to `trimmed` ([N], in place).
    """
    has_target = targets.count(fragments) > 0
    stops, continues = fragments.stops.copy(), fragments.continues.copy()
    last = targets.last(fragments.select(has_target))
    stops[has_target] = np.minimum(stops[has_target], last + 1)
    continues[has_target] &= last >= fragments.stops[has_target]
    shorter = replace(
        fragments, stops=stops, continues=continues, terminated=fragments.terminated & (stops == fragments.stops)
    )
    document_has_target = np.zeros(len(trimmed), bool)
    document_has_target[fragments.samples[has_target]] = True
    keep = has_target | ~document_has_target[fragments.samples]
    np.add.at(trimmed, fragments.samples, np.where(keep, fragments.stops - stops, fragments.lengths))
    return shorter.select(keep)


def _truncate(fragments: Fragments, long: Bools, max_seq_len: int, side: str) -> Fragments:
    if side == "right":
        stops = np.where(long, fragments.starts + max_seq_len, fragments.stops)
        return replace(fragments, stops=stops, continues=fragments.continues & ~long)
    return replace(
        fragments, starts=np.where(long, fragments.stops - max_seq_len, fragments.starts), keeps_first=long.copy()
    )


def _split(fragments: Fragments, max_seq_len: int, *, stream: bool) -> Fragments:
    """Fragments cut at the ends of rows: of one stream of all documents, or of each document's own rows."""
    lengths = fragments.lengths
    if stream:
        return fragments.cut(*cut_stream(lengths, max_seq_len))
    pieces = -(-lengths // max_seq_len)
    parents = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(parents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = nth * max_seq_len
    return fragments.cut(parents, starts, np.minimum(starts + max_seq_len, lengths[parents]))


def _require_samples(samples: Samples, had_targets: Bools, causes: npt.NDArray[np.uint8], policy: CutPolicy) -> None:
    if not len(samples):
        skipped = {cause: entry["count"] for cause, entry in samples.report.get("skipped", {}).items()}
        read = samples.report.get("rows_read", 0)
        why = f": {read} rows were read and all skipped {skipped}" if skipped else ""
        fix = "check the source, its split and its filters"
        raise NothingToTrain("D05", f"the dataset is empty{why}", causes=causes, fix=fix)
    if had_targets.any() or policy.no_targets == "keep":
        return
    i = int(np.argmax(samples.lengths > 0))
    sample = samples[i]
    shown = slice(0, 24)
    more = " ..." if len(sample) > 24 else ""
    tokens, mask = (" ".join(f"{v:>5}" for v in column[shown].tolist()) for column in (sample.tokens, sample.mask))
    raise NothingToTrain(
        "D11",
        f"none of the {len(samples)} documents has a trained token, so there is nothing to learn: "
        f"{_why_untrained(samples)}. {samples.row_name(i)}, {len(sample)} tokens (mask: 0 trained, 1 not):",
        causes=causes,
        excerpt=f"tokens {tokens}{more}\n    mask   {mask}{more}",
        fix="check masking_strategy, the roles of the rows (column_map) and the chat format",
    )


def _why_untrained(samples: Samples) -> str:
    if not (samples.lengths > 1).any():
        return "no document is longer than one token"
    if samples.unmatched is not None and samples.unmatched.any():
        rules = ", ".join(name for name, found in samples.report.get("spans", {}).items() if not found["rows_matched"])
        return f"the span rules select no token{f' ({rules} in none)' if rules else ''}"
    if samples.weights is not None and not samples.weights.any():
        return "every weight is 0"
    return "the mask excludes every token (no assistant text in the rows, or a mask policy that masks it)"


def _no_targets_error(samples: Samples, rows: Integers) -> DataError:
    places = ", ".join(samples.where(int(i)) for i in rows[:5])
    return DataError(
        "D10",
        f"{len(rows)} of {len(samples)} documents have no trained token: {places}{', ...' if len(rows) > 5 else ''}",
        fix="mend the rows, or set no_targets to drop",
    )


def _too_long_error(samples: Samples, fragments: Fragments, max_seq_len: int) -> DataError:
    long = np.flatnonzero(fragments.lengths > max_seq_len)
    i = int(fragments.samples[long[0]])
    share = 100 * len(long) / len(samples)
    return DataError(
        "D09",
        f"{samples.row_name(i)} has {fragments.lengths[long[0]]} tokens, max_seq_len is {max_seq_len}; "
        f"set over_length to truncate, split or drop\n"
        f"    {len(long)} of {len(samples)} documents ({share:.2g} %) are too long\n"
        f"    {length_table(samples.lengths)}",
        where=samples.where(i),
        fix=f"max_seq_len >= {int(fragments.lengths.max())} keeps every document whole",
    )


def _check_truncated_away(
    before: Fragments, targets: Targets, had_targets: Bools, lost: Bools, max_seq_len: int, policy: CutPolicy
) -> None:
    """Stops where truncation takes all targets from more than the allowed share of the documents."""
    count, total = int(lost.sum()), int(had_targets[before.samples].sum())
    allowed = {"keep": total, "error": 0}.get(policy.no_targets, policy.max_truncated_away * total)
    if count <= allowed:
        return
    trained = before.select(had_targets[before.samples])
    if policy.truncate_side == "right":
        needed = targets.first(trained) + 1
    else:  # the slot before the last target must be kept, next to the document's first token
        needed = np.minimum(trained.lengths, trained.lengths - targets.last(trained) + 2)
    enough = int(np.sort(needed)[int(np.ceil(0.95 * len(needed))) - 1])
    raise DataError(
        "D10",
        f"truncation at max_seq_len {max_seq_len} removes every target of {count} of {total} documents "
        f"({100 * count / total:.2g} %); max_seq_len >= {enough} would keep 95 %",
        fix="raise max_seq_len, set over_length to split or drop, or truncate_side to "
        + ("left" if policy.truncate_side == "right" else "right"),
    )


def _nothing_left_error(samples: Samples, causes: npt.NDArray[np.uint8], max_seq_len: int) -> NothingToTrain:
    counts = {CAUSES[c]: int(n) for c, n in enumerate(np.bincount(causes, minlength=len(CAUSES))) if n}
    return NothingToTrain(
        "D09",
        f"no document is left to train on: of {len(samples)}, {counts} at max_seq_len {max_seq_len}\n"
        f"    {length_table(samples.lengths)}",
        causes=causes,
        fix="raise max_seq_len, or set over_length to truncate or split",
    )
