"""Grouped-query self-attention and the kernels it can run on; all kernels agree with `dense` to rounding.

Legend: B rows, T slots of queries, S slots of keys, D embed_dim, H heads, K kv heads, C head_dim.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from torchmask.modules.attention_mask import AttentionMask, Segment, SegmentKind, may_attend
from torchmask.modules.rope import apply_rope

if TYPE_CHECKING:
    from torchmask.modules.decoder import DecoderSpec
    from torchmask.modules.kv_cache import LayerCache


class SelfAttention(nn.Module):
    """Causal self-attention with rotary positions and `num_kv_heads <= num_heads` (Ainslie et al. 2023, 2305.13245)."""

    def __init__(self, spec: "DecoderSpec") -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        query_dim, kv_dim = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.embed_dim, query_dim, bias=spec.attention_bias)
        self.k_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.attention_bias)
        self.v_proj = nn.Linear(spec.embed_dim, kv_dim, bias=spec.attention_bias)
        self.o_proj = nn.Linear(query_dim, spec.embed_dim, bias=spec.attention_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: AttentionMask,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Attended values.

        Args:
            x: [B, T, D].
            cos, sin: [B, 1, T, C] of `rope_cos_sin`.
            mask: of this forward pass.
            cache: keys and values of earlier slots; this call's are appended.

        Returns:
            [B, T, D].
        """
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, C]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """softmax(q k^T / sqrt(C)) v under `mask`.

    Args:
        q: [B, H, T, C].
        k, v: [B, K, S, C], K divides H.

    Returns:
        [B, H, T, C].
    """
    if mask.segments is not None:
        return _attend_by_segments(q, k, v, mask.segments)
    if mask.blocks is not None:
        return _flex_kernel(q.device.type)(q, k, v, block_mask=mask.blocks, enable_gqa=q.shape[1] != k.shape[1])
    if mask.reference is not None:
        return attend_dense(q, k, v, mask.reference)
    return _sdpa(q, k, v, mask.visible)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """The reference: every step written out, [B, 1, T, S] bool `visible`, softmax in at least fp32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    at_least_fp32 = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(at_least_fp32) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=q.shape[1] != k.shape[1]
    )


@torch.compiler.disable  # segments differ from batch to batch: compiling for each would never end
def _attend_by_segments(q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    rows: list[list[Tensor]] = [[] for _ in range(q.shape[0])]
    for segment in segments:
        part = slice(segment.row, segment.row + 1), slice(None), slice(segment.start, segment.stop)
        if segment.kind is SegmentKind.SELF:
            out = v[part].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        else:
            visible = None if segment.visible_until is None else may_attend(segment.visible_until)[:, None]
            out = _sdpa(q[part], k[part], v[part], visible)
        rows[segment.row].append(out)
    out = torch.cat([torch.cat(parts, dim=2) for parts in rows])
    if all(segment.kind is SegmentKind.SELF for segment in segments):
        out = out + 0 * (q.sum() + k.sum())  # an all-padding batch: gradients of q and k must exist on every rank
    return out


@cache
def _flex_kernel(device_type: str) -> Any:
    """FlexAttention; uncompiled it would materialise T x T, so it is compiled wherever it will run for real."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention
