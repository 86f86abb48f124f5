"""One tokenised document, and the columnar store of many.

A `Sample` is what a tokenizer and the mask policy make of a row: whole, unshifted, and target-aligned, which means
that `mask[i]` and `weights[i]` speak about token i *as a target*. A million of them are kept as a few flat arrays
(`Samples`) and not as a million objects: 6 bytes a token, a slice is a view, and the same arrays can lie in a
memory-mapped file. The price is that a store is written once, by sample_builder.py, and not changed afterwards.

Legend: n tokens of one sample, N samples, S tokens of all samples.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from torchmask.data.columns import checked, checked_rules
from torchmask.data.eos import DEFAULT_EOS, EosPolicy
from torchmask.messages import MaskFlag


@dataclass(frozen=True, eq=False)
class Sample:
    """One document: its tokens and what is trained of them.

    Args:
        tokens: [n] int32 token ids; lists and other integer arrays are converted.
        mask: [n] uint8 of `MaskFlag`; a list of bool (True = masked, torchtune's) is a valid mask.
        weights: [n] float32, scales the loss of token i as a target; None = 1 everywhere. A weight of 0 masks.
        rules: [n] uint8, which rule decided the token: an index into the store's `Samples.rule_names`; None = unknown.

    Raises:
        ValueError: not one-dimensional, lengths that differ, ids that are no int32 >= 0, unknown flags, a weight that
            is not finite.

    >>> s = Sample([1, 5, 6, 2], [True, True, False, False])
    >>> s.mask.tolist(), s.trained.tolist()
    ([1, 1, 0, 0], [False, False, True, True])
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32] | None = None
    rules: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        tokens, mask, weights = checked(self.tokens, self.mask, self.weights)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "rules", None if self.rules is None else checked_rules(self.rules, len(tokens)))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """[n] bool: which tokens are targets. The first has no predecessor and so is never predicted."""
        return (self.mask & MaskFlag.LOSS) == 0


def _view(tokens: Any, mask: Any, weights: Any, rules: Any) -> Sample:
    """A Sample over columns that were checked when they were stored."""
    sample = object.__new__(Sample)
    object.__setattr__(sample, "tokens", tokens)
    object.__setattr__(sample, "mask", mask)
    object.__setattr__(sample, "weights", weights)
    object.__setattr__(sample, "rules", rules)
    return sample


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Sequence[Sample]):
    """Many samples in a few flat arrays; `samples[i]` is a `Sample` of views, `samples[a:b]` a `Samples` of views.

    Made by `SamplesBuilder`, `Samples.from_samples` or `Samples.concatenate`; not changed afterwards.

    Attributes:
        tokens: [S] int32, all documents one after the other.
        mask: [S] uint8 of `MaskFlag`.
        weights: [S] float32, or None where every weight is 1.
        offsets: [N + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        stops: [N] int32, place in its document of the token that ends it (EOS or the last end of turn); -1 = none.
        source_rows: [N] int64, row or line number in the source, counted from 1; 0 = unknown.
        source_ids: [N] int32, index into `sources`.
        sources: names of the files the rows came from.
        report: what was read and skipped, see `SamplesBuilder.finish`. Slices share it.
        rules: [S] uint8, which rule decided each token: an index into `rule_names`; None where nobody said.
        rule_names: the rules by name.
        eos: the policy for stop tokens that the rows were made with.
        unmatched: [N] bool, documents without a target because a span rule that would train what it selects found
            nothing in them; None where there is none.
        home: the folder of the cache that the columns are mapped from; None = they are in memory.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    weights: npt.NDArray[np.float32] | None
    offsets: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int32]
    source_rows: npt.NDArray[np.int64]
    source_ids: npt.NDArray[np.int32]
    sources: tuple[str, ...] = ("",)
    report: dict[str, Any] = field(default_factory=dict)
    rules: npt.NDArray[np.uint8] | None = None
    rule_names: tuple[str, ...] = ()
    eos: EosPolicy = DEFAULT_EOS
    unmatched: npt.NDArray[np.bool_] | None = None
    home: Path | None = None

    def __post_init__(self) -> None:
        n, total = len(self.offsets) - 1, len(self.tokens)
        assert n >= 0 and self.offsets[0] == 0 and self.offsets[-1] == total
        assert len(self.mask) == total and (self.weights is None or len(self.weights) == total)
        assert self.rules is None or len(self.rules) == total
        assert len(self.stops) == len(self.source_rows) == len(self.source_ids) == n

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> "Samples":
        """The columnar copy of any samples, checked one by one; a `Samples` is returned as it is."""
        from torchmask.data.sample_builder import build_samples  # which makes Samples

        return samples if isinstance(samples, cls) else build_samples(samples)

    @classmethod
    def concatenate(cls, parts: "Sequence[Samples]") -> "Samples":
        """All samples of the parts, in order; their reports are added up."""
        from torchmask.data.sample_builder import concatenate_samples

        return concatenate_samples(parts)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._range(start, max(stop, start)) if step == 1 else self.select(range(start, stop, step))
        i = range(len(self))[index]  # one rule for negative and out-of-range indexes
        cut = slice(self.offsets[i], self.offsets[i + 1])
        weights = None if self.weights is None else self.weights[cut]
        return _view(self.tokens[cut], self.mask[cut], weights, None if self.rules is None else self.rules[cut])

    def __repr__(self) -> str:
        return f"Samples({len(self)} documents, {len(self.tokens)} tokens, from {', '.join(self.sources[:3]) or '?'})"

    def _range(self, start: int, stop: int) -> "Samples":
        cut = slice(self.offsets[start], self.offsets[stop])
        return Samples(
            tokens=self.tokens[cut],
            mask=self.mask[cut],
            weights=None if self.weights is None else self.weights[cut],
            offsets=self.offsets[start : stop + 1] - self.offsets[start],
            stops=self.stops[start:stop],
            source_rows=self.source_rows[start:stop],
            source_ids=self.source_ids[start:stop],
            sources=self.sources,
            report=self.report,
            rules=None if self.rules is None else self.rules[cut],
            rule_names=self.rule_names,
            eos=self.eos,
            unmatched=None if self.unmatched is None else self.unmatched[start:stop],
        )

    def select(self, indices: "npt.ArrayLike | range") -> "Samples":
        """A copy of the samples at `indices` ([M] integers, any order), for shuffles, splits and filters."""
        chosen = np.asarray(indices, dtype=np.int64)
        starts, lengths = self.offsets[chosen], self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Samples(
            tokens=self.tokens[at],
            mask=self.mask[at],
            weights=None if self.weights is None else self.weights[at],
            offsets=offsets,
            stops=self.stops[chosen],
            source_rows=self.source_rows[chosen],
            source_ids=self.source_ids[chosen],
            sources=self.sources,
            report=self.report,
            rules=None if self.rules is None else self.rules[at],
            rule_names=self.rule_names,
            eos=self.eos,
            unmatched=None if self.unmatched is None else self.unmatched[chosen],
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when any token, flag, weight, rule, boundary or the EOS policy does."""
        digest = hashlib.sha256()
        for column in (self.offsets, self.tokens, self.mask, self.weights):
            digest.update(b"none" if column is None else np.ascontiguousarray(column).tobytes())
        if self.rules is not None:
            digest.update(np.ascontiguousarray(self.rules).tobytes() + "\0".join(self.rule_names).encode())
        if self.eos != DEFAULT_EOS:
            digest.update(repr(self.eos).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def largest_token(self) -> int:
        """The largest id; -1 where there is none."""
        return int(self.tokens.max(initial=-1))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[N] int64, tokens of each sample."""
        return np.diff(self.offsets)

    def where(self, i: int) -> str:
        """`file:row` of sample i; `sample 17` (counted from 0) where the source is not known.

        >>> Samples.from_samples([Sample([1, 2], [0, 0])]).where(0)
        'sample 0'
        """
        source, row = self.sources[self.source_ids[i]], int(self.source_rows[i])
        if not source:
            return f"row {row}" if row else f"sample {i}"
        return f"{source}:{row}" if row else f"{source}, sample {i}"

    def row_name(self, i: int) -> str:
        """The same in words and without folders: `row 17 of train.jsonl`."""
        source, row = self.sources[self.source_ids[i]], int(self.source_rows[i])
        name = f"row {row}" if row else f"sample {i}"
        return f"{name} of {Path(source).name}" if source else name
