"""Grouped-query self-attention and the kernels it can run on; all kernels agree with `dense` to rounding.

Legend: B rows, T slots of queries, S slots of keys, D embed_dim, H heads, K kv heads, C head_dim.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from torchmask.modules.attention_flex import attend_flex
from torchmask.modules.attention_kernels import attend_parts
from torchmask.modules.attention_mask import AttentionMask
from torchmask.modules.attention_scores import ScoreRule, matmul_by_group
from torchmask.modules.attention_varlen import attend_varlen
from torchmask.modules.norm import build_norm
from torchmask.modules.rope import apply_rope
from torchmask.modules.spec import DecoderSpec

if TYPE_CHECKING:
    from torchmask.modules.kv_cache import LayerCache


class SelfAttention(nn.Module):
    """Causal self-attention with `num_kv_heads <= num_heads` (Ainslie et al. 2023, 2305.13245).

    Attributes:
        sinks: [H], a score of each head that takes attention away from all keys; None where the spec has none.
    """

    sinks: Tensor | None

    def __init__(self, spec: DecoderSpec, layer: int = 0) -> None:
        super().__init__()
        self.head_dim, self.num_heads = spec.head_dim, spec.num_heads
        self.scale, self.softcap = spec.attn_scale_of(layer), spec.attn_softcap
        self.alibi_scale, self.alibi_rounded = spec.alibi_scale, spec.alibi_rounded
        self.qk_norm = spec.qk_norm
        query_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.embed_dim, query_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(query_dim, spec.embed_dim, bias=spec.o_bias)
        if spec.qk_norm is not None:
            self.q_norm = build_norm(spec, spec.head_dim if spec.qk_norm == "head" else query_dim)
            self.k_norm = build_norm(spec, spec.head_dim if spec.qk_norm == "head" else kv_dim)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(spec.num_heads)) if spec.attn_sinks else None)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, ...] | None, mask: AttentionMask, cache: "LayerCache | None" = None
    ) -> Tensor:
        """Attended values.

        Args:
            x: [B, T, D].
            rope: cosines and sines of `rope_cos_sin`, of queries and again of keys where they differ; None = nothing is
                rotated.
            mask: of this forward pass and kind of layer.
            cache: keys and values of earlier slots; this call's are appended.

        Returns:
            [B, T, D].
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self._heads(self.v_proj(x))
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._heads(q), self._heads(k)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope[:2]), apply_rope(k, *rope[-2:])
        if cache is not None:
            k, v = cache.append(k, v)
        rule = ScoreRule(self.scale, self.softcap, mask.alibi_slopes, self.alibi_scale, self.alibi_rounded)
        out = attend(q, k, v, mask, rule, sinks=self.sinks)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, C]


def alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """[H] fp32: a geometric series from 2^(-8 / H), interleaved with the next one where H is no power of two.

    Reference: Press et al. 2022, arXiv 2108.12409, section 3, and its `get_slopes`.

    >>> alibi_slopes(4).tolist(), alibi_slopes(3).tolist()
    ([0.25, 0.0625, 0.015625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    slopes += [2 ** (-4 / power * (i + 1)) for i in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, device=device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    rule: ScoreRule | None = None,
    *,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scores) v under `mask`, by the kernel that the mask was built for. Windows are the mask's business.

    Args:
        q: [B, H, T, C].
        k, v: [B, K, S, C], K divides H.
        rule: what the scores are; None = products by 1 / sqrt(C).
        sinks: [H]; the score of a further key that everyone sees and whose value is 0 (arXiv 2508.10925, section 2.3).

    Returns:
        [B, H, T, C].
    """
    rule = rule or ScoreRule()
    if mask.parts is not None:
        return _attend_parts(q, k, v, mask.parts, rule, sinks=sinks)
    if mask.documents is not None:
        assert sinks is None, "the mask was built without `biased`"
        return attend_varlen(q, k, v, mask.documents, rule.scale)
    if mask.blocks is not None:
        return attend_flex(q, k, v, mask.blocks, rule, mask.positions, sinks=sinks)
    if mask.reference is not None or not rule.is_plain or sinks is not None:
        visible = mask.reference if mask.reference is not None else mask.visible
        return attend_dense(q, k, v, visible, rule=rule, positions=mask.positions, sinks=sinks)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.visible,
        is_causal=mask.visible is None,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    *,
    rule: ScoreRule | None = None,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The reference: every step written out, softmax in at least fp32.

    Args:
        visible: [B, 1, T, S] bool; None = causal.
        rule: None = only scaled.
        positions: [B, S] int64 for ALiBi, the queries' the last T; None = slot numbers.
        sinks: [H].
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if visible is None:
        every = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        visible = every.tril(num_keys - num_queries)
    if positions is None:
        positions = torch.arange(num_keys, device=q.device)[None]
    scores = (rule or ScoreRule()).scores(q, k, (positions[:, -num_queries:], positions))
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        shares = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    return matmul_by_group(shares.to(v.dtype), v)


# The parts differ from batch to batch: compiling for each would never end.
_attend_parts = torch.compiler.disable(attend_parts)
