"""The decoder: one module for every family, told apart by the facts in a `DecoderSpec`.

The masks are built once per forward pass and kind of layer, here, next to the kernels and on their device; the layers
get them ready made.

Legend: B rows, T slots, D embed_dim, V vocab_size.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchmask.modules.attention import SelfAttention, alibi_slopes
from torchmask.modules.attention_mask import AttentionMask, build_attention_mask
from torchmask.modules.attention_varlen import heads_fit
from torchmask.modules.head import Head
from torchmask.modules.kv_cache import KVCache, LayerCache
from torchmask.modules.mlp import MLP, GatedMLP
from torchmask.modules.moe import MoE
from torchmask.modules.norm import build_norm
from torchmask.modules.rope import document_lengths_of_slots, rope_cos_sin
from torchmask.modules.rope_scaling import BY_LENGTH, RopeScaling
from torchmask.modules.spec import DecoderSpec

AttentionBackend = Literal["auto", "dense", "sdpa", "flex", "varlen"]
CosSin = tuple[Tensor, ...]
"""As `SelfAttention.forward` takes them."""


class DecoderLayer(nn.Module):
    """Attention, then feed-forward (or both at once), each added to its input.

    Attributes:
        checkpoint_activations: keep only the block's input for the backward pass and compute the rest again.
    """

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        before, after = spec.norm_placement != "post", spec.norm_placement != "pre"
        has_mlp_norm = before and not (spec.parallel_residual and spec.shared_norm)
        self.attn_norm = build_norm(spec, spec.embed_dim) if before else nn.Identity()
        self.attn = SelfAttention(spec, layer)
        self.attn_post_norm = build_norm(spec, spec.embed_dim) if after else nn.Identity()
        self.mlp_norm = build_norm(spec, spec.embed_dim) if has_mlp_norm else nn.Identity()
        self.mlp = _feed_forward(spec, layer)
        self.mlp_post_norm = build_norm(spec, spec.embed_dim) if after else nn.Identity()
        self.spec = spec
        self.checkpoint_activations = False

    def forward(self, x: Tensor, rope: CosSin | None, mask: AttentionMask, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        block = self._parallel if self.spec.parallel_residual else self._sequential
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, x, rope, mask, cache, use_reentrant=False)
        return block(x, rope, mask, cache)

    def _sequential(self, x: Tensor, rope: CosSin | None, mask: AttentionMask, cache: LayerCache | None) -> Tensor:
        normed = self.attn_norm(x)
        attended = self.attn_post_norm(self.attn(normed, rope, mask, cache))
        x = self._add(normed if self.spec.residual_from_norm else x, attended)
        normed = self.mlp_norm(x)
        return self._add(normed if self.spec.residual_from_norm else x, self.mlp_post_norm(self.mlp(normed)))

    def _parallel(self, x: Tensor, rope: CosSin | None, mask: AttentionMask, cache: LayerCache | None) -> Tensor:
        normed = self.attn_norm(x)
        attended = self.attn_post_norm(self.attn(normed, rope, mask, cache))
        fed = self.mlp_post_norm(self.mlp(normed if self.spec.shared_norm else self.mlp_norm(x)))
        return self._add(normed if self.spec.residual_from_norm else x, attended + fed)

    def _add(self, x: Tensor, more: Tensor) -> Tensor:
        return x + more if self.spec.residual_scale == 1 else x + more * self.spec.residual_scale


def _feed_forward(spec: DecoderSpec, layer: int) -> nn.Module:
    experts = spec.moe_of(layer)
    if experts is not None:
        return MoE(spec.embed_dim, experts, activation=spec.activation)
    block = GatedMLP if spec.gated_mlp else MLP
    return block(spec.embed_dim, spec.intermediate_dim, bias=spec.mlp_bias, activation=spec.activation)


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
        self.embed_positions = nn.Embedding(spec.max_seq_len, spec.embed_dim) if spec.learned_positions else None
        self.embed_norm = build_norm(spec, spec.embed_dim) if spec.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(spec, i) for i in range(spec.num_layers))
        self.norm = build_norm(spec, spec.embed_dim)
        self.lm_head = Head(spec)
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

        Raises:
            ValueError: a position that learned positions have no row for.
        """
        spec, first = self.spec, 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        may_be_long = tokens.device.type == "cpu" or first + tokens.shape[1] > spec.max_seq_len  # else no need to wait
        if spec.learned_positions and may_be_long:
            _check_positions(positions, spec.max_seq_len)
        x = self._embed(tokens, positions)
        masks = self._masks(tokens, positions, visible_until, visible_from, cache)
        ropes = self._ropes(positions, visible_until if cache is None else None, x.dtype)
        for i, layer in enumerate(self.layers):
            mask, rope = masks[spec.window_of(i)], ropes.get(spec.rope_of(i))
            x = layer(x, rope, mask, None if cache is None else cache.layers[i])
        return self.norm(x)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        if self.spec.embed_scale != 1:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        return self.embed_norm(x)

    def _ropes(
        self, positions: Tensor, visible_until: Tensor | None, dtype: torch.dtype
    ) -> dict[tuple[float, RopeScaling | None] | None, CosSin]:
        """Cosines and sines of every kind of layer that has them, by base and scaling."""
        spec = self.spec
        kinds = {spec.rope_of(i) for i in range(spec.num_layers)} - {None}
        lengths = None
        if any(isinstance(scaling, BY_LENGTH) for _, scaling in filter(None, kinds)):
            lengths = document_lengths_of_slots(positions, visible_until)
        ropes: dict[tuple[float, RopeScaling | None] | None, CosSin] = {
            (base, scaling): rope_cos_sin(
                positions, spec.rope_dim or spec.head_dim, base=base, scaling=scaling, dtype=dtype, lengths=lengths
            )
            for base, scaling in filter(None, kinds)
        }
        if spec.query_growth_length is None:
            return ropes
        steps = (positions // spec.query_growth_length)[:, None, :, None].to(torch.promote_types(dtype, torch.float32))
        growth = (1 + spec.query_growth * steps.log1p()).to(dtype)  # [B, 1, T, 1]
        return {kind: (cos * growth, sin * growth, cos, sin) for kind, (cos, sin) in ropes.items()}

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
        biased = spec.alibi or spec.attn_softcap is not None or spec.attn_sinks
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
        if spec.alibi:
            slopes = alibi_slopes(spec.num_heads, tokens.device)
            masks = {window: replace(mask, alibi_slopes=slopes) for window, mask in masks.items()}
        return masks

    def new_cache(self, num_rows: int, num_slots: int) -> KVCache:
        """An empty cache for `num_rows` sequences of up to `num_slots` tokens."""
        windows = [self.spec.window_of(i) for i in range(self.spec.num_layers)]
        return KVCache(num_rows, num_slots, windows=windows, device=self.embed_tokens.weight.device)

    def _backend(self) -> str:
        weight = self.embed_tokens.weight
        if self.attention == "varlen" and not heads_fit(weight.dtype, self.spec.head_dim):
            return "flex" if weight.device.type == "cuda" else "sdpa"
        if self.attention != "auto":
            return self.attention
        # FlexAttention's CUDA kernels take heads of at least 16.
        return "flex" if weight.device.type == "cuda" and self.spec.head_dim >= 16 else "sdpa"


def _check_positions(positions: Tensor, num_rows: int) -> None:
    longest = int(positions.max()) + 1
    if longest > num_rows:
        raise ValueError(
            f"a document of {longest} tokens: the model has learned positions for {num_rows}; cut or split it"
            " (packing.max_seq_len, over_length), or count positions from each document's start"
        )
