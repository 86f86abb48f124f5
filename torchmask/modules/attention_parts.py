"""Parts of a batch's visible pairs: rectangles and triangles of slots that one kernel call each attends over.

Made by `attention_plan`, which says why; used by `attention_kernels`.

Slot s of row b is b * T + s here, so that a part may take stretches of several rows. Legend: N = B * T such slots, n
stretches of a part, L its queries, S its keys.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


class Limits:
    """The definition, over all slots of a batch as one row; see `Visibility`."""

    def __init__(self, until: Array, since: Array, positions: Array, window: int | None, device: torch.device) -> None:
        self.until, self.since, self.positions = (torch.from_numpy(a).to(device) for a in (until, since, positions))
        self.window = window

    def sees(self, q: Tensor, k: Tensor) -> Tensor:
        """Bool, whether slot q sees slot k, for index tensors that broadcast against each other."""
        seen = (self.since[k] <= q) & (q < self.until[k])
        if self.window is not None:
            seen &= self.positions[q] - self.positions[k] < self.window
        return seen


@dataclass(eq=False)
class Part:
    """Pairs of queries and keys that one kernel call attends over.

    Attributes:
        queries: a slice of slots, or [n, L] int64 slots of n stretches; rows shorter than L repeat slots at their end.
        keys: a slice or [n, S]; the same object as `queries` where they are the same.
        causal: a triangle: query i sees key j iff j <= i. Neither this nor `masked`: all pairs are visible.
        masked: `Limits` decides.
        lengths: [n] of the stretches in `queries`; None = all L.
        limits: the definition.
    """

    queries: slice | Tensor
    keys: slice | Tensor
    causal: bool
    masked: bool
    limits: Limits
    lengths: Tensor | None = None
    _steps: dict[int, tuple[list["Part"], list["Part"]]] = field(default_factory=dict, init=False, repr=False)

    def indexes(self, of: slice | Tensor) -> Tensor:
        """`queries` or `keys` as [n, L] int64."""
        if isinstance(of, Tensor):
            return of
        return torch.arange(of.start, of.stop, device=self.limits.until.device)[None]

    @cached_property
    def valid(self) -> Tensor | None:
        """[n, L] bool, False where `queries` only repeats slots; None = all valid."""
        if self.lengths is None:
            return None
        assert isinstance(self.queries, Tensor)
        return torch.arange(self.queries.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def targets(self) -> tuple[Tensor, Tensor | None]:
        """Where rows of results go: their slots, and which of the n * L they are (None = all, in order)."""
        assert isinstance(self.queries, Tensor)
        if self.valid is None:
            return self.queries.flatten(), None
        chosen = self.valid.flatten().nonzero()[:, 0]
        return self.queries.flatten()[chosen], chosen

    @cached_property
    def visible(self) -> Tensor | None:
        """[n, 1, L, S] bool, or None where every query sees every key."""
        if not (self.causal or self.masked):
            return None
        q, k = self.indexes(self.queries), self.indexes(self.keys)
        if self.causal:
            return torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()[None, None]
        seen = self.limits.sees(q[:, :, None], k[:, None, :])
        if self.valid is not None:  # repeated slots see themselves, so that no softmax is over nothing
            seen = (seen & self.valid[:, None, :]) | torch.eye(q.shape[1], dtype=torch.bool, device=q.device)
        return seen[:, None]

    @cached_property
    def looks_back(self) -> bool:
        """Whether no query sees a key at a later position than its own; False if that cannot be told at a glance."""
        queries, keys = (self.limits.positions[self.indexes(of)] for of in (self.queries, self.keys))
        if self.causal:
            return bool((queries[:, 1:] >= queries[:, :-1]).all())
        return not self.masked and bool((queries.amin(-1) >= keys.amax(-1)).all())

    def steps(self, num_queries: int) -> tuple[list["Part"], list["Part"]]:
        """The same pairs without masks, at most so many queries a part: first triangles (or all), then what is before.

        Made once for all layers; batches stay whole.
        """
        if num_queries not in self._steps:
            self._steps[num_queries] = self._cut_into_steps(num_queries)
        return self._steps[num_queries]

    def _cut_into_steps(self, num_queries: int) -> tuple[list["Part"], list["Part"]]:
        assert not self.masked
        if not self.causal or not isinstance(self.queries, slice):
            return self.cut(num_queries), []
        first, further = self.queries.start, []
        triangles = []
        for start in range(first, self.queries.stop, num_queries):
            own = slice(start, min(start + num_queries, self.queries.stop))
            triangles.append(Part(own, own, True, False, self.limits))
            if start > first:
                further.append(Part(own, slice(first, start), False, False, self.limits))
        return triangles, further

    def cut(self, num_queries: int) -> "list[Part]":
        """The same pairs with at most so many queries a part, so that scores can be held; batches stay whole."""
        if not isinstance(self.queries, slice) or self.queries.stop - self.queries.start <= num_queries:
            return [self]
        parts = []
        for start in range(self.queries.start, self.queries.stop, num_queries):
            stop = min(start + num_queries, self.queries.stop)
            keys = slice(self.queries.start, stop) if self.causal else self.keys
            parts.append(Part(slice(start, stop), keys, False, self.causal or self.masked, self.limits))
        return parts


@dataclass(frozen=True, eq=False)
class AttentionParts:
    """Parts that together cover every visible pair once.

    Attributes:
        own: every slot that is not in `alone` is a query of exactly one of these.
        across: further keys of the same queries, to be merged.
        alone: stretches of slots that see only themselves and that no other part has as queries (padding).
        limits: the definition; also knows the positions.
        is_plain_causal: every row is one triangle.
    """

    own: tuple[Part, ...]
    across: tuple[Part, ...]
    alone: tuple[slice, ...]
    limits: Limits
    is_plain_causal: bool

    def with_nobody_alone(self) -> "AttentionParts":
        """The same pairs, those of `alone` as parts as well."""
        if not self.alone:
            return self
        device = self.limits.until.device
        slots = torch.cat([torch.arange(s.start, s.stop, device=device) for s in self.alone])[:, None]
        single = Part(slots, slots, causal=True, masked=False, limits=self.limits)
        return AttentionParts((*self.own, single), self.across, (), self.limits, False)
