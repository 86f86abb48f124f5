"""One tokenised document, and the columnar store of many.

A `Sample` is what a tokenizer and the mask policy make of a row: whole, unshifted, and target-aligned, which means
that `mask[i]` and `weights[i]` speak about token i *as a target*. A million of them are kept as a few flat arrays
(`Samples`) and not as a million objects: 5 bytes a token, a slice is a view, and the same arrays can later lie in a
memory-mapped file. The price is that a store is written once, through `SamplesBuilder`, and not changed afterwards.

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

from torchmask.messages import MaskFlag

MAX_PLACES = 10
"""How many places (`file:row`) are kept for one cause in a report; the count is always whole."""

_ALL_FLAGS = int(MaskFlag.LOSS | MaskFlag.ATTENTION)


@dataclass(frozen=True, eq=False)
class Sample:
    """One document: its tokens and what is trained of them.

    Args:
        tokens: [n] int32 token ids; lists and other integer arrays are converted.
        mask: [n] uint8 of `MaskFlag`; a list of bool (True = masked, torchtune's) is a valid mask.
        weights: [n] float32, scales the loss of token i as a target; None = 1 everywhere. A weight of 0 masks.

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

    def __post_init__(self) -> None:
        tokens, mask, weights = _checked(self.tokens, self.mask, self.weights)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "weights", weights)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> npt.NDArray[np.bool_]:
        """[n] bool: which tokens are targets. The first has no predecessor and so is never predicted."""
        return (self.mask & MaskFlag.LOSS) == 0


def _checked(
    tokens: npt.ArrayLike, mask: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.float32] | None]:
    """The three columns in their own dtypes, of one length; a weight of 0 sets the LOSS flag."""
    t, m = _integers("tokens", tokens), _integers("mask", mask)
    if len(t) != len(m):
        raise ValueError(f"tokens and mask must have one length, got {len(t)} tokens and {len(m)} flags")
    if len(t) and (t.min() < 0 or t.max() > np.iinfo(np.int32).max):
        bad = int(t.min()) if t.min() < 0 else int(t.max())
        raise ValueError(f"token ids are integers from 0 to 2**31 - 1, found {bad}")
    if len(m) and (m.min() < 0 or m.max() > _ALL_FLAGS):
        bad = int(m.min()) if m.min() < 0 else int(m.max())
        raise ValueError(f"mask holds MaskFlag values (0 to {_ALL_FLAGS}) or bools (True = masked), found {bad}")
    t, m = t.astype(np.int32, copy=False), m.astype(np.uint8, copy=False)
    if weights is None:
        return t, m, None
    w = np.asarray(weights, dtype=np.float32)
    if w.shape != t.shape:
        raise ValueError(f"tokens and weights must have one length, got {len(t)} tokens and weights of shape {w.shape}")
    if not np.isfinite(w).all():
        raise ValueError(f"weights must be finite, found {w[~np.isfinite(w)][0]}")
    zero = w == 0
    if zero.any():
        m = np.where(zero, m | np.uint8(MaskFlag.LOSS), m)
    return t, m, w


def _integers(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int32)
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be integers, got {array.dtype}")
    return array


def _view(tokens: Any, mask: Any, weights: Any) -> Sample:
    """A Sample over columns that were checked when they were stored."""
    sample = object.__new__(Sample)
    object.__setattr__(sample, "tokens", tokens)
    object.__setattr__(sample, "mask", mask)
    object.__setattr__(sample, "weights", weights)
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

    def __post_init__(self) -> None:
        n, total = len(self.offsets) - 1, len(self.tokens)
        assert n >= 0 and self.offsets[0] == 0 and self.offsets[-1] == total
        assert len(self.mask) == total and (self.weights is None or len(self.weights) == total)
        assert len(self.stops) == len(self.source_rows) == len(self.source_ids) == n

    @classmethod
    def from_samples(cls, samples: Iterable[Sample]) -> "Samples":
        """The columnar copy of any samples, checked one by one; a `Samples` is returned as it is."""
        if isinstance(samples, cls):
            return samples
        # By index up to its own length where there is one: a view's `__iter__` may be its base's and see more.
        sized = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
        rows = (samples[i] for i in range(len(samples))) if sized else samples  # type: ignore[arg-type,index]
        builder = SamplesBuilder()
        for sample in rows:
            builder.append(sample.tokens, sample.mask, sample.weights)
        return builder.finish()

    @classmethod
    def concatenate(cls, parts: "Sequence[Samples]") -> "Samples":
        """All samples of the parts, in order; their reports are added up."""
        if not parts:
            return SamplesBuilder().finish()
        weights = None
        if any(p.weights is not None for p in parts):
            ones = [np.ones(len(p.tokens), np.float32) if p.weights is None else p.weights for p in parts]
            weights = np.concatenate(ones)
        lengths = np.concatenate([p.lengths for p in parts])
        first_source = np.cumsum([0] + [len(p.sources) for p in parts])
        return cls(
            tokens=np.concatenate([p.tokens for p in parts]),
            mask=np.concatenate([p.mask for p in parts]),
            weights=weights,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            stops=np.concatenate([p.stops for p in parts]),
            source_rows=np.concatenate([p.source_rows for p in parts]),
            source_ids=np.concatenate([p.source_ids + s for p, s in zip(parts, first_source)]).astype(np.int32),
            sources=tuple(name for p in parts for name in p.sources),
            report=_add_reports([p.report for p in parts]),
        )

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
        return _view(self.tokens[cut], self.mask[cut], None if self.weights is None else self.weights[cut])

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
        )

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that differ when any token, flag, weight or document boundary does."""
        digest = hashlib.sha256()
        for column in (self.offsets, self.tokens, self.mask, self.weights):
            digest.update(b"none" if column is None else np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

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


class SamplesBuilder:
    """Collects samples into flat arrays that grow by half, without a Python object for each token.

    >>> builder = SamplesBuilder()
    >>> builder.append([1, 5, 2], [1, 0, 0], source="train.jsonl", row=1)
    >>> builder.skip("malformed", "train.jsonl:2")
    >>> samples = builder.finish()
    >>> len(samples), samples.where(0), samples.report["rows_read"]
    (1, 'train.jsonl:1', 2)
    """

    def __init__(self) -> None:
        self._tokens = _Column(np.int32)
        self._mask = _Column(np.uint8)
        self._weights: _Column | None = None
        self._lengths = _Column(np.int64)
        self._stops = _Column(np.int32)
        self._rows = _Column(np.int64)
        self._source_ids = _Column(np.int32)
        self._sources: dict[str, int] = {}
        self._skipped: dict[str, dict[str, Any]] = {}
        self._num_straddlers = 0

    def __len__(self) -> int:
        return self._lengths.size

    def append(
        self,
        tokens: npt.ArrayLike,
        mask: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        *,
        source: str = "",
        row: int = 0,
        stop: int | None = None,
        num_straddlers: int = 0,
    ) -> None:
        """Adds one sample.

        Args:
            tokens, mask, weights: [n] as in `Sample`; converted and checked here, once.
            source: name of the file, as errors should show it.
            row: row or line number in it, counted from 1; 0 = unknown.
            stop: place of the token that ends the document (EOS or the last end of turn); None = the last token,
                -1 = the document has none.
            num_straddlers: tokens of it that cover both structure and content (`Rendered.num_straddlers`).

        Raises:
            ValueError: as `Sample`.
        """
        t, m, w = _checked(tokens, mask, weights)
        if w is not None and self._weights is None:
            self._weights = _Column(np.float32)
            self._weights.extend(np.ones(self._tokens.size, np.float32))
        if self._weights is not None:
            self._weights.extend(np.ones(len(t), np.float32) if w is None else w)
        self._tokens.extend(t)
        self._mask.extend(m)
        self._lengths.push(len(t))
        self._stops.push(len(t) - 1 if stop is None else stop)
        self._rows.push(row)
        self._source_ids.push(self._sources.setdefault(source, len(self._sources)))
        self._num_straddlers += num_straddlers

    def skip(self, cause: str, where: str) -> None:
        """Counts a row that gave no sample; the first places of each cause are kept for the report."""
        entry = self._skipped.setdefault(cause, {"count": 0, "places": []})
        entry["count"] += 1
        if len(entry["places"]) < MAX_PLACES:
            entry["places"].append(where)

    def finish(self) -> Samples:
        """The samples; the builder must not be used afterwards.

        `report` is `{"rows_read", "samples", "skipped": {cause: {"count", "places"}}, "straddlers"}`.
        """
        count = len(self)
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum(self._lengths.finish(), out=offsets[1:])
        skipped = sum(entry["count"] for entry in self._skipped.values())
        return Samples(
            tokens=self._tokens.finish(),
            mask=self._mask.finish(),
            weights=None if self._weights is None else self._weights.finish(),
            offsets=offsets,
            stops=self._stops.finish(),
            source_rows=self._rows.finish(),
            source_ids=self._source_ids.finish(),
            sources=tuple(self._sources) or ("",),
            report={
                "rows_read": count + skipped,
                "samples": count,
                "skipped": self._skipped,
                "straddlers": self._num_straddlers,
            },
        )


class _Column:
    """A one-dimensional array that grows in place (realloc, so that growing does not need the memory twice)."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._data = np.empty(1024, dtype)
        self.size = 0

    def _reserve(self, extra: int) -> None:
        needed = self.size + extra
        if needed > len(self._data):
            self._data.resize(max(needed, len(self._data) * 3 // 2), refcheck=False)  # nobody else holds it

    def extend(self, values: npt.NDArray[Any]) -> None:
        self._reserve(len(values))
        self._data[self.size : self.size + len(values)] = values
        self.size += len(values)

    def push(self, value: int) -> None:
        self._reserve(1)
        self._data[self.size] = value
        self.size += 1

    def finish(self) -> npt.NDArray[Any]:
        self._data.resize(self.size, refcheck=False)
        return self._data


def _add_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    skipped: dict[str, dict[str, Any]] = {}
    for report in reports:
        for cause, entry in report.get("skipped", {}).items():
            total = skipped.setdefault(cause, {"count": 0, "places": []})
            total["count"] += entry["count"]
            total["places"] = (total["places"] + entry["places"])[:MAX_PLACES]
    counts = {key: sum(r.get(key, 0) for r in reports) for key in ("rows_read", "samples", "straddlers")}
    return {**counts, "skipped": skipped}
