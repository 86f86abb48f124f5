"""Who sees whom, from one integer a slot, in the form each attention kernel wants it.

`visible_until[b, k]` is the slot (exclusive) up to which later slots of row b may attend to slot k: query q sees key k
iff `k <= q < visible_until[k]`. It says isolated documents, hidden tokens, padding and trees of documents alike, in
O(T).

What a kernel needs is derived once per forward pass:

- `dense`: the T x T boolean mask. The reference every other kernel is tested against.
- `sdpa`: the row cut into top-level segments that cannot see each other; most are plain causal and need no mask at all.
- `flex`: a FlexAttention block mask from per-block minima and maxima, in O((T / 128)^2), never through T x T.

Legend: B rows, T slots, N blocks of 128 slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
"""FlexAttention's block size in slots."""


class SegmentKind(Enum):
    """How the slots of a segment see each other."""

    CAUSAL = "causal"  # every slot sees all before it in the segment
    MASKED = "masked"  # some are hidden from some later slots: needs a mask
    SELF = "self"  # a run of slots that each see only themselves (padding)


@dataclass(frozen=True)
class Segment:
    """Slots [start, stop) of a row that see nothing outside, and are seen by nothing outside."""

    row: int
    start: int
    stop: int
    kind: SegmentKind
    visible_until: Tensor | None = None  # [1, stop - start] int64 from `start`, where the kind is MASKED


@dataclass(frozen=True)
class AttentionMask:
    """One forward pass's mask; at most one of the fields is set, none of them for plain causal rows.

    Attributes:
        reference: [B, 1, T, T] bool, True = may attend; for the dense reference.
        visible: [B, 1, T, S] bool, the same for queries of T new slots and keys of S cached ones.
        segments: a partition of every row.
        blocks: a `BlockMask` of `torch.nn.attention.flex_attention`.
    """

    reference: Tensor | None = None
    visible: Tensor | None = None
    segments: tuple[Segment, ...] | None = None
    blocks: Any = None


def build_attention_mask(visible_until: Tensor | None, tokens: Tensor, *, backend: str) -> AttentionMask:
    """The mask for one forward pass.

    Args:
        visible_until: [B, T] int64, or None for plain causal rows.
        tokens: [B, T], for its shape and device.
        backend: `dense`, `sdpa` or `flex`.
    """
    if visible_until is None:
        if backend != "dense":
            return AttentionMask()
        visible_until = torch.full_like(tokens, tokens.shape[1])
    return {"dense": _dense_mask, "sdpa": _segment_mask, "flex": _flex_mask}[backend](visible_until)


def may_attend(visible_until: Tensor) -> Tensor:
    """[B, T, T] bool: the definition itself.

    >>> may_attend(torch.tensor([[2, 2, 4, 4]]))[0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    slots = torch.arange(visible_until.shape[1], device=visible_until.device)
    q, k = slots[:, None], slots[None, :]
    return (k <= q) & (q < visible_until[:, None, :])


def _dense_mask(visible_until: Tensor) -> AttentionMask:
    return AttentionMask(reference=may_attend(visible_until)[:, None])


def _segment_mask(visible_until: Tensor) -> AttentionMask:
    rows = visible_until.cpu().numpy()
    if (rows >= rows.shape[1]).all():
        return AttentionMask()
    return AttentionMask(segments=tuple(s for row, until in enumerate(rows) for s in segments_of(row, until)))


def segments_of(row: int, until: np.ndarray[Any, Any]) -> list[Segment]:
    """The top-level segments of one row, in order.

    A cut falls before slot s iff no slot before s is visible at s. Runs of one-slot segments (padding) become one
    segment of kind SELF, so that padding costs no kernel call.

    >>> [(s.start, s.stop, s.kind.value) for s in segments_of(0, np.array([3, 3, 3, 6, 5, 6, 7, 8]))]
    [(0, 3, 'causal'), (3, 6, 'masked'), (6, 8, 'self')]
    """
    num_slots = len(until)
    reach = np.maximum.accumulate(np.minimum(until, num_slots))
    stops = np.flatnonzero(reach == np.arange(1, num_slots + 1)) + 1
    starts = np.concatenate(([0], stops[:-1]))
    nearest = np.minimum.reduceat(until, starts)
    segments: list[Segment] = []
    for start, stop, lowest in zip(starts.tolist(), stops.tolist(), nearest.tolist()):
        if stop - start > 1:
            kind = SegmentKind.CAUSAL if lowest >= stop else SegmentKind.MASKED
            own = torch.from_numpy(until[None, start:stop] - start) if kind is SegmentKind.MASKED else None
            segments.append(Segment(row, start, stop, kind, own))
        elif segments and segments[-1].kind is SegmentKind.SELF:
            segments[-1] = replace(segments[-1], stop=stop)
        else:
            segments.append(Segment(row, start, stop, SegmentKind.SELF))
    return segments


def _flex_mask(visible_until: Tensor) -> AttentionMask:
    from torch.nn.attention.flex_attention import BlockMask

    num_slots = visible_until.shape[1]
    some, whole = block_tables(visible_until)
    some_counts, some_index = _ordered_blocks(some)
    whole_counts, whole_index = _ordered_blocks(whole)
    return AttentionMask(
        blocks=BlockMask.from_kv_blocks(
            some_counts,
            some_index,
            whole_counts,
            whole_index,
            BLOCK_SIZE=BLOCK,
            mask_mod=_mask_mod(visible_until),
            seq_lengths=(num_slots, num_slots),
        )
    )


def block_tables(visible_until: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries must look at, with the mask and without.

    A block of keys can be seen by some query iff its farthest key reaches the first query, and by all iff its nearest
    key reaches past the last; the diagonal is always looked at with the mask.

    Args:
        visible_until: [B, T] int64.

    Returns:
        two [B, N, N] bool tensors (query block, key block): partly visible, wholly visible.
    """
    num_rows, num_slots = visible_until.shape
    num_blocks = -(-num_slots // BLOCK)
    padding = num_blocks * BLOCK - num_slots
    farthest = torch.nn.functional.pad(visible_until, (0, padding), value=0)
    nearest = torch.nn.functional.pad(visible_until, (0, padding), value=num_blocks * BLOCK)
    farthest = farthest.view(num_rows, 1, num_blocks, BLOCK).amax(-1)  # [B, 1, N]
    nearest = nearest.view(num_rows, 1, num_blocks, BLOCK).amin(-1)
    block = torch.arange(num_blocks, device=visible_until.device)
    first_query = (block * BLOCK)[None, :, None]
    last_query = (block * BLOCK + BLOCK - 1).clamp(max=num_slots - 1)[None, :, None]
    before = block[None, None, :] < block[None, :, None]
    diagonal = block[None, None, :] == block[None, :, None]
    whole = before & (nearest > last_query)
    some = (before & (farthest > first_query) & ~whole) | diagonal.expand(num_rows, -1, -1)
    return some, whole


def _ordered_blocks(table: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a [B, N, N] table: counts [B, 1, N]; key blocks [B, 1, N, N], the chosen first."""
    counts = table.sum(-1, dtype=torch.int32)
    index = torch.argsort(table.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], index[:, None].contiguous()


def _mask_mod(visible_until: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < visible_until[b, k])

    return sees
