"""FlexAttention: a block mask from the extrema of 128 slots at a time, and scores changed inside the kernel.

Legend: B rows, T slots, N blocks of 128 slots, H heads.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from torchmask.modules.attention_scores import ScoreRule
from torchmask.modules.visibility import Visibility

BLOCK = 128
"""FlexAttention's block size in slots."""


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: BlockMask,
    rule: ScoreRule,
    positions: Tensor | None,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """FlexAttention under a block mask; `positions` ([B, T]) are those of ALiBi, `sinks` are [H]."""
    gqa = q.shape[1] != k.shape[1]
    score_mod = None if rule.is_plain else _score_mod(rule, positions)
    options: dict[str, Any] = {"block_mask": blocks, "score_mod": score_mod, "scale": rule.scale, "enable_gqa": gqa}
    if sinks is None:
        out: Tensor = _kernel(q.device.type)(q, k, v, **options)
        return out
    out, aux = _kernel(q.device.type)(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return out * (aux.lse - sinks.to(aux.lse.dtype)[:, None]).sigmoid()[..., None].to(out.dtype)  # the keys' share


@cache
def _kernel(device_type: str) -> Any:
    """FlexAttention; uncompiled it would materialise T x T, so it is compiled wherever it will run for real."""
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def _score_mod(rule: ScoreRule, positions: Tensor | None) -> Callable[..., Tensor]:
    softcap, slopes = rule.softcap, rule.alibi_slopes

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    if slopes is None:
        return capped
    assert positions is not None
    scale = rule.alibi_scale
    if rule.alibi_rounded:  # outside the kernel, which would not round
        heights = rule.rounded_heights(slopes, positions).to(torch.float32)  # [B, H, T]

        def capped_and_stepped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return capped(score, b, h, q, k) - (heights[b, h, q] - heights[b, h, k]).abs() * scale

        return capped_and_stepped
    slopes = slopes * scale

    def capped_and_biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return capped(score, b, h, q, k) - slopes[h] * (positions[b, q] - positions[b, k]).abs()

    return capped_and_biased


def block_mask(visibility: Visibility) -> BlockMask:
    """FlexAttention's form of a mask, in O((T / 128)^2) and without waiting for the device."""
    num_slots = visibility.until.shape[1]
    some, whole = block_tables(visibility)
    some_counts, some_index = _ordered_blocks(some)
    whole_counts, whole_index = _ordered_blocks(whole)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visibility.sees(b, q, k)

    return BlockMask.from_kv_blocks(
        some_counts,
        some_index,
        whole_counts,
        whole_index,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_slots, num_slots),
    )


def block_tables(visibility: Visibility) -> tuple[Tensor, Tensor]:
    """Which blocks of keys a block of queries must look at, with the mask and without.

    Without a window the tables are exact. A block of keys before the queries' is seen by some of them iff its farthest
    key reaches the first of them, and by all iff its nearest key reaches the last; a block after them iff its earliest
    key starts by the last of them, and by all iff its latest starts by the first. A block sees itself, and whole only
    where both hold. A window takes away the blocks whose nearest pair is too far, which keeps some that no query sees
    where positions jump.

    Returns:
        two [B, N, N] bool tensors (query block, key block): partly visible, wholly visible.
    """
    until, since = visibility.until, visibility.since
    num_slots = until.shape[1]
    num_blocks = -(-num_slots // BLOCK)
    block = torch.arange(num_blocks, device=until.device)
    first_query = (block * BLOCK)[None, :, None]
    last_query = (block * BLOCK + BLOCK - 1).clamp(max=num_slots - 1)[None, :, None]
    nearest, farthest = (x[:, None, :] for x in _extrema(until))  # [B, 1, N] of keys
    some, whole = farthest > first_query, nearest > last_query
    before, diagonal = block[None, :] < block[:, None], torch.eye(num_blocks, dtype=torch.bool, device=until.device)
    if since is None:
        some, whole = (some & before) | diagonal, whole & before
    else:
        earliest, latest = (x[:, None, :] for x in _extrema(since))
        ragged = block == num_slots // BLOCK  # the last block, where it is cut short, is read under the mask
        some = (some & (earliest <= last_query)) | diagonal
        whole = whole & (latest <= first_query) & ~(ragged & ~before)
    if visibility.window is not None:
        assert visibility.positions is not None
        low, high = _extrema(visibility.positions)
        some = some & ((low[:, :, None] - high[:, None, :] < visibility.window) | diagonal)
        whole = whole & (high[:, :, None] - low[:, None, :] < visibility.window)
    return some & ~whole, whole


_BEYOND = 2**30  # a slot and a position that no row has; `pad` takes its value through a float


def _extrema(values: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] each: the lowest and the highest of every block of [B, T] `values`."""
    num_rows, num_slots = values.shape
    missing = -num_slots % BLOCK
    blocks = pad(values, (0, missing), value=_BEYOND).view(num_rows, -1, BLOCK)
    low = blocks.amin(-1)
    blocks = pad(values, (0, missing), value=-1).view(num_rows, -1, BLOCK)
    return low, blocks.amax(-1)


def _ordered_blocks(table: Tensor) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a [B, N, N] table: counts [B, 1, N]; key blocks [B, 1, N, N], the chosen first."""
    counts = table.sum(-1, dtype=torch.int32)
    index = torch.argsort(table.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[:, None], index[:, None].contiguous()
