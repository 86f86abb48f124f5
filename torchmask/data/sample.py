"""One tokenised document, and the columnar store of many.

A `Sample` is what a tokenizer and the mask policy make of a row: whole, unshifted, and target-aligned, which means
that `mask[i]` and `weights[i]` speak about token i *as a target*. A million of them are kept as a few flat arrays
(`Samples`) and not as a million objects: 6 bytes a token, a slice is a view, and the same arrays can lie in a
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

from torchmask.data.columns import (
    BROUGHT,
    MAX_PLACES,
    MAX_RULES,
    Column,
    add_reports,
    checked,
    checked_rules,
    merge_palettes,
    new_span_counts,
    numbers_as_names,
    one_policy,
)
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
        if isinstance(samples, cls):
            return samples
        # By index up to its own length where there is one: a view's `__iter__` may be its base's and see more.
        sized = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
        rows = (samples[i] for i in range(len(samples))) if sized else samples  # type: ignore[arg-type,index]
        builder = SamplesBuilder()
        for sample in rows:
            # Bare samples have no palette; their rules keep the numbers they have.
            names = None if sample.rules is None else numbers_as_names(sample.rules)
            builder.append(sample.tokens, sample.mask, sample.weights, rules=sample.rules, rule_names=names)
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
        rules, rule_names = merge_palettes([(p.rules, p.rule_names, len(p.tokens)) for p in parts])
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
            report=add_reports([p.report for p in parts]),
            rules=rules,
            rule_names=rule_names,
            eos=one_policy([p.eos for p in parts]),
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


class SamplesBuilder:
    """Collects samples into flat arrays that grow by half, without a Python object for each token.

    >>> builder = SamplesBuilder()
    >>> builder.append([1, 5, 2], [1, 0, 0], source="train.jsonl", row=1)
    >>> builder.skip("malformed", "train.jsonl:2")
    >>> samples = builder.finish()
    >>> len(samples), samples.where(0), samples.report["rows_read"]
    (1, 'train.jsonl:1', 2)
    """

    def __init__(self, *, eos: EosPolicy | None = None) -> None:
        self._eos = eos or DEFAULT_EOS
        self._tokens = Column(np.int32)
        self._mask = Column(np.uint8)
        self._weights: Column | None = None
        self._rules: Column | None = None
        self._palette: dict[str, int] = {}
        self._lookup: tuple[Sequence[str], npt.NDArray[np.uint8]] = ((), np.zeros(0, np.uint8))
        self._lengths = Column(np.int64)
        self._stops = Column(np.int32)
        self._rows = Column(np.int64)
        self._source_ids = Column(np.int32)
        self._sources: dict[str, int] = {}
        self._skipped: dict[str, dict[str, Any]] = {}
        self._num_straddlers = 0
        self._spans: dict[str, dict[str, Any]] = {}

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
        rules: npt.ArrayLike | None = None,
        rule_names: Sequence[str] | None = None,
    ) -> None:
        """Adds one sample.

        Args:
            tokens, mask, weights: [n] as in `Sample`; converted and checked here, once.
            source: name of the file, as errors should show it.
            row: row or line number in it, counted from 1; 0 = unknown.
            stop: place of the token that ends the document (EOS or the last end of turn); None = the last token,
                -1 = the document has none.
            num_straddlers: tokens of it that cover both structure and content, or a span's edge.
            rules: [n] indexes into `rule_names`: what decided each token.
            rule_names: this sample's palette; stored samples share one, merged from those of all.

        Raises:
            ValueError: as `Sample`; more than 256 different names of rules.
        """
        t, m, w = checked(tokens, mask, weights)
        if w is not None and self._weights is None:
            self._weights = Column(np.float32)
            self._weights.extend(np.ones(self._tokens.size, np.float32))
        if self._weights is not None:
            self._weights.extend(np.ones(len(t), np.float32) if w is None else w)
        if rules is not None and self._rules is None:
            self._rules = Column(np.uint8)
            self._rules.extend(np.full(self._tokens.size, self._rule(BROUGHT) if self._tokens.size else 0, np.uint8))
        if self._rules is not None:
            self._rules.extend(
                np.full(len(t), self._rule(BROUGHT), np.uint8)
                if rules is None
                else self._translate(checked_rules(rules, len(t)), rule_names or ())
            )
        self._tokens.extend(t)
        self._mask.extend(m)
        self._lengths.push(len(t))
        self._stops.push(len(t) - 1 if stop is None else stop)
        self._rows.push(row)
        self._source_ids.push(self._sources.setdefault(source, len(self._sources)))
        self._num_straddlers += num_straddlers

    def extend(self, samples: Samples) -> None:
        """Adds all of a store, and what its report says was skipped."""
        if samples.weights is not None and self._weights is None:
            self._weights = Column(np.float32)
            self._weights.extend(np.ones(self._tokens.size, np.float32))
        if self._weights is not None:
            size = len(samples.tokens)
            self._weights.extend(np.ones(size, np.float32) if samples.weights is None else samples.weights)
        if samples.rules is not None and self._rules is None:
            self._rules = Column(np.uint8)
            self._rules.extend(np.full(self._tokens.size, self._rule(BROUGHT) if self._tokens.size else 0, np.uint8))
        if self._rules is not None and len(samples.tokens):
            self._rules.extend(
                np.full(len(samples.tokens), self._rule(BROUGHT), np.uint8)
                if samples.rules is None
                else self._translate(samples.rules, samples.rule_names)
            )
        self._tokens.extend(samples.tokens)
        self._mask.extend(samples.mask)
        self._lengths.extend(samples.lengths)
        self._stops.extend(samples.stops)
        self._rows.extend(samples.source_rows)
        if len(samples):
            numbers = [self._sources.setdefault(name, len(self._sources)) for name in samples.sources]
            self._source_ids.extend(np.array(numbers, np.int32)[samples.source_ids])
        sums = add_reports([{"skipped": self._skipped, "spans": self._spans}, samples.report])
        self._skipped, self._spans = sums["skipped"], sums.get("spans", {})
        self._num_straddlers += sums["straddlers"]

    def _rule(self, name: str) -> int:
        index = self._palette.setdefault(name, len(self._palette))
        if index >= MAX_RULES:
            raise ValueError(f"more than {MAX_RULES} rules have names, the last is {name!r}")
        return index

    def _translate(self, rules: npt.NDArray[np.uint8], names: Sequence[str]) -> npt.NDArray[np.uint8]:
        """Rules by their numbers in this store; nearly all samples come with the same palette, so it is kept."""
        if self._lookup[0] is not names and self._lookup[0] != names:
            self._lookup = (names, np.array([self._rule(name) for name in names], np.uint8))
        if len(rules) and rules.max() >= len(names):
            raise ValueError(f"rule {rules.max()} has no name among {len(names)} rule_names")
        return self._lookup[1][rules]

    def count_span(self, name: str, *, places: int, tokens: int, where: str) -> None:
        """Counts what one span rule found in one row.

        Args:
            name: the rule.
            places: how often it matched; 0 is reported with `where`.
            tokens: how many tokens it decided; matched places without any are reported too.
            where: `file:row`.
        """
        entry = self._spans.setdefault(name, new_span_counts())
        cause = "rows_unmatched" if not places else "rows_no_token" if not tokens else "rows_matched"
        entry[cause] += 1
        entry["rows_many"] += places > 1
        entry["tokens"] += tokens
        if cause != "rows_matched" and len(entry["places"]) < MAX_PLACES:
            entry["places"].append(where)

    def skip(self, cause: str, where: str) -> None:
        """Counts a row that gave no sample; the first places of each cause are kept for the report."""
        entry = self._skipped.setdefault(cause, {"count": 0, "places": []})
        entry["count"] += 1
        if len(entry["places"]) < MAX_PLACES:
            entry["places"].append(where)

    def finish(self) -> Samples:
        """The samples; the builder must not be used afterwards.

        `report` is `{"rows_read", "samples", "skipped": {cause: {"count", "places"}}, "straddlers", "spans"}`, with
        `spans` = `{rule: {"rows_matched", "rows_unmatched", "rows_no_token", "rows_many", "tokens", "places"}}` where
        there are span rules; `places` are the first rows in which a rule matched nothing or no token.
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
                **({"spans": self._spans} if self._spans else {}),
            },
            rules=None if self._rules is None else self._rules.finish(),
            rule_names=tuple(self._palette),
            eos=self._eos,
        )
