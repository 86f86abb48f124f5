"""What a decoder is made of, as named facts; no field is a model's name."""

import math
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args

from torchmask.modules.mlp import Activation
from torchmask.modules.rope_scaling import BY_LENGTH, LongRopeScaling, RopeScaling

_ABOVE_ZERO = ("norm_eps", "rope_base", "window_rope_base", "attn_softcap", "logit_softcap")


@dataclass(frozen=True)
class MoESpec:
    """Feed-forward blocks that are mixtures of experts.

    Attributes:
        num_experts: E.
        experts_per_token: how many of them a token goes through.
        expert_dim: width of one expert.
        normalize: the chosen experts' weights are made to sum to 1.
        layer_pattern: which layers have experts, repeated over the layers; the others are dense.
        bias: router and experts have biases.
        gate_limit: gates and values are clamped to this, the gate is x * sigmoid(gate_slope x) and values are one more
            (the GPT-OSS model card, arXiv 2508.10925); None = the spec's activation, unclamped.
        gate_slope: of such gates.
    """

    num_experts: int
    experts_per_token: int
    expert_dim: int
    normalize: bool = True
    layer_pattern: tuple[bool, ...] = (True,)
    bias: bool = False
    gate_limit: float | None = None
    gate_slope: float = 1.702

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        _check_fields(self)


@dataclass(frozen=True)
class DecoderSpec:
    """The architecture of a decoder.

    Patterns say something of each layer and are repeated over the layers: (True, False) is every other one.

    Attributes:
        vocab_size: V, rows of the embedding.
        embed_dim: D.
        intermediate_dim: width of the feed-forward block.
        num_kv_heads: divides num_heads.
        head_dim: C; num_heads * head_dim need not be embed_dim.
        max_seq_len: the longest sequence the model was made for, in tokens; enforced only by learned positions.
        norm: RMSNorm, or LayerNorm with a bias.
        norm_eps: added to the mean square or variance.
        norm_offset: added to the norms' weights (Gemma's 1 + w).
        norm_placement: norms before a block (pre), on what it adds (post), or on both sides.
        parallel_residual: attention and feed-forward read the same input and are added together.
        shared_norm: of a parallel residual, both read through one norm.
        residual_from_norm: blocks are added to their normed input.
        residual_scale: of what each block adds.
        rope_base: base of the rotary wavelengths.
        rope_dim: channels of each head that are rotated, the first ones; None = all.
        rope_pattern: which layers have rotary positions; (False,) = none.
        window_rope_base: of layers with a sliding window; None = they rotate as all others do.
        window_rope_scaling: of these layers, where they have their own base.
        learned_positions: positions are an embedding of max_seq_len rows.
        alibi: scores fall linearly with distance, in place of rotary positions (Press et al. 2022, 2108.12409).
        alibi_scale: of this fall.
        alibi_rounded: slopes, positions and their products are rounded to bf16 before they are subtracted and scaled,
            as in Falcon's code (https://huggingface.co/tiiuae/falcon-rw-1b, `build_alibi_tensor`).
        embed_scale: of the embeddings.
        embed_norm: a norm after the embedding.
        tie_embeddings: the output head is the embedding.
        logit_scale: of the logits.
        logit_softcap: logits are squeezed into -logit_softcap .. logit_softcap, after scaling.
        qkv_bias: q, k and v projections have biases.
        o_bias: so has the output projection.
        qk_norm: queries and keys are normed, each head alone or all heads together.
        attn_scale: of q k^T; None = 1 / sqrt(head_dim).
        attn_scale_by_layer: that of layer i is divided by i + 1 as well.
        query_growth, query_growth_length: g and L; queries are times 1 + g ln(1 + p // L) at position p, as in Llama 4.
            Only where all channels of all layers rotate.
        attn_softcap: attention scores are squeezed into -attn_softcap .. attn_softcap.
        attn_sinks: each head has a learned score that takes attention away from all keys (a key without value).
        sliding_window: how many positions back, itself included, a token of a windowed layer sees; None = everything.
        window_pattern: which layers are windowed.
        activation: of the feed-forward block.
        gated_mlp: it is down(act(gate(x)) * up(x)), else down(act(up(x))).
        mlp_bias: its projections have biases.
        moe: experts in place of some or all feed-forward blocks.
    """

    vocab_size: int
    embed_dim: int
    intermediate_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "post", "both"] = "pre"
    parallel_residual: bool = False
    shared_norm: bool = False
    residual_from_norm: bool = False
    residual_scale: float = 1.0
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_dim: int | None = None
    rope_pattern: tuple[bool, ...] = (True,)
    window_rope_base: float | None = None
    window_rope_scaling: RopeScaling | None = None
    learned_positions: bool = False
    alibi: bool = False
    alibi_scale: float = 1.0
    alibi_rounded: bool = False
    embed_scale: float = 1.0
    embed_norm: bool = False
    tie_embeddings: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    attn_scale: float | None = None
    attn_scale_by_layer: bool = False
    query_growth: float = 0.0
    query_growth_length: int | None = None
    attn_softcap: float | None = None
    attn_sinks: bool = False
    sliding_window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    activation: Activation = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    moe: MoESpec | None = None

    def __post_init__(self) -> None:
        """Checks what no decoder can be built from, or would run without an error and be another model."""
        _check_fields(self, may_be_zero=("num_layers", "rope_dim"))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}, which does not divide num_heads, {self.num_heads}")
        rotates = any(self.rope_of(i) is not None for i in range(self.num_layers))
        rope_dim = self.head_dim if self.rope_dim is None else self.rope_dim
        if rotates and not 0 < rope_dim + rope_dim % 2 <= self.head_dim:
            raise ValueError(f"{rope_dim} channels of heads of {self.head_dim} cannot be rotated in pairs")
        whole = rope_dim == self.head_dim and all(self.rope_of(i) is not None for i in range(self.num_layers))
        if self.query_growth and (self.query_growth_length is None or not whole):
            raise ValueError("query_growth needs query_growth_length, and all channels of all layers to rotate")
        if self.moe is not None and self.moe.experts_per_token > self.moe.num_experts:
            raise ValueError(f"experts_per_token is {self.moe.experts_per_token}, of {self.moe.num_experts} experts")

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer."""
        return self.sliding_window if _at(self.window_pattern, layer) else None

    def rope_of(self, layer: int) -> tuple[float, RopeScaling | None] | None:
        """Base and scaling of a layer's rotary positions; None = it has none."""
        if self.alibi or not _at(self.rope_pattern, layer):
            return None
        if self.window_rope_base is not None and self.window_of(layer) is not None:
            return self.window_rope_base, self.window_rope_scaling
        return self.rope_base, self.rope_scaling

    @property
    def rope_changes_after(self) -> int | None:
        """Documents of more tokens than this rotate by frequencies that depend on their length; None = none do."""
        scalings = (self.rope_scaling, self.window_rope_scaling)
        return min((s.original_max_seq_len for s in scalings if isinstance(s, BY_LENGTH)), default=None)

    @property
    def rope_switches_after(self) -> tuple[int, ...]:
        """Documents of more tokens than one of these rotate by other frequencies, all their tokens."""
        scalings = (self.rope_scaling, self.window_rope_scaling)
        return tuple(s.original_max_seq_len for s in scalings if isinstance(s, LongRopeScaling))

    def attn_scale_of(self, layer: int) -> float | None:
        """What a layer multiplies q k^T with; None = 1 / sqrt(head_dim)."""
        if not self.attn_scale_by_layer:
            return self.attn_scale
        return (self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale) / (layer + 1)

    def moe_of(self, layer: int) -> MoESpec | None:
        """The experts of a layer; None = it is dense."""
        return self.moe if self.moe is not None and _at(self.moe.layer_pattern, layer) else None


def _check_fields(spec: Any, *, may_be_zero: tuple[str, ...] = ()) -> None:
    """Numbers are numbers, flags flags, and what counts or measures something is above 0.

    Raises:
        ValueError: with the field and its value.
    """
    for field in fields(spec):
        value, kinds = getattr(spec, field.name), (field.type,)
        if isinstance(field.type, UnionType):
            kinds = get_args(field.type)
        if value is None and NoneType in kinds:
            continue
        if bool in kinds:
            fits, wanted = isinstance(value, bool), "true or false"
        elif int in kinds:
            least = 0 if field.name in may_be_zero else 1
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
            wanted = f"a whole number of at least {least}"
        elif float in kinds:
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fits, wanted = is_number and (value > 0 or field.name not in _ABOVE_ZERO), "a number"
            wanted += " above 0" * (field.name in _ABOVE_ZERO)
        else:
            continue
        if not fits:
            raise ValueError(f"{field.name} is {value!r}; it must be {wanted}")


def _at(pattern: tuple[bool, ...], layer: int) -> bool:
    return pattern[layer % len(pattern)]
