"""The decoder: one module for every family, told apart by the facts in a `DecoderSpec`.

The masks are built once per forward pass and kind of layer, here, next to the kernels and on their device; the layers
get them ready made.

Legend: B rows, T slots, D embed_dim, V vocab_size.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchmask.modules.attention import SelfAttention
from torchmask.modules.attention_mask import AttentionMask, build_attention_mask
from torchmask.modules.attention_varlen import heads_fit
from torchmask.modules.kv_cache import KVCache, LayerCache
from torchmask.modules.mlp import GatedMLP
from torchmask.modules.rope import RopeScaling, rope_cos_sin

AttentionBackend = Literal["auto", "dense", "sdpa", "flex", "varlen"]


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
        sliding_window: how many positions back, itself included, a token of a windowed layer sees; None = everything.
        window_pattern: which layers are windowed, repeated over the layers: (True, False) = every other one.
        attn_scale: of q k^T; None = 1 / sqrt(head_dim).
        attn_softcap: attention scores are squeezed into -attn_softcap .. attn_softcap.
        alibi: scores fall linearly with distance, in place of rotary positions (Press et al. 2022, 2108.12409).
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
    sliding_window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    attn_scale: float | None = None
    attn_softcap: float | None = None
    alibi: bool = False

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer."""
        return self.sliding_window if self.window_pattern[layer % len(self.window_pattern)] else None


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
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        mask: AttentionMask,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(self._block, x, cos, sin, mask, cache, use_reentrant=False)
        return self._block(x, cos, sin, mask, cache)

    def _block(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: AttentionMask, cache: LayerCache | None
    ) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A causal language model: tokens to hidden states, and a head from hidden states to logits.

    Args:
        spec: the architecture.
        attention: `auto` picks flex on CUDA and sdpa elsewhere; `varlen` is for flat packs on CUDA in half precision
            and gives way to flex or sdpa for all else; `dense` is the reference, quadratic in memory.

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
        visible_from: Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; logits are `model.lm_head(hidden)`.

        Args:
            tokens: [B, T] int64.
            positions: [B, T] int64, distance along each token's own document; None = slot number.
            visible_until: [B, T] int64, see `torchmask.modules.attention_mask`; None = plain causal rows.
            visible_from: [B, T] int64, the first slot that sees each slot; None = the slot itself, which is causal.
            cache: keys and values of earlier slots; then slots are those of the cache.

        Returns:
            [B, T, D] in the parameters' dtype.
        """
        x = self.embed_tokens(tokens)
        first = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        masks = self._masks(tokens, positions, visible_until, visible_from, cache)
        spec, cos, sin = self.spec, None, None
        if not spec.alibi:
            cos, sin = rope_cos_sin(
                positions, spec.head_dim, base=spec.rope_base, scaling=spec.rope_scaling, dtype=x.dtype
            )
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, masks[spec.window_of(i)], None if cache is None else cache.layers[i])
        return self.norm(x)

    def _masks(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible_until: Tensor | None,
        visible_from: Tensor | None,
        cache: KVCache | None,
    ) -> dict[int | None, AttentionMask]:
        """The mask of every kind of layer, by its window."""
        spec = self.spec
        biased = spec.alibi or spec.attn_softcap is not None
        masks = {}
        for window in {spec.window_of(i) for i in range(spec.num_layers)}:
            if cache is None:
                masks[window] = build_attention_mask(
                    visible_until,
                    tokens,
                    backend=self._backend(),
                    visible_from=visible_from,
                    positions=positions,
                    window=window,
                    biased=biased,
                )
            else:
                masks[window] = cache.mask(
                    tokens.shape[1],
                    visible_until,
                    visible_from=visible_from,
                    positions=positions,
                    window=window,
                    biased=biased,
                )
        return masks

    def new_cache(self, num_rows: int, num_slots: int) -> KVCache:
        """An empty cache for `num_rows` sequences of up to `num_slots` tokens."""
        return KVCache(num_rows, num_slots, num_layers=self.spec.num_layers, device=self.embed_tokens.weight.device)

    def _backend(self) -> str:
        weight = self.embed_tokens.weight
        if self.attention == "varlen" and not heads_fit(weight.dtype, self.spec.head_dim):
            return "flex" if weight.device.type == "cuda" else "sdpa"
        if self.attention != "auto":
            return self.attention
        # FlexAttention's CUDA kernels take heads of at least 16.
        return "flex" if weight.device.type == "cuda" and self.spec.head_dim >= 16 else "sdpa"
