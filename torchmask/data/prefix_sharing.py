"""Shared-prefix packs: documents that begin alike are laid out as a tree, so that what they share takes slots once.

A row is its documents in lexicographic order. Each takes slots only for the tokens that it does not share with the
document before it, so that a document is its own branch after a path through earlier ones, and a row's documents and
the common lengths of neighbours say everything about its trees, of any depth. Who sees a slot follows from them, too.

All documents of the data set are sorted once by their unsupervised prefixes; a group of documents that begin alike is
then a run of that order. A group that fits into a row is one item of a best-fit plan. A larger one is cut at its
first fork, each part packed into what the common part leaves of a row, and the common part repeated in every row; parts
that are too large themselves are cut first.

Legend: F fragments, N of them in lexicographic order, R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchmask.data.fragments import Fragments, Integers, Targets
from torchmask.data.plan import Plan, number_rows, plan_packs
from torchmask.data.prefix_order import MIN_SHARED, forks_of, innermost_forks, shareable, sort_prefixes
from torchmask.data.sample import Samples

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TreePlan:
    """Rows of trees.

    Attributes:
        plan: the fragments of each row, depth first.
        shared: [F] int64 in the order of the plan: how many of a fragment's first tokens lie in slots of fragments
            before it in its row.
    """

    plan: Plan
    shared: Integers


def plan_trees(
    samples: Samples,
    fragments: Fragments,
    targets: Targets,
    *,
    max_seq_len: int,
    strategy: str = "best_fit",
    max_share: int | None = None,
    words: Words | None = None,
) -> TreePlan:
    """Rows in which documents with a common prefix share its slots, as few slots in all as a greedy plan finds.

    Args:
        strategy: `best_fit` or `first_fit`, for groups of documents in rows and for parts of a group in its rows.
        max_share: at most so many documents of one prefix in a row. A document counts towards the longest prefix that
            it shares with another; prefixes fewer than `MIN_SHARED` tokens longer than another count as that one. So
            it bounds the questions of one passage, not those below one system prompt.
        words: [F] uint64, random; groups of one size are taken in their order. None = in the data's order.
    """
    order, common = sort_prefixes(samples, fragments, shareable(fragments, targets))
    lengths = fragments.lengths[order]
    if words is None:
        words = np.arange(len(fragments), dtype=np.uint64)
    words = words[order]
    row_of = np.empty(len(order), np.int64)
    num_rows = 0
    for chosen in _rounds(common, max_share):
        between = common.copy() if len(chosen) == len(common) else _in_subset(common, chosen)
        rows = _assign(lengths[chosen], between, words[chosen], max_seq_len, strategy)
        row_of[chosen] = rows + num_rows
        num_rows += int(rows.max(initial=-1)) + 1
    of_fragment = np.empty(len(order), np.int64)
    of_fragment[order] = row_of
    plan = number_rows(of_fragment)
    return _depth_first(plan, order, common)


def _depth_first(plan: Plan, order: Integers, common: Integers) -> TreePlan:
    """The plan with each row's fragments in lexicographic order, and what each shares with the one before it."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    rows = np.repeat(np.arange(len(plan)), np.diff(plan.offsets))
    ranks = rank[plan.order]
    ranks = ranks[np.lexsort((ranks, rows))]
    shared = np.zeros(len(ranks), np.int64)
    follows = np.ones(len(ranks), bool)
    follows[plan.offsets[:-1]] = False
    at = np.flatnonzero(follows)
    shared[at] = _range_min(common, ranks[at - 1] + 1, ranks[at])
    return TreePlan(Plan(order[ranks], plan.offsets), shared)


# Groups in rows


def _assign(
    lengths: Integers, common: Integers, words: Words, max_seq_len: int, strategy: str
) -> npt.NDArray[np.int64]:
    """[N] int64, the row of each document of a lexicographic order (all columns [N])."""
    begins = np.flatnonzero(common == 0)
    counts = np.diff(np.append(begins, len(common)))
    item_of = np.repeat(np.arange(len(begins)), counts)
    sizes = np.add.reduceat(lengths - common, begins)
    more: list[int] = []
    for group in np.flatnonzero(sizes > max_seq_len).tolist():
        first = int(begins[group])
        members = slice(first, first + int(counts[group]))
        parts = _cut_group(lengths[members], common[members], words[members], max_seq_len, strategy)
        for n, (part, size) in enumerate(parts):
            item = len(sizes) + len(more)
            if n == 0:
                item, sizes[group] = group, size
            else:
                more.append(size)
            item_of[first + part] = item
    sizes = np.append(sizes, np.array(more, np.int64))
    firsts = np.zeros(len(sizes), np.int64)
    firsts[item_of[::-1]] = np.arange(len(item_of) - 1, -1, -1)
    return _rows_of(sizes, words[firsts], max_seq_len, strategy)[item_of]


def _rows_of(sizes: Integers, words: Words, capacity: int, strategy: str) -> npt.NDArray[np.int64]:
    """[M] int64, the row of each of the items, which are offered in the order of their words."""
    by_word = np.argsort(words, kind="stable")
    plan = plan_packs(sizes[by_word], capacity, strategy)
    rows = np.empty(len(sizes), np.int64)
    rows[by_word[plan.order]] = np.repeat(np.arange(len(plan)), np.diff(plan.offsets))
    return rows


@dataclass(eq=False)
class _Fork:
    """A run of documents that is too large for a row, cut where they first differ."""

    start: int
    stop: int
    base: int  # tokens that the rest of the tree above it has in common with it
    parent: int
    depth: int
    parts: list[Integers]
    sizes: list[int]  # of the parts, tokens beyond `depth`


def _cut_group(
    lengths: Integers, common: Integers, words: Words, max_seq_len: int, strategy: str
) -> list[tuple[Integers, int]]:
    """A group cut into parts that fit into a row: members of each ([m] int64) and its slots."""
    own = np.concatenate([[0], np.cumsum(lengths - common)])
    forks = [_Fork(0, len(lengths), 0, -1, 0, [], [])]
    for i, fork in enumerate(forks):  # grows while it is walked: a fork's own large children come after it
        inside = common[fork.start + 1 : fork.stop]
        fork.depth = int(inside.min())
        cuts = fork.start + 1 + np.flatnonzero(inside == fork.depth)
        starts, stops = np.append(fork.start, cuts), np.append(cuts, fork.stop)
        sizes = own[stops] - own[starts] + common[starts] - fork.depth
        for a, b, size in zip(starts.tolist(), stops.tolist(), sizes.tolist()):
            if size <= max_seq_len - fork.depth:
                fork.parts.append(np.arange(a, b))
                fork.sizes.append(size)
            else:
                forks.append(_Fork(a, b, fork.depth, i, 0, [], []))
    result: list[tuple[Integers, int]] = []
    for fork in reversed(forks):
        sizes = np.array(fork.sizes, np.int64)
        firsts = np.array([part[0] for part in fork.parts])
        rows = _rows_of(sizes, words[firsts], max_seq_len - fork.depth, strategy)
        for row in range(int(rows.max()) + 1):
            chosen = np.flatnonzero(rows == row)
            part = np.concatenate([fork.parts[i] for i in chosen])
            size = int(sizes[chosen].sum()) + fork.depth - fork.base
            if fork.parent < 0:
                result.append((part, size))
            else:
                forks[fork.parent].parts.append(part)
                forks[fork.parent].sizes.append(size)
    return result


def _rounds(common: Integers, max_share: int | None) -> Iterator[Integers]:
    """Ranks ([m] int64, ascending) of documents that may share rows with each other.

    Without a bound that is all of them. With one, each prefix's documents go `max_share` at a time into rounds, and a
    row has documents of one round only; prefixes start in different rounds, so that rounds are about equally large.
    """
    if max_share is None:
        yield np.arange(len(common))
        return
    prefix = _prefix_of(common)
    alone = prefix < 0
    prefix[alone] = prefix.max(initial=-1) + 1 + np.arange(int(alone.sum()))
    by_prefix = np.argsort(prefix, kind="stable")
    sizes = np.bincount(prefix)
    sizes = sizes[sizes > 0]
    shares = -(-sizes // max_share)
    num_rounds = int(shares.max(initial=1))
    starts = (np.cumsum(shares) - shares) % num_rounds
    nth = np.arange(len(prefix)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    round_of = np.empty(len(prefix), np.int64)
    round_of[by_prefix] = (np.repeat(starts, sizes) + nth // max_share) % num_rounds
    in_rounds = np.argsort(round_of, kind="stable")
    yield from np.split(in_rounds, np.cumsum(np.bincount(round_of, minlength=num_rounds))[:-1])


def _prefix_of(common: Integers) -> Integers:
    """[N] int64, a number of the longest prefix that each document shares (as `max_share` counts), -1 = none."""
    result = np.full(len(common), -1)
    forks = np.flatnonzero(common > 0)
    if not len(forks):
        return result
    nodes, _ = forks_of(common, forks)
    depths = nodes[:, 2].tolist()
    innermost = innermost_forks(nodes, lambda n, base: base == 0 or depths[n] - base >= MIN_SHARED)
    for n in np.flatnonzero(innermost == np.arange(len(nodes))).tolist():  # inner ones after those around them
        result[nodes[n, 0] : nodes[n, 1]] = n
    return result


def _in_subset(common: Integers, chosen: Integers) -> Integers:
    """[m] int64, `common` among the chosen ranks only ([m], ascending)."""
    result = np.zeros(len(chosen), np.int64)
    result[1:] = _range_min(common, chosen[:-1] + 1, chosen[1:])
    return result


def _range_min(values: Integers, first: Integers, last: Integers) -> Integers:
    """[M] int64, the minimum of `values[first:last + 1]` for each pair, by doubling windows."""
    result = np.empty(len(first), np.int64)
    level = np.frexp(last - first + 1)[1] - 1  # floor of the binary logarithm
    window = values
    for k in range(int(level.max(initial=-1)) + 1):
        at = np.flatnonzero(level == k)
        result[at] = np.minimum(window[first[at]], window[last[at] - (1 << k) + 1])
        window = np.minimum(window[: -(1 << k)], window[1 << k :])
    return result
