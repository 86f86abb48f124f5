"""What a step's loss is divided by, as each fragment's share of it.

Legend: F fragments.
"""

import numpy as np
import numpy.typing as npt

from torchmask.data.fragments import Integers

NORMALIZATIONS = ("tokens", "weights", "sequence", "none")


def normalizers(
    kind: str,
    *,
    documents: Integers,
    counts: Integers,
    weights: npt.NDArray[np.float64],
    boundary: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32] | None]:
    """Each fragment's share of what the loss is divided by, and what its labels' weights are multiplied with.

    Args:
        kind: one of `NORMALIZATIONS`. `sequence` makes the loss the mean over documents of each document's mean over
            its targets, wherever its fragments are; `none` gives no share to any.
        documents: [F] int64, the document of each fragment.
        counts, weights: [F], targets of each fragment and the sum of their weights.
        boundary: [F] float64, the weight of the label between a fragment's document and the next, 0 for none.

    Returns:
        [F] float64, and [F] float32 or None for 1.

    >>> normalizers("sequence", documents=np.array([0, 0, 1]), counts=np.array([1, 3, 2]), weights=np.ones(3), \
boundary=np.zeros(3))
    (array([0.25, 0.75, 1.  ]), array([0.25, 0.25, 0.5 ], dtype=float32))
    """
    if kind == "sequence":
        of_document = np.maximum(np.bincount(documents, counts), 1)[documents]
        return counts / of_document, (1 / of_document).astype(np.float32)
    if kind == "tokens":
        return (counts + (boundary != 0)).astype(np.float64), None
    return (weights + boundary if kind == "weights" else np.zeros(len(counts))), None
