"""Who sees a slot of a tree, from what each document shares with the one before it.

Legend: F fragments in the order of their rows, G segments.
"""

from dataclasses import dataclass

import numpy as np

from torchmask.data.fragments import Integers


def smaller_before(values: Integers) -> Integers:
    """[N] int64, the last place before each whose value is smaller; undefined where the value is 0.

    Places jump over each other's answers, so that a few passes over the undecided ones are enough.

    >>> smaller_before(np.array([0, 3, 5, 5, 2]))[1:].tolist()
    [0, 1, 1, 0]
    """
    before = np.arange(-1, len(values) - 1)
    active = np.flatnonzero(values > 0)
    while len(active):
        active = active[values[before[active]] >= values[active]]
        before[active] = before[before[active]]
    return before


def smaller_after(values: Integers) -> Integers:
    """[N] int64, the first place after each whose value is smaller, N where there is none.

    >>> smaller_after(np.array([0, 3, 5, 5, 2]))[1:].tolist()
    [4, 4, 4, 5]
    """
    ended = np.append(values, 0)[::-1]
    return len(values) - smaller_before(ended)[::-1][:-1]


@dataclass(frozen=True, eq=False)
class Segments:
    """Runs of slots of a row that are seen up to the same slot.

    Attributes:
        lengths: [G] int64, slots of each.
        ends: [G] int64, `visible_until` of these slots, counted from the first slot of all rows.
        first: [F + 1] int64, each fragment's first segment.
    """

    lengths: Integers
    ends: Integers
    first: Integers


def segments_of(starts: Integers, stops: Integers, shared: Integers, slots: Integers) -> Segments:
    """The segments of rows of trees.

    A token of a document is seen until the first later document that does not share it begins. That changes within
    the document's own slots at each length at which later ones leave it.

    Args:
        starts, stops: [F] int64, tokens that have slots, places in their documents.
        shared: [F] int64, of `TreePlan`.
        slots: [F + 1] int64, first slot of each fragment, counted over all rows.

    >>> s = segments_of(np.array([0, 2]), np.array([5, 4]), np.array([0, 2]), np.array([0, 5, 7]))
    >>> s.lengths.tolist(), s.ends.tolist()
    ([2, 3, 2], [7, 5, 7])
    """
    branch = np.flatnonzero(shared > 0)
    holder, after = smaller_before(shared)[branch], smaller_after(shared)[branch]
    owners = np.concatenate([np.arange(len(starts)), holder])
    upto = np.concatenate([stops, shared[branch]])
    ends = np.concatenate([slots[1:], slots[after]])
    _, first_of = np.unique(owners * (int(stops.max(initial=0)) + 1) + upto, return_index=True)
    owners, upto, ends = owners[first_of], upto[first_of], ends[first_of]
    begins_document = np.diff(owners, prepend=-1) > 0
    lengths = upto - np.where(begins_document, starts[owners], np.roll(upto, 1))
    return Segments(lengths, ends, np.append(np.flatnonzero(begins_document), len(owners)))
