"""Several data sets as one, in given proportions.

Documents are interleaved evenly and not drawn by lot: after any number of documents, each data set has given about its
share (of two data sets, to within one). So proportions hold in every stretch of the result, and a place in it is a
number and not a generator's state. What is random, from the seed, is which of its documents a data set gives next.

Legend: K data sets, N documents of the mixture.
"""

import difflib
import heapq
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from torchmask.data.rendering import Tokenizer
from torchmask.data.sample import Samples
from torchmask.errors import ConfigError

Stop = Literal["first_exhausted", "all_exhausted"]
_OWN_KEYS = ("builder", "weight")


@dataclass(frozen=True)
class Part:
    """One data set of a mixture, named and checked.

    Attributes:
        builder: a function of torchmask.data, `alpaca_dataset` and the like.
        weight: its share of the documents, relative to the other weights.
        arguments: of the builder, beside the tokenizer.
    """

    builder: Callable[..., Samples]
    weight: float
    arguments: dict[str, Any]


def read_parts(datasets: Sequence[Mapping[str, Any]]) -> list[Part]:
    """The data sets of a mixture as YAML writes them: `{builder: alpaca_dataset, weight: 0.7, source: a.json}`.

    Raises:
        ConfigError: none of them, a builder that does not exist (C06), an argument that it does not take (C08), a
            weight that is not above 0 (C13).
    """
    if not datasets:
        raise ConfigError("C05", "a mixture needs datasets", fix="datasets: [{builder: alpaca_dataset, source: ...}]")
    return [_read_part(dataset, f"datasets[{i}]") for i, dataset in enumerate(datasets)]


def _read_part(dataset: Mapping[str, Any], where: str) -> Part:
    from torchmask import data

    known = [name for name in data.__all__ if name.endswith("_dataset") and name != "mixture_dataset"]
    name = dataset.get("builder")
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        fix = f"choose one of {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")
        raise ConfigError("C06", f"builder is {name!r}", where=where, fix=fix)
    weight = dataset.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ConfigError("C13", f"weight is {weight!r}", where=where, fix="give a number above 0")
    builder: Callable[..., Samples] = getattr(import_module("torchmask.data"), name)
    arguments = {key: value for key, value in dataset.items() if key not in _OWN_KEYS}
    taken = [p for p in inspect.signature(builder).parameters if p != "tokenizer"]
    for key in arguments:
        if key not in taken:
            near = difflib.get_close_matches(key, taken, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"accepted are {', '.join(taken)}"
            raise ConfigError("C08", f"{name} takes no argument {key!r}", where=where, fix=fix)
    return Part(builder, float(weight), arguments)


def mixture_dataset(
    tokenizer: Tokenizer,
    *,
    datasets: Sequence[Mapping[str, Any]],
    seed: int = 0,
    stop: Stop = "first_exhausted",
    num_workers: int = 0,
    cache: bool | str = False,
) -> Samples:
    """Samples of several data sets, interleaved by weight.

    A data set that is asked for more documents than it has begins again, shuffled anew (`all_exhausted`); one that is
    asked for fewer gives a random part of them. A run takes the same mixture in every epoch and resumes in it from one
    integer, as in any other data set.

    Args:
        tokenizer: a tokenizer.
        datasets: `{builder: NAME, weight: W, ...}` with the builder's own arguments.
        seed: of the order in which each data set gives its documents.
        stop: how long it is: `first_exhausted` = until a data set has given all it has, so that no document comes
            twice; `all_exhausted` = until each has.
        num_workers, cache: of the data sets that do not say it themselves.

    Raises:
        ConfigError: as `read_parts`.
        DataError, ConfigError: as the builders.
    """
    if stop not in ("first_exhausted", "all_exhausted"):
        raise ConfigError("C06", f"stop is {stop!r}", fix="choose first_exhausted or all_exhausted")
    common = {"num_workers": num_workers, "cache": cache}
    parts = read_parts(datasets)
    built = [part.builder(tokenizer, **{**common, **part.arguments}) for part in parts]
    weights = [part.weight for part in parts]
    total = mixture_size([len(samples) for samples in built], weights, stop=stop)
    of = interleaved(weights, total)
    first = np.cumsum([0] + [len(samples) for samples in built])
    chosen = np.empty(total, np.int64)
    for k, samples in enumerate(built):
        mine = of == k
        chosen[mine] = first[k] + shuffled_passes(len(samples), int(mine.sum()), seed=(seed, k))
    together = Samples.concatenate(built)
    shares = [
        {"builder": p.builder.__name__, "weight": p.weight, "documents": len(s), "given": int((of == k).sum())}
        for k, (p, s) in enumerate(zip(parts, built, strict=True))
    ]
    return replace(together.select(chosen), report={**together.report, "samples": total, "mixture": shares})


def mixture_size(sizes: Sequence[int], weights: Sequence[float], *, stop: Stop) -> int:
    """Documents of a mixture of data sets of these sizes.

    >>> mixture_size([100, 100], [3, 1], stop="first_exhausted"), mixture_size([100, 100], [3, 1], stop="all_exhausted")
    (133, 399)
    """
    shares, counts = np.array(weights) / np.sum(weights), np.array(sizes)

    def given(total: int) -> npt.NDArray[np.int64]:
        return np.bincount(interleaved(weights, total), minlength=len(counts))

    # What is given differs from its share by less than 1, so both searches take a few steps.
    if stop == "first_exhausted":
        total = int(((counts + 1) / shares).min()) + 1
        while (given(total) > counts).any():
            total -= 1
        return total
    total = max(int(((counts - 1) / shares).max()), 0)
    while (given(total) < counts).any():
        total += 1
    return total


def interleaved(weights: Sequence[float], total: int) -> npt.NDArray[np.int64]:
    """[N] int64, which data set each of `total` documents is of.

    The i-th document of a data set of share p is due at time (i + 1/2) / p; documents come in the order of their times.

    >>> interleaved([3, 1], 8).tolist()
    [0, 0, 1, 0, 0, 0, 1, 0]
    """
    shares = np.array(weights, np.float64) / np.sum(weights)
    counts = np.ceil(shares * total).astype(np.int64) + 1
    of = np.repeat(np.arange(len(shares)), counts)
    nth = np.concatenate([np.arange(count) for count in counts])
    return of[np.argsort((nth + 0.5) / shares[of], kind="stable")[:total]]


def given_before(weights: Sequence[float], total: int) -> list[int]:
    """How many of the first `total` documents of a stream are of each part: O(K log K), however far that is.

    A tree is made of the parts as Huffman's code makes it, and each node splits what it is given between its two
    children, rounded, in whole numbers. So the counts add up to `total`, none falls when `total` grows, and each is its
    share to within two: a node that has children takes at most two thirds of its parent's error, by Huffman's order,
    and rounding adds one half. Of two parts each is its share to within one half.

    >>> [given_before([0.7, 0.3], total) for total in (1, 2, 3, 10, 10**12)]
    [[1, 0], [1, 1], [2, 1], [7, 3], [700000000000, 300000000000]]
    """
    tree: list[tuple[Fraction, int, Any]] = [(Fraction(weight), i, None) for i, weight in enumerate(weights)]
    heapq.heapify(tree)
    for number in range(len(weights), 2 * len(weights) - 1):
        small, large = heapq.heappop(tree), heapq.heappop(tree)
        heapq.heappush(tree, (small[0] + large[0], number, (large, small)))
    counts = [0] * len(weights)
    open_nodes = [(tree[0], total)]
    while open_nodes:
        (weight, number, children), count = open_nodes.pop()
        if children is None:
            counts[number] = count
            continue
        large, small = children
        share = large[0] / weight
        first = (2 * share.numerator * count + share.denominator) // (2 * share.denominator)
        open_nodes += [(large, first), (small, count - first)]
    return counts


def shuffled_passes(size: int, count: int, *, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """[count] int64: places in a data set of `size`, each once before any comes again, every pass in another order."""
    passes = [
        np.argsort(np.random.Philox(np.random.SeedSequence((*seed, n))).random_raw(size), kind="stable")
        for n in range(-(-count // size) if size else 0)
    ]
    return np.concatenate([np.zeros(0, np.int64), *passes])[:count]
