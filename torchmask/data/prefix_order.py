"""Documents in the order of their untrained prefixes, and what neighbours in that order have in common.

Legend: F fragments, N of them in lexicographic order, n forks.
"""

from collections.abc import Callable, Iterator

import numpy as np

from torchmask.data.fragments import Fragments, Integers, Targets
from torchmask.data.sample import Samples
from torchmask.data.segments import smaller_after, smaller_before
from torchmask.messages import MaskFlag

MIN_SHARED = 16
"""So many tokens are worth a fork of a tree whatever the documents' lengths."""
MIN_SHARED_PART = 8
"""Fewer are worth one where they are at least the 8th part of what the documents have left, on average."""
_CHUNK = 1 << 21  # tokens compared at a time, so that temporary arrays stay small


def shareable(fragments: Fragments, targets: Targets) -> Integers:
    """[F] int64, how many first tokens of each fragment may be shared.

    The slot before the first target is the document's own, so that no slot ever has two labels.
    """
    some = targets.count(fragments) > 0
    shareable = fragments.stops - 1
    shareable[some] = targets.first(fragments.select(some)) - 1
    shareable[(fragments.starts > 0) | fragments.keeps_first] = 0
    return np.maximum(shareable, 0)


def sort_prefixes(samples: Samples, fragments: Fragments, prefixes: Integers) -> tuple[Integers, Integers]:
    """The order of all prefixes and how long neighbours agree.

    Tokens and ATTENTION flags must agree for a token to be shared. Agreement over a few tokens more (a BOS, a role
    header, the first words of two questions) counts as none: it would tie documents together that have nothing else in
    common, and cost an attention kernel more than the slots that it saves.

    Args:
        prefixes: [F] int64, how many of a fragment's first tokens it may share.

    Returns:
        order: [N] int64, fragments sorted by prefix, those with the same one in data order.
        common: [N] int64, tokens that each shares with the one before it in that order, the first 0.
    """
    keys: list[bytes] = []
    for chunk, base in _document_chunks(samples, fragments):
        cells = (samples.tokens[chunk].astype(">u4") << np.uint32(1)) | (
            (samples.mask[chunk] & np.uint8(MaskFlag.ATTENTION)) != 0
        )
        text = cells.astype(">u4").tobytes()  # big-endian, so that bytes sort as the numbers do
        begins = (samples.offsets[fragments.samples[base]] + fragments.starts[base] - chunk.start) * 4
        keys += [text[a:b] for a, b in zip(begins.tolist(), (begins + prefixes[base] * 4).tolist())]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    del keys
    common = np.zeros(len(order), np.int64)
    common[1:] = _common_lengths(samples, fragments, prefixes, order[:-1], order[1:])
    return order, _worthwhile(common, fragments.lengths[order])


def _worthwhile(common: Integers, lengths: Integers) -> Integers:
    """`common` ([N], of `sort_prefixes`) without forks that save little: they take what the fork above them has."""
    common = np.where(common < 2, 0, common)  # a common first token, BOS, is nothing in common
    forks = np.flatnonzero(common > 0)
    if not len(forks):
        return common
    nodes, fork_of = forks_of(common, forks)
    before = np.concatenate([[0], np.cumsum(lengths)])
    left, right, depth = nodes.T
    totals, counts, depths = (before[right] - before[left]).tolist(), (right - left).tolist(), depth.tolist()

    def saves(n: int, base: int) -> bool:
        more = depths[n] - base
        return more >= MIN_SHARED or MIN_SHARED_PART * more * counts[n] >= totals[n] - counts[n] * base

    kept = innermost_forks(nodes, saves)
    result = common.copy()
    result[forks] = np.where(kept < 0, 0, depth[kept])[fork_of]
    return result


def innermost_forks(nodes: Integers, keeps: Callable[[int, int], bool]) -> Integers:
    """[n] int64, for each fork of `forks_of` the innermost that is kept of it and those around it; -1 = none.

    Args:
        nodes: [n, 3] int64, of `forks_of`.
        keeps: whether fork n is kept where those kept around it have so many tokens in common (0 = there are none).
    """
    result = np.full(len(nodes), -1)
    rights, depths = nodes[:, 1].tolist(), nodes[:, 2].tolist()
    above: list[int] = []
    for n, left in enumerate(nodes[:, 0].tolist()):
        while above and rights[above[-1]] <= left:
            above.pop()
        if keeps(n, depths[above[-1]] if above else 0):
            above.append(n)
        if above:
            result[n] = above[-1]
    return result


def forks_of(common: Integers, forks: Integers) -> tuple[Integers, Integers]:
    """The forks of the trees, those above before those below, and the node of each of the ranks `forks` ([m]).

    Returns:
        [n, 3] int64, first rank, one past the last rank and common length of the documents below each fork; [m] int64.
    """
    lefts, rights = smaller_before(common)[forks], smaller_after(common)[forks]
    table, node_of = np.unique(np.stack([lefts, -rights, common[forks]], axis=1), axis=0, return_inverse=True)
    table[:, 1] *= -1
    return table, node_of.reshape(-1)


def _document_chunks(samples: Samples, fragments: Fragments) -> Iterator[tuple[slice, slice]]:
    """Pieces of the flat columns and the fragments that begin and end in each, in data order.

    Fragments follow each other in data order, so that what lies between the first and the last is theirs.
    """
    begins = samples.offsets[fragments.samples] + fragments.starts
    ends = begins + fragments.lengths
    first = 0
    while first < len(begins):
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + _CHUNK, side="right")))
        yield slice(int(begins[first]), int(ends[last - 1])), slice(first, last)
        first = last


def _common_lengths(
    samples: Samples, fragments: Fragments, prefixes: Integers, left: Integers, right: Integers
) -> Integers:
    """[M] int64, the length of the common prefix of each pair of fragments (`left`, `right`: [M])."""
    begins = samples.offsets[fragments.samples] + fragments.starts
    limit = np.minimum(prefixes[left], prefixes[right])
    ends = np.cumsum(limit)
    result = limit.copy()
    hides = bool((samples.mask & np.uint8(MaskFlag.ATTENTION)).any())
    first = 0
    while first < len(left):
        done = int(ends[first] - limit[first])
        last = max(first + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        sizes = limit[first:last]
        offsets = ends[first:last] - sizes - done
        steps = np.arange(int(sizes.sum()))
        a = np.repeat(begins[left[first:last]] - offsets, sizes) + steps
        b = np.repeat(begins[right[first:last]] - offsets, sizes) + steps
        differs = samples.tokens.take(a) != samples.tokens.take(b)
        if hides:
            differs |= ((samples.mask.take(a) ^ samples.mask.take(b)) & np.uint8(MaskFlag.ATTENTION)) != 0
        places = np.append(np.flatnonzero(differs), len(differs))
        nearest = places[np.searchsorted(places, offsets)] - offsets
        result[first:last] = np.minimum(nearest, sizes)
        first = last
    return result
