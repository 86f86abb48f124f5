"""What Llama and its relatives share: tensor names, and the reading and writing of the keys they have in common.

A family's file says where it differs. Keys that would change the computation in a way the decoder does not have are
refused by name; dropouts are not applied, as in evaluation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchmask.models.config_values import activation_of, refusal, shortest_pattern
from torchmask.models.rope_config import LAYER_TYPES, read_rope
from torchmask.modules.mlp import Activation
from torchmask.modules.spec import DecoderSpec

FULL, SLIDING = LAYER_TYPES
_TYPE_NAMES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}  # the last is an early name

# The Hub's names on the left, ours on the right; `{}` is the layer.
ENDS = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
PROJECTIONS = {
    f"model.layers.{{}}.{theirs}.{name}_proj.{leaf}": f"layers.{{}}.{ours}.{name}_proj.{leaf}"
    for theirs, ours, names in (("self_attn", "attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down")))
    for name in names
    for leaf in ("weight", "bias")
}
QK_NORMS = {f"model.layers.{{}}.self_attn.{x}_norm.weight": f"layers.{{}}.attn.{x}_norm.weight" for x in "qk"}
PRE_NORMS = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
}
POST_NORMS = {
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.attn_post_norm.weight",
    "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_post_norm.weight",
}
BOTH_NORMS = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm.weight",
    **POST_NORMS,
}
WEIGHT_NAMES = {**ENDS, **PRE_NORMS, **PROJECTIONS}
DERIVED = ("rotary_emb.inv_freq",)
"""A buffer that some old checkpoints wrote out."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32_000,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
"""What absent keys stand for in Llama's config.json; the relatives' tables say where theirs differ."""

_ACTIVATIONS: dict[Activation, str] = {"gelu_tanh": "gelu_pytorch_tanh"}


def common_facts(config: Mapping[str, Any], *, activation_key: str = "hidden_act") -> dict[str, Any]:
    """The facts of a `DecoderSpec` that all these families write alike.

    Args:
        config: with the family's defaults in place; `hidden_size` and `num_hidden_layers` have none here, as a file
            that says neither describes no model.
        activation_key: the key of the activation.

    Raises:
        WeightsError: W05, a value that the decoder has nothing for.
    """
    if config.get("per_layer_config"):
        raise refusal(config, "per_layer_config", "layers of different shapes are not known")
    num_heads = config["num_attention_heads"]
    num_kv_heads = config["num_key_value_heads"] or num_heads
    if num_heads % num_kv_heads:
        raise refusal(config, "num_key_value_heads", f"it does not divide num_attention_heads, {num_heads}")
    return {
        "vocab_size": config["vocab_size"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": _head_dim(config),
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "tie_embeddings": config["tie_word_embeddings"],
        "activation": activation_of(config, activation_key),
    }


def rope_facts(
    config: Mapping[str, Any], *, default_base: float = 10_000.0, whole_heads: bool = True
) -> dict[str, Any]:
    """The facts of rotary positions that are the same in all layers.

    Args:
        config: with the family's defaults in place.
        default_base: of absent keys.
        whole_heads: the family rotates all channels of a head, and not some.

    Raises:
        WeightsError: W05, parts of heads, tables that differ from layer to layer, or a wrong number of factors.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if any(layer_type in (config.get(key) or {}) for layer_type in LAYER_TYPES):
            raise refusal(config, key, "all layers of this family have the same rotary positions")
    rope = read_rope(dict(config), default_base=default_base)
    head_dim = _head_dim(config)
    if whole_heads:
        rope.check_whole(head_dim)
    return {"rope_base": rope.base, "rope_scaling": rope.scaling, "rope_dim": rope.dim(head_dim)}


def _head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def window_facts(config: Mapping[str, Any], usual_types: Sequence[str]) -> dict[str, Any]:
    """The facts of layers with a sliding window: of `layer_types`, or of the family's usual types where it is absent.

    Raises:
        WeightsError: W05, unknown types, another number of them than layers, or windows without a length.
    """
    types = config.get("layer_types")
    types = usual_types if types is None else types
    if len(types) != config["num_hidden_layers"]:
        raise refusal(config, "layer_types", f"num_hidden_layers is {config['num_hidden_layers']}")
    if not set(types) <= _TYPE_NAMES.keys():
        raise refusal(config, "layer_types", f"known: {', '.join(LAYER_TYPES)}")
    windowed = [_TYPE_NAMES[name] == SLIDING for name in types]
    if not any(windowed):
        return {}
    if not config["sliding_window"]:
        raise refusal(config, "sliding_window", "layer_types has sliding_attention")
    return {"sliding_window": config["sliding_window"], "window_pattern": shortest_pattern(windowed)}


def layer_types_of(spec: DecoderSpec) -> list[str]:
    """`layer_types` of config.json."""
    return [FULL if spec.window_of(i) is None else SLIDING for i in range(spec.num_layers)]


def common_entries(spec: DecoderSpec, *, activation_key: str = "hidden_act") -> dict[str, Any]:
    """The entries of config.json that `common_facts` reads."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "intermediate_size": spec.intermediate_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        activation_key: _ACTIVATIONS.get(spec.activation, spec.activation),
    }
