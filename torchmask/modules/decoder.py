"""The decoder: one module for every family, told apart by the facts in a `DecoderSpec`.

The mask is built once per forward pass, here, next to the kernels and on their device; the layers get it ready made.

Legend: B rows, T slots, D embed_dim, V vocab_size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchmask.modules.attention import SelfAttention
from torchmask.modules.attention_mask import AttentionMask, build_attention_mask
from torchmask.modules.kv_cache import KVCache, LayerCache
from torchmask.modules.mlp import GatedMLP
from torchmask.modules.rope import RopeScaling, rope_cos_sin

AttentionBackend = Literal["auto", "dense", "sdpa", "flex"]


@dataclass(frozen=True)
class DecoderSpec:
    """The architecture of a decoder, as named facts; no field is a model's name.

    Attributes:
        vocab_size: V, rows of the embedding.
        embed_dim: D.
        intermediate_dim: width of the feed-forward block.
        num_kv_heads: divides num_heads.
        head_dim: C; num_heads * head_dim need not be embed_dim.
        max_seq_len: the longest sequence the model was made for, in tokens; not enforced by the decoder.
        norm_eps: added to the mean square in RMSNorm.
        rope_base: base of the rotary wavelengths.
        tie_embeddings: the output head is the embedding.
        attention_bias: q, k, v and o projections have biases.
        mlp_bias: the feed-forward projections have biases.
    """

    vocab_size: int
    embed_dim: int
    intermediate_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


class DecoderLayer(nn.Module):
    """Pre-norm block: attention, then feed-forward, each added to its input.

    Attributes:
        checkpoint_activations: keep only the block's input for the backward pass and compute the rest again.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(spec.embed_dim, eps=spec.norm_eps)  # at least fp32 inside, whatever the dtype
        self.attn = SelfAttention(spec)
        self.mlp_norm = nn.RMSNorm(spec.embed_dim, eps=spec.norm_eps)
        self.mlp = GatedMLP(spec.embed_dim, spec.intermediate_dim, bias=spec.mlp_bias)
        self.checkpoint_activations = False

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._block, x, cos, sin, mask, cache, use_reentrant=False)
        return self._block(x, cos, sin, mask, cache)

    def _block(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask, cache: LayerCache | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A causal language model: tokens to hidden states, and a head from hidden states to logits.

    Args:
        spec: the architecture.
        attention: `auto` picks flex on CUDA and sdpa elsewhere; `dense` is the reference, quadratic in memory.

    Attributes:
        hub_config: the config.json the model stands for; set and read by `torchmask.models`, carried along here.
    """

    hub_config: dict[str, Any]

    def __init__(self, spec: DecoderSpec, *, attention: AttentionBackend = "auto") -> None:
        super().__init__()
        self.spec = spec
        self.attention = attention
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.embed_dim)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.embed_dim, eps=spec.norm_eps)
        self.lm_head = nn.Linear(spec.embed_dim, spec.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head share the embedding's parameter if the spec says so; again after `to_empty`, which unties."""
        if self.spec.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        visible_until: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; logits are `model.lm_head(hidden)`.

        Args:
            tokens: [B, T] int64.
            positions: [B, T] int64, distance along each token's own document; None = slot number.
            visible_until: [B, T] int64, see `torchmask.modules.attention_mask`; None = plain causal rows.
            cache: keys and values of earlier slots; then slots are those of the cache.

        Returns:
            [B, T, D] in the parameters' dtype.
        """
        x = self.embed_tokens(tokens)
        first = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        if cache is None:
            mask = build_attention_mask(visible_until, tokens, backend=self._backend(x.device))
        else:
            mask = cache.mask(tokens.shape[1], visible_until)
        spec = self.spec
        cos, sin = rope_cos_sin(positions, spec.head_dim, base=spec.rope_base, scaling=spec.rope_scaling, dtype=x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, None if cache is None else cache.layers[i])
        return self.norm(x)

    def new_cache(self, num_rows: int, num_slots: int) -> KVCache:
        """An empty cache for `num_rows` sequences of up to `num_slots` tokens."""
        return KVCache(num_rows, num_slots, num_layers=self.spec.num_layers, device=self.embed_tokens.weight.device)

    def _backend(self, device: torch.device) -> str:
        if self.attention != "auto":
            return self.attention
        # FlexAttention's CUDA kernels take heads of at least 16.
        return "flex" if device.type == "cuda" and self.spec.head_dim >= 16 else "sdpa"
