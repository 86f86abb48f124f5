"""Grouped-query self-attention and the kernels it can run on; all kernels agree with `dense` to rounding.

Legend: B rows, T slots of queries, S slots of keys, D embed_dim, H heads, K kv heads, C head_dim.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from torchmask.modules.attention_flex import attend_flex
from torchmask.modules.attention_kernels import ScoreRule, attend_parts
from torchmask.modules.attention_mask import AttentionMask
from torchmask.modules.attention_varlen import attend_varlen
from torchmask.modules.rope import apply_rope

if TYPE_CHECKING:
    from torchmask.modules.decoder import DecoderSpec
    from torchmask.modules.kv_cache import LayerCache


class SelfAttention(nn.Module):
    """Causal self-attention with rotary positions and `num_kv_heads <= num_heads` (Ainslie et al. 2023, 2305.13245)."""

    def __init__(self, spec: "DecoderSpec") -> None:
        super().__init__()
        self.head_dim, self.num_heads = spec.head_dim, spec.num_heads
        self.scale, self.softcap, self.alibi = spec.attn_scale, spec.attn_softcap, spec.alibi
        query_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.embed_dim, query_dim, bias=spec.attention_bias)
        self.k_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.attention_bias)
        self.v_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.attention_bias)
        self.o_proj = nn.Linear(query_dim, spec.embed_dim, bias=spec.attention_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: AttentionMask,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Attended values.

        Args:
            x: [B, T, D].
            cos, sin: [B, 1, T, C] of `rope_cos_sin`; None = nothing is rotated.
            mask: of this forward pass and kind of layer.
            cache: keys and values of earlier slots; this call's are appended.

        Returns:
            [B, T, D].
        """
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cos is not None and sin is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        slopes = alibi_slopes(self.num_heads, q.device) if self.alibi else None
        out = attend(q, k, v, mask, scale=self.scale, softcap=self.softcap, alibi_slopes=slopes)
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
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """softmax(scores) v under `mask`; see `ScoreRule` for what the scores are. Windows are the mask's business.

    Args:
        q: [B, H, T, C].
        k, v: [B, K, S, C], K divides H.
        scale: of q k^T; None = 1 / sqrt(C).
        softcap: scores are squeezed into -softcap .. softcap, before any bias.
        alibi_slopes: [H]; scores fall by these a position of distance.

    Returns:
        [B, H, T, C].
    """
    rule = ScoreRule(scale, softcap, alibi_slopes)
    if mask.parts is not None:
        return _attend_parts(q, k, v, mask.parts, rule)
    if mask.documents is not None:
        return attend_varlen(q, k, v, mask.documents, scale)
    if mask.blocks is not None:
        return attend_flex(q, k, v, mask.blocks, rule, mask.positions)
    if mask.reference is not None or not rule.is_plain:
        visible = mask.reference if mask.reference is not None else mask.visible
        return attend_dense(q, k, v, visible, rule=rule, positions=mask.positions)
    return scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.visible,
        is_causal=mask.visible is None,
        scale=scale,
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
) -> Tensor:
    """The reference: every step written out, softmax in at least fp32.

    Args:
        visible: [B, 1, T, S] bool; None = causal.
        rule: None = only scaled.
        positions: [B, S] int64 for ALiBi, the queries' the last T; None = slot numbers.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if visible is None:
        every = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        visible = every.tril(num_keys - num_queries)
    if positions is None:
        positions = torch.arange(num_keys, device=q.device)[None]
    distances = (positions[:, -num_queries:, None] - positions[:, None, :])[:, None]  # [B, 1, T, S]
    scores = (rule or ScoreRule()).scores(q, k, distances)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v


# The parts differ from batch to batch: compiling for each would never end.
_attend_parts = torch.compiler.disable(attend_parts)
