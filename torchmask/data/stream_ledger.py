"""The ledger of a stream: those of its windows, and of the ranks that read it, added up.

A window's rows are forgotten, so what became of them is kept as sums: they are exact, and so is the balance
`tokens_in = trained + masked + dropped`. What cannot be added, the percentiles of the lengths, is left out; their
histogram is not.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchmask.data.columns import MAX_PLACES, add_reports
from torchmask.data.report import build_report
from torchmask.errors import DataError, EnvironmentFault

_SUMS = (
    *("tokens_in", "trained", "masked", "documents_in", "documents", "fragments", "rows", "slots", "slots_saved"),
    *("slots_without_sharing", "straddlers"),
)
_PART_SUMS = ("rows", "documents", "tokens")
_ENOUGH_TO_JUDGE = 5000  # documents, before the share that truncation robs of its targets says something
_ENOUGH_TO_MISS = 32  # documents that a source should have given before its lack of them is worth a warning


def empty_ledger(options: Mapping[str, Any], shares: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """The ledger of a stream of which nothing was read.

    Args:
        options: the packing options in use.
        shares: name and share of the rows of each part.
    """
    counts = ("documents", "fragments", "rows", "trained", "slots", "slots_saved", "virtual")
    report = build_report(
        options={"strategy": "best_fit", "share_prefixes": False, **options},
        lengths=np.zeros(0, np.int64),
        counts=dict.fromkeys(counts, 0),
        dropped={},
        dropped_documents={},
        weights={"before": 0.0, "after": 0.0, "dropped": {}},
        eos=dict.fromkeys(("trained_stops", "masked_stops", "without_stop", "cut"), 0),
        source=add_reports([]),
    )
    parts = [{"name": name, "share": share, **dict.fromkeys(_PART_SUMS, 0)} for name, share in shares]
    return _without_percentiles({**report, "windows": {}, "parts": parts})


def add_ledgers(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One ledger of several of the same stream: of its windows, or of what each rank has packed.

    Args:
        reports: as `PackedDataset.report`, with `windows` (counts: `packed`, `without_samples`, `without_targets`) and
            `parts` (of each source `name`, `share`, and the sums `rows`, `documents`, `tokens`).
    """
    first = reports[0]
    total = {**first, **{key: sum(report[key] for report in reports) for key in _SUMS}}
    for key in ("dropped", "eos", "windows"):
        total[key] = _sums([report[key] for report in reports])
    total["weights"] = _sums([{k: v for k, v in report["weights"].items() if k != "dropped"} for report in reports])
    total["weights"]["dropped"] = _sums([report["weights"]["dropped"] for report in reports])
    lost: dict[str, dict[str, Any]] = {}
    for report in reports:
        for cause, entry in report["dropped_documents"].items():
            before = lost.get(cause, {"count": 0, "places": []})
            places = (before["places"] + entry["places"])[:MAX_PLACES]
            lost[cause] = {"count": before["count"] + entry["count"], "places": places}
    total["dropped_documents"] = lost
    capacity = total["rows"] * total["max_seq_len"]
    total["fill"] = total["slots"] / capacity if capacity else 0.0
    total["lengths"] = _lengths([(report["documents_in"], report["lengths"]) for report in reports])
    total["source"] = add_reports([report["source"] for report in reports])
    of_parts = zip(*(report["parts"] for report in reports), strict=True)
    total["parts"] = [
        {**parts[0], **{key: sum(part[key] for part in parts) for key in _PART_SUMS}} for parts in of_parts
    ]
    return _without_percentiles(total)


def save_ledger(folder: Path, reports: Sequence[Mapping[str, Any]], *, enabled: bool = True) -> dict[str, Any]:
    """The ledger of all ranks, written to `folder/ledger.json` by the one that has it enabled.

    Raises:
        EnvironmentFault: K05, the file cannot be written.
    """
    ledger = add_ledgers(reports)
    if enabled:
        try:
            (folder / "ledger.json").write_text(json.dumps(ledger, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            message = f"the ledger cannot be written: {error.strerror or error}"
            raise EnvironmentFault("K05", message, where=str(folder), fix="free disk space, then resume") from error
    return ledger


def check_truncation(report: Mapping[str, Any], allowed: float, *, is_end: bool) -> None:
    """Stops where truncation has robbed more than the allowed share of all documents of their targets.

    Args:
        report: the ledger so far; while it has few documents nothing is said, since some may well come together.
        allowed: the share.
        is_end: no more will come, so that few are judged too.

    Raises:
        DataError: D10.
    """
    lost = report["dropped_documents"].get("truncated_away", {"count": 0, "places": []})
    total = report["documents"] + lost["count"]
    if lost["count"] <= allowed * total or (total < _ENOUGH_TO_JUDGE and not is_end):
        return
    raise DataError(
        "D10",
        f"truncation at max_seq_len {report['max_seq_len']} removed every target of {lost['count']:,} of the {total:,} "
        f"documents so far ({100 * lost['count'] / total:.2g} %), the first at {', '.join(lost['places'][:3])}",
        fix="set over_length to split or drop, or raise max_truncated_away",
    )


Warnings = Iterator[tuple[str, str]]
"""What is told once: a name for it, and the text."""


def skipped_causes(report: Mapping[str, Any], told: Mapping[str, Any]) -> Warnings:
    """Causes for which rows are skipped, but for a filter, and those that were told already."""
    for cause, entry in report["source"]["skipped"].items():
        if cause != "filtered" and cause not in told:
            yield cause, f"rows are skipped ({cause}), the first at {entry['places'][0]}; the ledger counts them"


def short_parts(report: Mapping[str, Any], have_ended: Sequence[bool]) -> Warnings:
    """Sources that gave less than half of their share of the documents, and have not simply come to their end."""
    total = sum(part["documents"] for part in report["parts"])
    for part, has_ended in zip(report["parts"], have_ended, strict=True):
        due, found = part["share"] * total, part["documents"]
        if due < _ENOUGH_TO_MISS or found >= due / 2 or (has_ended and part["rows"]):
            continue
        why = "most of its rows are skipped or dropped" if part["rows"] else "no row of it passed its filter_fn"
        text = f"{part['name']} gave {found:,} of {total:,} documents so far, its weight is {part['share']:.1%}: {why}"
        yield f"short {part['name']}", f"{text}; the other sources take its place"


def barren_parts(report: Mapping[str, Any]) -> Warnings:
    """Sources of which nothing is packed."""
    for part in report["parts"]:
        if not part["documents"]:
            rows = (
                f"its first {part['rows']:,} rows" if part["rows"] else "its rows, of which none passed its filter_fn"
            )
            yield f"short {part['name']}", f"{part['name']} gave no document to train on of {rows}"


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for one in counts for key in one)
    return {key: sum(one.get(key, 0) for one in counts) for key in keys}


def _lengths(summaries: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Smallest, mean, largest and histogram of the documents of several summaries, each with their number."""
    filled = [(count, lengths) for count, lengths in summaries if count]
    if not filled:
        return {"min": 0, "mean": 0.0, "max": 0, "histogram": []}
    total = sum(count for count, _ in filled)
    bins: dict[tuple[int, int], int] = {}
    for _, lengths in filled:
        for low, high, count in lengths["histogram"]:
            bins[low, high] = bins.get((low, high), 0) + count
    return {
        "min": min(lengths["min"] for _, lengths in filled),
        "mean": sum(count * lengths["mean"] for count, lengths in filled) / total,
        "max": max(lengths["max"] for _, lengths in filled),
        "histogram": [[low, high, count] for (low, high), count in sorted(bins.items())],
    }


def _without_percentiles(report: dict[str, Any]) -> dict[str, Any]:
    kept = {key: report["lengths"][key] for key in ("min", "mean", "max", "histogram")}
    return {**report, "lengths": kept}
