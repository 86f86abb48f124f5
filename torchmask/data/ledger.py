"""What became of every token, weight and document of the samples when they were packed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.data.columns import MAX_PLACES
from torchmask.data.fragments import Fragments, Targets
from torchmask.data.report import build_report
from torchmask.data.sample import Samples
from torchmask.data.selection import CAUSES, Selection


def build_ledger(
    samples: Samples,
    targets: Targets,
    selection: Selection,
    *,
    options: Mapping[str, Any],
    num_rows: int,
    num_slots: int,
    num_boundaries: int,
) -> dict[str, Any]:
    """The report of a selection: every token, weight and document of `samples` under one heading.

    Args:
        num_slots: of all rows; fewer than the tokens kept where prefixes are shared.
        num_boundaries: labels between two documents (E2), which are no document's own.
    """
    fragments, causes, lengths = selection.fragments, selection.causes, samples.lengths
    kept = causes == 0
    slots_of = np.bincount(fragments.samples, fragments.lengths, len(samples)).astype(np.int64)
    weight_before, weight_after = targets.weight(Fragments.whole(lengths)), targets.weight(fragments)
    truncated = int((lengths - slots_of - selection.virtual - selection.trimmed)[kept].sum())
    dropped, dropped_weight, documents = {}, {}, {}
    for code, cause in enumerate(CAUSES):
        lost = np.flatnonzero(causes == code)
        if code and len(lost):
            dropped[cause] = int(lengths[lost].sum())
            dropped_weight[cause] = float(weight_before[lost].sum())
            places = [samples.where(int(i)) for i in lost[:MAX_PLACES]]
            documents[cause] = {"count": len(lost), "places": places}
    if truncated:
        dropped["truncated"] = truncated
        dropped_weight["truncated"] = float(weight_before[kept].sum() - weight_after.sum())
    if trimmed := int(selection.trimmed[kept].sum()):
        dropped["trimmed"] = trimmed
    weights: dict[str, Any] = {
        "before": float(weight_before.sum()),
        "after": float(weight_after.sum()),
        "dropped": dropped_weight,
    }
    if num_boundaries:
        weights["boundary"] = num_boundaries * options["eos_policy"]["boundary_weight"]
        weights["after"] += weights["boundary"]
    return build_report(
        options=options,
        lengths=lengths,
        counts={
            "documents": int(kept.sum()),
            "fragments": len(fragments),
            "rows": num_rows,
            "trained": int(targets.count(fragments).sum()) + num_boundaries,
            "slots": num_slots,
            "slots_saved": int(fragments.lengths.sum()) - num_slots,
            "virtual": int(selection.virtual.sum()),
        },
        dropped=dropped,
        dropped_documents=documents,
        weights=weights,
        eos=_stops(samples, targets, selection, num_boundaries),
        source=samples.report,
    )


def ledger_of_nothing(samples: Samples, causes: npt.NDArray[np.uint8], *, options: Mapping[str, Any]) -> dict[str, Any]:
    """The report of samples of which none is packed, for these causes ([N] uint8, index into `CAUSES`)."""
    nothing = Fragments.whole(samples.lengths).select(np.zeros(0, np.int64))
    zeros = np.zeros(len(samples), np.int64)
    selection = Selection(nothing, nothing, causes, zeros, zeros.astype(bool), zeros.astype(bool))
    counts = {"num_rows": 0, "num_slots": 0, "num_boundaries": 0}
    return build_ledger(samples, Targets(samples), selection, options=options, **counts)


def _stops(samples: Samples, targets: Targets, selection: Selection, num_boundaries: int) -> dict[str, int]:
    """Documents by what became of their stop token, and what else was done at their edges where anything was."""
    fragments, kept = selection.fragments, selection.causes == 0
    stops = samples.stops[fragments.samples].astype(np.int64)
    # A stop token in place of a cut-off token is trained if a slot of the fragment predicts that place.
    made = fragments.terminated & targets.holds(fragments, np.where(fragments.terminated, fragments.stops - 1, -1))
    trained = int((targets.holds(fragments, stops) | made).sum())
    without = int((samples.stops[kept] < 0).sum())
    cut = int(selection.cut.sum()) - int(made.sum())
    counts = {
        "trained_stops": trained,
        "masked_stops": int(kept.sum()) - trained - without - cut,
        "without_stop": without,
        "cut": cut,
    }
    others = {
        "terminated": int(fragments.terminated.sum()),
        "virtual": int(selection.virtual.sum()),
        "boundaries": num_boundaries,
    }
    return counts | {name: count for name, count in others.items() if count}
