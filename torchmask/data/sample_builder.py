"""How a store of samples is made: row by row, of samples at hand, or of several stores.

Legend: n tokens of one sample.
"""

from collections.abc import Iterable, Sequence
from typing import Any

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
from torchmask.data.sample import Sample, Samples


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
        self._unmatched: list[int] = []
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
        unmatched: bool = False,
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
            unmatched: it has no target because a span rule found nothing.

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
        if unmatched:
            self._unmatched.append(len(self))
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
        if samples.unmatched is not None:
            self._unmatched += (len(self) + np.flatnonzero(samples.unmatched)).tolist()
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
        unmatched = np.isin(np.arange(count), self._unmatched) if self._unmatched else None
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
            unmatched=unmatched,
        )


def build_samples(samples: Iterable[Sample]) -> Samples:
    """The columnar copy of any samples, checked one by one."""
    # By index up to its own length where there is one: a view's `__iter__` may be its base's and see more.
    sized = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
    rows = (samples[i] for i in range(len(samples))) if sized else samples  # type: ignore[arg-type,index]
    builder = SamplesBuilder()
    for sample in rows:
        # Bare samples have no palette; their rules keep the numbers they have.
        names = None if sample.rules is None else numbers_as_names(sample.rules)
        builder.append(sample.tokens, sample.mask, sample.weights, rules=sample.rules, rule_names=names)
    return builder.finish()


def concatenate_samples(parts: Sequence[Samples]) -> Samples:
    """All samples of the parts, in order; their reports are added up."""
    if not parts:
        return SamplesBuilder().finish()
    weights = None
    if any(p.weights is not None for p in parts):
        ones = [np.ones(len(p.tokens), np.float32) if p.weights is None else p.weights for p in parts]
        weights = np.concatenate(ones)
    rules, rule_names = merge_palettes([(p.rules, p.rule_names, len(p.tokens)) for p in parts])
    unmatched = None
    if any(p.unmatched is not None for p in parts):
        unmatched = np.concatenate([np.zeros(len(p), np.bool_) if p.unmatched is None else p.unmatched for p in parts])
    lengths = np.concatenate([p.lengths for p in parts])
    first_source = np.cumsum([0] + [len(p.sources) for p in parts])
    return Samples(
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
        unmatched=unmatched,
    )
