"""The ledger: what became of every token, as a JSON-able dict and as text for a person.

`tokens_in = trained + masked + dropped`, and the weights before equal the weights after plus those dropped; both are
asserted whenever a ledger is made, so a lost token is a crash and not a surprise.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_PERCENTILES = (50, 90, 95, 99)
_EMPTY_WINDOWS = {"without_samples": "without a document", "without_targets": "without anything to train on"}


def length_summary(lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Mean, percentiles and a histogram over powers of two of [N] lengths, as a dict for JSON.

    >>> length_summary(np.array([3, 5, 8, 100]))["histogram"]
    [[2, 4, 1], [4, 8, 1], [8, 16, 1], [64, 128, 1]]
    """
    if not len(lengths):
        return {"min": 0, "mean": 0.0, **{f"p{p}": 0 for p in _PERCENTILES}, "max": 0, "histogram": []}
    marks = np.percentile(lengths, _PERCENTILES, method="higher").astype(int).tolist()
    octaves = np.frexp(lengths)[1]  # 2**(octave - 1) <= length < 2**octave
    counts = np.bincount(octaves).tolist()
    return {
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 2),
        **{f"p{p}": m for p, m in zip(_PERCENTILES, marks)},
        "max": int(lengths.max()),
        "histogram": [[2**o // 2, 2**o, count] for o, count in enumerate(counts) if count],
    }


def length_table(lengths: npt.NDArray[np.int64]) -> str:
    """The percentiles of [N] lengths on one line.

    >>> length_table(np.array([3, 5, 8, 100]))
    'tokens a document: min 3, p50 8, p90 100, p95 100, p99 100, max 100'
    """
    summary = length_summary(lengths)
    keys = ("min", *(f"p{p}" for p in _PERCENTILES), "max")
    return "tokens a document: " + ", ".join(f"{key} {summary[key]:,}" for key in keys)


def build_report(
    *,
    options: Mapping[str, Any],
    lengths: npt.NDArray[np.int64],
    counts: Mapping[str, int],
    dropped: Mapping[str, int],
    dropped_documents: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Any],
    eos: Mapping[str, int],
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """The ledger as a dict of plain values.

    Args:
        options: the packing options in use.
        lengths: [N] int64, tokens of every document, before anything was cut.
        counts: `documents`, `fragments`, `rows`, `trained`, `slots`, `slots_saved` (by shared prefixes) and `virtual`
            (stop tokens that are labels without a slot).
        dropped: tokens left out, by cause.
        dropped_documents: `{cause: {"count", "places"}}` of whole documents left out.
        weights: `before`, `after` and `dropped` (by cause): sums of the targets' weights; `boundary` of those between
            documents, which are in `after` only.
        eos: documents by what became of their stop: `trained_stops`, `masked_stops`, `without_stop`, `cut`.
        source: what the source says it read and skipped.
    """
    tokens_in = int(lengths.sum())
    slots, trained = counts["slots"], counts["trained"]
    capacity = counts["rows"] * options["max_seq_len"]
    report = {
        **options,
        "tokens_in": tokens_in,
        "trained": trained,
        "masked": slots + counts["slots_saved"] + counts["virtual"] - trained,
        "dropped": dict(dropped),
        "weights": dict(weights),
        "documents_in": len(lengths),
        "documents": counts["documents"],
        "dropped_documents": {cause: dict(entry) for cause, entry in dropped_documents.items()},
        "fragments": counts["fragments"],
        "rows": counts["rows"],
        "slots": slots,
        "slots_saved": counts["slots_saved"],
        "slots_without_sharing": slots + counts["slots_saved"],
        "fill": slots / capacity if capacity else 0.0,
        "eos": {"documents": counts["documents"], **eos},
        "straddlers": int(source.get("straddlers", 0)),
        "lengths": length_summary(lengths),
        "source": dict(source),
    }
    _assert_balanced(report)
    return report


def _assert_balanced(report: Mapping[str, Any]) -> None:
    """The invariants of the ledger; a failure is a bug of ours, whatever the data."""
    dropped = sum(report["dropped"].values())
    assert report["tokens_in"] == report["trained"] + report["masked"] + dropped, report
    assert report["masked"] >= 0, report
    lost_documents = sum(entry["count"] for entry in report["dropped_documents"].values())
    assert report["documents_in"] == report["documents"] + lost_documents, report
    weights, eos = report["weights"], report["eos"]
    after = weights["after"] - weights.get("boundary", 0.0) + sum(weights["dropped"].values())
    assert abs(weights["before"] - after) <= 1e-6 * max(1.0, abs(weights["before"])), report
    assert eos["documents"] == eos["trained_stops"] + eos["masked_stops"] + eos["without_stop"] + eos["cut"], report


def format_ledger(report: Mapping[str, Any], *, title: str = "data") -> str:
    """The ledger as a few aligned lines of plain text.

    Args:
        report: `PackedDataset.report`.
        title: the first word, such as `data` or `validation data`.
    """
    tokens = [("tokens in", report["tokens_in"], ""), ("trained", report["trained"], _share(report, "trained"))]
    tokens.append(("masked", report["masked"], f"{_share(report, 'masked')}  context, not targets"))
    for cause, count in report["dropped"].items():
        entry = report["dropped_documents"].get(cause)
        what = _documents(entry) if entry else "of documents that were kept"
        tokens.append((f"dropped: {cause}", count, f"{_percent(count, report['tokens_in'])}  {what}"))
    details = _details(report)
    width = max(len(name) for name, *_ in (*tokens, *details))
    digits = max(len(f"{count:,}") for _, count, _ in tokens)
    lines = [f"{title}: {_count(report['documents_in'], 'document')} of {_count(report['tokens_in'], 'token')}"]
    lines += [f"  {name:<{width}}  {count:>{digits},}  {note}".rstrip() for name, count, note in tokens]
    lines += [f"  {name:<{width}}  {text}" for name, text in details]
    return "\n".join(lines)


def short_place(place: str) -> str:
    """A place without its folders, for people; reports keep it whole.

    >>> short_place("/data/squad/train.jsonl:17")
    'train.jsonl:17'
    """
    return place.replace("\\", "/").rsplit("/", 1)[-1]


def _details(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    lengths, eos, weights = report["lengths"], report["eos"], report["weights"]
    known = [key for key in ("min", "p50", "p95", "p99", "max") if key in lengths]  # a stream's have no percentiles
    marks = ", ".join(f"{key} {lengths[key]:,}" for key in known)
    details = [("packs", _packs(report)), ("lengths", marks), ("stop tokens", _stops(eos))]
    if report["share_prefixes"]:
        details.insert(1, ("shared prefixes", _sharing(report)))
    if weights["before"] != report["trained"] or weights["after"] != report["trained"]:
        lost = sum(weights["dropped"].values())
        kept = weights["after"] - weights.get("boundary", 0.0)
        between = f", {weights['boundary']:,.6g} between documents" if "boundary" in weights else ""
        details.append(("target weight", f"{weights['before']:,.6g} = {kept:,.6g} kept + {lost:,.6g} dropped{between}"))
    if report["straddlers"]:
        details.append(("straddlers", f"{report['straddlers']:,} tokens cover both template and text"))
    for cause, entry in report["source"].get("skipped", {}).items():
        details.append(("rows skipped", f"{cause}: {_documents(entry, 'row')}"))
    if "windows" in report:
        details += _of_stream(report)
    return details


def _of_stream(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What only the ledger of a stream has: see `add_ledgers`."""
    details = []
    for name, found in report["source"].get("spans", {}).items():
        missed = found["rows_unmatched"] + found["rows_no_token"]
        if missed:
            places = f": {', '.join(map(short_place, found['places'][:3]))}" if found["places"] else ""
            details.append(("rules unmatched", f"{name} found nothing to select in {_count(missed, 'row')}{places}"))
    windows = report["windows"]
    empty = [f"{windows[key]:,} {words}" for key, words in _EMPTY_WINDOWS.items() if windows.get(key)]
    details.append(("windows", ", ".join([f"{windows.get('packed', 0):,} packed", *empty])))
    total = sum(part["documents"] for part in report["parts"])
    for part in report["parts"]:
        share, rows = 100 * part["documents"] / max(total, 1), _count(part["rows"], "row")
        text = f"{part['name']}: {part['documents']:,} documents packed of {rows}, {share:.4g} % of all"
        details.append(("source", f"{text}; its weight is {100 * part['share']:.4g} % of the rows"))
    return details


def _packs(report: Mapping[str, Any]) -> str:
    fragments, rows = report["fragments"], _count(report["rows"], "row")
    cut = f" cut into {fragments:,} fragments" if fragments > report["documents"] else ""
    if report["strategy"] == "none":
        return f"none: {rows} of one {'fragment' if cut else 'document'} each, up to {report['max_seq_len']:,} slots"
    capacity = f"{rows} of {report['max_seq_len']:,} slots, fill {100 * report['fill']:.2f} % ({report['strategy']})"
    return f"{_count(report['documents'], 'document')}{cut} in {capacity}"


def _sharing(report: Mapping[str, Any]) -> str:
    saved, without = report["slots_saved"], report["slots_without_sharing"]
    times = without / max(report["slots"], 1)
    return f"{report['slots']:,} slots in place of {without:,}: {saved:,} saved, {times:.2f} times fewer"


def _stops(eos: Mapping[str, int]) -> str:
    parts = [f"{eos['trained_stops']:,} of {_count(eos['documents'], 'document')} end in a trained stop token"]
    named = {
        "masked_stops": "not trained",
        "cut": "cut off",
        "without_stop": "have none",
        "terminated": "end in a stop token put in place of a cut-off token",
        "virtual": "take no slot",
        "boundaries": "predict the next document's first token",
    }
    parts += [f"{eos[key]:,} {words}" for key, words in named.items() if eos.get(key)]
    return ", ".join(parts)


def _documents(entry: Mapping[str, Any], noun: str = "document") -> str:
    places: Sequence[str] = entry["places"][:3]
    more = ", ..." if entry["count"] > len(places) else ""
    return f"{_count(entry['count'], noun)}: {', '.join(map(short_place, places))}{more}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _share(report: Mapping[str, Any], key: str) -> str:
    return _percent(report[key], report["tokens_in"])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):6.2f} %"
