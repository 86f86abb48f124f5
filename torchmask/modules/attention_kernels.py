"""Attention over `AttentionParts`: each part by the kernel that suits it, merged by log-sum-exps, backward by hand.

A query that meets several parts gets softmax results o_i with log-sum-exps l_i; over all its keys the result is the
mean of the o_i weighted by exp(l_i). Backward needs no such merging: with the final result and log-sum-exp, every
part's gradients are those of a flash attention backward pass over its own keys alone (Dao 2023, arXiv 2307.08691,
section 3.1).

Two kernels: PyTorch's own for the CPU, which holds no scores, for parts without masks; and the formula written out,
which knows masks, soft caps and ALiBi and runs on any device. Softmax is in at least fp32 in both.

Legend: B rows, T slots, N = B * T, n stretches of a part, L its queries, S its keys, H heads, K kv heads, C head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from torchmask.modules.attention_parts import AttentionParts, Part

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

CUT_QUERIES = 256
"""Queries whose scores the written-out kernel holds at a time."""


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """What becomes of q k^T before the softmax: times `scale`, then capped, then biased.

    Attributes:
        scale: None = 1 / sqrt(C).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2).
        alibi_slopes: [H]; the score falls by slope * |positions[q] - positions[k]| (Press et al. 2022, 2108.12409).
        alibi_scale: of this fall.
        alibi_rounded: slopes, positions and their products are bf16 numbers, as `DecoderSpec.alibi_rounded` says.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    alibi_scale: float = 1.0
    alibi_rounded: bool = False

    @property
    def is_plain(self) -> bool:
        """Scores are only scaled."""
        return self.softcap is None and self.alibi_slopes is None

    def scale_for(self, head_dim: int) -> float:
        """The scale for heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale

    def scores(self, q: Tensor, k: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        """[.., H, L, S] in at least fp32.

        Args:
            q: [.., H, L, C].
            k: [.., H, S, C].
            positions: [.., L] int64 of queries and [.., S] of keys, where there are slopes.
        """
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * self.scale_for(q.shape[-1])
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.alibi_slopes is not None:
            assert positions is not None
            scores = scores - self._falls(self.alibi_slopes, *positions, scores.dtype)
        return scores

    def _falls(self, slopes: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.alibi_rounded:
            distances = (queries[..., None, :, None] - keys[..., None, None, :]).abs()
            return (slopes.to(dtype) * self.alibi_scale)[:, None, None] * distances
        heights_of_queries, heights_of_keys = (self.rounded_heights(slopes, p).to(dtype) for p in (queries, keys))
        return (heights_of_queries[..., :, None] - heights_of_keys[..., None, :]).abs() * self.alibi_scale

    @staticmethod
    def rounded_heights(slopes: Tensor, positions: Tensor) -> Tensor:
        """[.., H, S] bf16, what scores have fallen by since position 0, from [.., S] positions."""
        return slopes.to(torch.bfloat16)[:, None] * positions.to(torch.bfloat16)[..., None, :]


def attend_parts(
    q: Tensor, k: Tensor, v: Tensor, parts: AttentionParts, rule: ScoreRule, *, sinks: Tensor | None = None
) -> Tensor:
    """Attention over parts.

    Args:
        q: [B, H, T, C].
        k, v: [B, K, T, C], K divides H.
        sinks: [H]; see `attend`.

    Returns:
        [B, H, T, C].
    """
    if sinks is not None:
        parts = parts.with_nobody_alone()  # a slot that sees only itself has a choice now
    elif q.device.type != "cpu" and rule.is_plain and _side_by_side(parts):
        return _attend_slices(q, k, v, parts, rule)
    out: Tensor = _PartsAttention.apply(q, k, v, sinks, parts, rule)
    return out


def _side_by_side(parts: AttentionParts) -> bool:
    return not parts.across and all(isinstance(p.queries, slice) and p.queries == p.keys for p in parts.own)


def _attend_slices(q: Tensor, k: Tensor, v: Tensor, parts: AttentionParts, rule: ScoreRule) -> Tensor:
    """Parts that are nothing but slices side by side, by PyTorch's kernel for whatever device this is."""
    own = {p.queries.start: p for p in parts.own if isinstance(p.queries, slice)}
    slices = [p.queries for p in parts.own if isinstance(p.queries, slice)]
    slices = sorted([*slices, *parts.alone], key=lambda s: s.start)
    sizes = [s.stop - s.start for s in slices]
    flat = (x.transpose(1, 2).flatten(0, 1).split(sizes) for x in (q, k, v))  # [size, H, C] each
    outs = []
    for at, *pieces in zip(slices, *flat):
        query, key, value = (x.transpose(0, 1)[None] for x in pieces)
        if at.start in own:
            part = own[at.start]
            mask = part.visible if part.masked else None
            gqa = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=part.causal, scale=rule.scale, enable_gqa=gqa
            )
        else:
            out = value.repeat_interleave(q.shape[1] // v.shape[1], dim=1) + 0 * (query.sum() + key.sum())
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


class _PartsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, parts: AttentionParts, rule: ScoreRule
    ) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        query, key, value = _flat(q), _flat(k, groups), _flat(v, groups)
        precise = torch.promote_types(q.dtype, torch.float32)
        changes = bool(parts.across) or sinks is not None  # results are not final when they are first written
        out = query.new_empty(*query.shape[:2], value.shape[2], dtype=precise if changes else q.dtype)  # [N, H, C]
        lse = query.new_zeros(query.shape[1], query.shape[0], dtype=precise)  # [H, N]
        for stretch in parts.alone:
            out[stretch] = value[stretch]
        for part, use_fused in _ways(parts.own, rule, q, v):
            result, sums = _forward(part, use_fused, query, key, value, rule)
            _put(out, part, result)
            _put(lse.T, part, sums)
        for part, use_fused in _ways(parts.across, rule, q, v):
            result, sums = _forward(part, use_fused, query, key, value, rule)
            _merge(out, lse, part, result, sums)
        if sinks is not None:  # one more key for everyone, whose value is 0
            sink = sinks.to(precise)[:, None]
            out *= (lse - sink).sigmoid().T[..., None]
            lse = torch.logaddexp(lse, sink)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.parts, ctx.rule = parts, rule
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        parts, rule, groups = ctx.parts, ctx.rule, q.shape[1] // k.shape[1]
        query, key, value, grad = _flat(q), _flat(k, groups), _flat(v, groups), _flat(grad_out)
        precise = lse.dtype
        grads = [torch.zeros_like(x, dtype=precise) for x in (query, key, value)]
        for stretch in parts.alone:
            grads[2][stretch] = grad[stretch].to(precise)
        for part, use_fused in _ways((*parts.own, *parts.across), rule, q, v):
            pieces = _backward(part, use_fused, (query, key, value), (grad, out, lse), rule)
            for total, at, piece in zip(grads, (part.queries, part.keys, part.keys), pieces):
                _add(total, part, at, piece)
        shapes = q.shape[0], q.shape[2]
        if groups > 1:
            grads[1:] = [x.unflatten(1, (-1, groups)).sum(2) for x in grads[1:]]
        query_grad, key_grad, value_grad = (x.to(q.dtype).unflatten(0, shapes).transpose(1, 2) for x in grads)
        sinks_grad = None if sinks is None else _sinks_grad(sinks, grad, out, lse)
        return query_grad, key_grad, value_grad, sinks_grad, None, None


def _sinks_grad(sinks: Tensor, grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """[H]: the sums of -share (dO . O) over queries, from [N, H, C] gradients and results, [H, N] log-sum-exps."""
    shares = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(shares * (grad * out).sum(-1, dtype=lse.dtype).T).sum(-1).to(sinks.dtype)


def _flat(x: Tensor, groups: int = 1) -> Tensor:
    """[B, K, T, C] to [N, K * groups, C]."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def _ways(parts: tuple[Part, ...], rule: ScoreRule, q: Tensor, v: Tensor) -> list[tuple[Part, bool]]:
    """Each part with whether the fused kernel can do it; for the other in pieces whose scores fit."""
    can = q.device.type == "cpu" and rule.is_plain and q.shape[-1] == v.shape[-1]
    ways: list[tuple[Part, bool]] = []
    for part in parts:
        ways += [(part, True)] if can and not part.masked else [(piece, False) for piece in part.cut(CUT_QUERIES)]
    return ways


def _take(x: Tensor, at: slice | Tensor) -> Tensor:
    """[N, H, C] to [n, H, L, C]."""
    return x[at].transpose(0, 1)[None] if isinstance(at, slice) else x[at].transpose(1, 2)


def _forward(
    part: Part, use_fused: bool, query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule
) -> tuple[Tensor, Tensor]:
    """[n, H, L, C] results and their [n, H, L] log-sum-exps."""
    q, k, v = _take(query, part.queries), _take(key, part.keys), _take(value, part.keys)
    if use_fused:
        out, sums = _FUSED(q, k, v, 0.0, part.causal, scale=rule.scale_for(q.shape[-1]))
        return out, sums
    scores = _scores(part, q, k, rule)
    sums = scores.logsumexp(-1)
    return scores.sub_(sums[..., None]).exp_().to(v.dtype) @ v, sums


def _scores(part: Part, q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor:
    scores = rule.scores(q, k, _positions(part) if rule.alibi_slopes is not None else None)
    return scores if part.visible is None else scores.masked_fill_(~part.visible, -torch.inf)


def _positions(part: Part) -> tuple[Tensor, Tensor]:
    """[n, L] of its queries and [n, S] of its keys."""
    positions = part.limits.positions
    return positions[part.indexes(part.queries)], positions[part.indexes(part.keys)]


def _backward(
    part: Part,
    use_fused: bool,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    rule: ScoreRule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of the gradients of its queries, keys and values, [n, H, L or S, C]."""
    q, k, v = _take(inputs[0], part.queries), _take(inputs[1], part.keys), _take(inputs[2], part.keys)
    grad, out = _take(results[0], part.queries), _take(results[1], part.queries)
    lse = results[2][:, part.queries]
    lse = lse[None] if isinstance(part.queries, slice) else lse.transpose(0, 1)  # [n, H, L]
    if part.valid is not None:  # a repeated slot counts once
        grad = grad.masked_fill(~part.valid[:, None, :, None], 0)
    scale = rule.scale_for(q.shape[-1])
    if use_fused:
        pieces: tuple[Tensor, Tensor, Tensor] = _FUSED_BACKWARD(grad, q, k, v, out, lse, 0.0, part.causal, scale=scale)
        return pieces
    scores = _scores(part, q, k, rule)
    shares = (scores - lse[..., None]).exp_()
    shrink = _cap_slope(part, q, k, rule)
    value_grad = shares.to(v.dtype).mT @ grad
    delta = (grad * out).sum(-1, dtype=lse.dtype)[..., None]
    score_grad = shares.mul_((grad @ v.mT).to(lse.dtype).sub_(delta)).mul_(scale)
    if shrink is not None:
        score_grad *= shrink
    score_grad = score_grad.to(q.dtype)
    return score_grad @ k, score_grad.mT @ q, value_grad


def _cap_slope(part: Part, q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor | None:
    """The derivative of the soft cap at every score: 1 - tanh^2."""
    if rule.softcap is None:
        return None
    capped = ScoreRule(rule.scale, rule.softcap).scores(q, k, None).div_(rule.softcap)
    return 1 - capped.square_()


def _rows(part: Part, at: slice | Tensor, piece: Tensor) -> tuple[Any, Tensor]:
    """Where the rows of a [n, H, L(, C)] piece go in [N, H(, C)], and these rows."""
    rows = piece.transpose(1, 2)  # [n, L, H(, C)]
    if isinstance(at, slice):
        return at, rows[0]
    if at is part.queries:
        slots, chosen = part.targets
        rows = rows.flatten(0, 1)
        return slots, rows if chosen is None else rows[chosen]
    return at.flatten(), rows.flatten(0, 1)


def _put(out: Tensor, part: Part, piece: Tensor) -> None:
    slots, rows = _rows(part, part.queries, piece)
    out[slots] = rows.to(out.dtype)


def _add(total: Tensor, part: Part, at: slice | Tensor, piece: Tensor) -> None:
    slots, rows = _rows(part, at, piece)
    if isinstance(slots, slice):
        total[slots] += rows
    else:  # no slot twice in a part, so that the order of sums is fixed
        total.index_add_(0, slots, rows.to(total.dtype))


def _merge(out: Tensor, lse: Tensor, part: Part, piece: Tensor, sums: Tensor) -> None:
    """Brings further keys into results that are there."""
    slots, rows = _rows(part, part.queries, piece)
    _, more = _rows(part, part.queries, sums)
    known = lse.T[slots]
    ahead = more - known  # [L, H]
    weight = ahead.sigmoid()[..., None]
    if isinstance(slots, slice):
        out[slots].lerp_(rows.to(out.dtype), weight)
    else:
        out[slots] = out[slots].lerp(rows.to(out.dtype), weight)
    lse.T[slots] = more - logsigmoid(ahead)
