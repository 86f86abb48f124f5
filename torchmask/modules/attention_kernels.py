"""Attention over `AttentionParts`: each part by the kernel that suits it, merged by log-sum-exps, backward by hand.

A query that meets several parts gets softmax results o_i with log-sum-exps l_i; over all its keys the result is the
mean of the o_i weighted by exp(l_i). Backward needs no such merging: with the final result and log-sum-exp, every
part's gradients are those of a flash attention backward pass over its own keys alone (Dao 2023, arXiv 2307.08691,
section 3.1).

Two kernels: PyTorch's own for the CPU, which holds no scores, for parts without masks; and the formula written out,
which knows masks, soft caps and ALiBi and runs on any device. Softmax is in at least fp32 in both.

The first does ALiBi too, where nobody sees a later position: the fall from key to query is then the query's height less
the key's. The key's goes in as one more channel, against which every query has the same number; the query's is the same
for all its keys, so that it changes its log-sum-exp alone. Heights are counted from near the query, or what is left of
the scores beside them would be rounded off, which is why such parts are cut into steps.

Legend: B rows, T slots, N = B * T, n stretches of a part, L its queries, S its keys, H heads, K kv heads, C head_dim.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, pad, scaled_dot_product_attention

from torchmask.modules.attention_parts import AttentionParts, Part
from torchmask.modules.attention_scores import ScoreRule

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

CUT_QUERIES = 256
"""Queries whose scores the written-out kernel holds at a time."""

STEP_QUERIES = 128
"""Queries whose heights are counted from one of them: the steepest head's are 32 at most, so that fp32 keeps 2e-6."""

Kernel = Literal["fused", "folded", "written"]
Ways = list[tuple[Part, Kernel]]
Tensors = tuple[Tensor, Tensor, Tensor]


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
        query, _, value = inputs = (_flat(q), _flat(k, groups), _flat(v, groups))
        precise = torch.promote_types(q.dtype, torch.float32)
        own, across = _ways(parts, rule, q, v)
        wide = _widened(inputs, (*own, *across), rule, precise)
        changes = bool(across) or sinks is not None  # results are not final when they are first written
        out = query.new_empty(*query.shape[:2], value.shape[2], dtype=precise if changes else q.dtype)  # [N, H, C]
        lse = query.new_zeros(query.shape[1], query.shape[0], dtype=precise)  # [H, N]
        for stretch in parts.alone:
            out[stretch] = value[stretch]
        for part, kernel in own:
            result, sums = _forward(part, kernel, wide if kernel == "folded" else inputs, rule)
            _put(out, part, result)
            _put(lse.T, part, sums)
        for part, kernel in across:
            result, sums = _forward(part, kernel, wide if kernel == "folded" else inputs, rule)
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
        inputs, grad = (_flat(q), _flat(k, groups), _flat(v, groups)), _flat(grad_out)
        precise = lse.dtype
        grads = [torch.zeros_like(x, dtype=precise) for x in inputs]
        for stretch in parts.alone:
            grads[2][stretch] = grad[stretch].to(precise)
        own, across = _ways(parts, rule, q, v)
        wide = _widened(inputs, (*own, *across), rule, precise)
        for part, kernel in (*own, *across):
            if kernel == "written":
                pieces = _backward_written(part, inputs, (grad, out, lse), rule)
            else:
                pieces = _backward_fused(part, kernel, wide if kernel == "folded" else inputs, (grad, out, lse), rule)
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


def _ways(parts: AttentionParts, rule: ScoreRule, q: Tensor, v: Tensor) -> tuple[Ways, Ways]:
    """All pairs in parts that a kernel can do, with the kernel: those that begin a query's result, and further ones."""
    can_fuse = q.device.type == "cpu" and rule.softcap is None and q.shape[-1] == v.shape[-1]
    own: Ways = []
    across: Ways = []
    for ways, given in ((own, parts.own), (across, parts.across)):
        for part in given:
            if not can_fuse or part.masked or not (rule.is_plain or part.looks_back):
                ways += [(piece, "written") for piece in part.cut(CUT_QUERIES)]  # so that scores can be held
            elif rule.is_plain:
                ways.append((part, "fused"))
            else:
                first, further = part.steps(STEP_QUERIES)
                ways += [(piece, "folded") for piece in first]
                across += [(piece, "folded") for piece in further]
    return own, across


def _widened(inputs: Tensors, ways: Sequence[tuple[Part, Kernel]], rule: ScoreRule, dtype: torch.dtype) -> Tensors:
    """Queries, keys and values [N, H, C + 1] with a channel for heights, where a kernel wants one; else as they are."""
    if all(kernel != "folded" for _, kernel in ways):
        return inputs
    query, key, value = (pad(x.to(dtype), (0, 1)) for x in inputs)
    query[..., -1] = 1 / rule.scale_for(inputs[0].shape[-1])
    return query, key, value


def _take(x: Tensor, at: slice | Tensor) -> Tensor:
    """[N, H, C] to [n, H, L, C]."""
    return x[at].transpose(0, 1)[None] if isinstance(at, slice) else x[at].transpose(1, 2)


def _forward(part: Part, kernel: Kernel, inputs: Tensors, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """[n, H, L, C] results and their [n, H, L] log-sum-exps."""
    q, k, v = _take(inputs[0], part.queries), _take(inputs[1], part.keys), _take(inputs[2], part.keys)
    if kernel == "fused":
        out, sums = _FUSED(q, k, v, 0.0, part.causal, scale=rule.scale_for(q.shape[-1]))
        return out, sums
    if kernel == "folded":
        heights, k[..., -1] = _heights(part, rule, k.dtype)
        out, sums = _FUSED(q, k, v, 0.0, part.causal, scale=rule.scale_for(q.shape[-1] - 1))
        return out[..., :-1], sums - heights
    scores = _scores(part, q, k, rule)
    sums = scores.logsumexp(-1)
    return scores.sub_(sums[..., None]).exp_().to(v.dtype) @ v, sums


def _heights(part: Part, rule: ScoreRule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, H, L] of its queries and [n, H, S] of its keys, from the middle of its queries on."""
    queries, keys = _positions(part)
    origin = (queries.amin(-1) + queries.amax(-1)) // 2
    return rule.heights(queries, origin, dtype), rule.heights(keys, origin, dtype)


def _scores(part: Part, q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor:
    scores = rule.scores(q, k, _positions(part) if rule.alibi_slopes is not None else None)
    return scores if part.visible is None else scores.masked_fill_(~part.visible, -torch.inf)


def _positions(part: Part) -> tuple[Tensor, Tensor]:
    """[n, L] of its queries and [n, S] of its keys."""
    positions = part.limits.positions
    return positions[part.indexes(part.queries)], positions[part.indexes(part.keys)]


def _results_of(part: Part, results: Tensors) -> Tensors:
    """Gradients and results [n, H, L, C] of its queries, and [n, H, L] log-sum-exps."""
    grad, out, lse = _take(results[0], part.queries), _take(results[1], part.queries), results[2][:, part.queries]
    if part.valid is not None:  # a repeated slot counts once
        grad = grad.masked_fill(~part.valid[:, None, :, None], 0)
    return grad, out, lse[None] if isinstance(part.queries, slice) else lse.transpose(0, 1)


def _backward_fused(part: Part, kernel: Kernel, inputs: Tensors, results: Tensors, rule: ScoreRule) -> Tensors:
    """The part's share of the gradients of its queries, keys and values, [n, H, L or S, C]."""
    q, k, v = _take(inputs[0], part.queries), _take(inputs[1], part.keys), _take(inputs[2], part.keys)
    grad, out, lse = _results_of(part, results)
    if kernel == "fused":
        scale = rule.scale_for(q.shape[-1])
        pieces: Tensors = _FUSED_BACKWARD(grad, q, k, v, out, lse, 0.0, part.causal, scale=scale)
        return pieces
    heights, k[..., -1] = _heights(part, rule, k.dtype)
    grad, out = (pad(x.to(q.dtype), (0, 1)) for x in (grad, out))
    scale = rule.scale_for(q.shape[-1] - 1)
    wide = _FUSED_BACKWARD(grad, q, k, v, out, lse + heights, 0.0, part.causal, scale=scale)
    return wide[0][..., :-1], wide[1][..., :-1], wide[2][..., :-1]


def _backward_written(part: Part, inputs: Tensors, results: Tensors, rule: ScoreRule) -> Tensors:
    """`_backward_fused` by the formula."""
    q, k, v = _take(inputs[0], part.queries), _take(inputs[1], part.keys), _take(inputs[2], part.keys)
    grad, out, lse = _results_of(part, results)
    scores = rule.capped_scores(q, k)
    slope = None if rule.softcap is None else (scores / rule.softcap).square_().neg_().add_(1)  # the cap's, at each
    if rule.alibi_slopes is not None:
        rule.subtract_falls(scores, *_positions(part))
    shares = scores.sub_(lse[..., None]).exp_()
    if part.visible is not None:
        shares.masked_fill_(~part.visible, 0)
    value_grad = shares.to(v.dtype).mT @ grad
    delta = (grad * out).sum(-1, dtype=lse.dtype)[..., None]
    score_grad = shares.mul_((grad @ v.mT).to(lse.dtype).sub_(delta)).mul_(rule.scale_for(q.shape[-1]))
    if slope is not None:
        score_grad *= slope
    score_grad = score_grad.to(q.dtype)
    return score_grad @ k, score_grad.mT @ q, value_grad


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
