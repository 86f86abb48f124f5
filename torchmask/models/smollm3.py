"""The SmolLM3 family: some layers have no rotary positions."""

from typing import Any

from torchmask.models.config_values import refusal, shortest_pattern, with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import (
    DEFAULTS,
    DERIVED,
    FULL,
    SLIDING,
    WEIGHT_NAMES,
    common_entries,
    common_facts,
    layer_types_of,
    rope_facts,
    window_facts,
)
from torchmask.models.rope_config import rope_entries
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "smollm3"
ARCHITECTURE = "SmolLM3ForCausalLM"

_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 128_256,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes; `no_rope_layers` has a 1 for layers that do have positions."""
    config = with_defaults(config, _DEFAULTS)
    layers, flags = range(config["num_hidden_layers"]), config["no_rope_layers"]
    if flags is None:
        flags = [(i + 1) % config["no_rope_layer_interval"] != 0 for i in layers]
    if len(flags) < len(layers):
        raise refusal(config, "no_rope_layers", f"num_hidden_layers is {len(layers)}")
    with_rope = [bool(flags[i]) for i in layers]
    may_window = config["use_sliding_window"] and config["sliding_window"] is not None
    usual = [SLIDING if may_window and not rotates else FULL for rotates in with_rope]
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config, default_base=2_000_000.0),
        **window_facts(config, usual),
        rope_pattern=shortest_pattern(with_rope),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        mlp_bias=config["mlp_bias"],
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **common_entries(spec),
        **rope_entries(spec),
        "pad_token_id": None,  # that of absent keys need not be in the vocabulary
        "no_rope_layers": [int(spec.rope_of(i) is not None) for i in range(spec.num_layers)],
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "layer_types": layer_types_of(spec),
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="SmolLM3 3B",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)

# The published size, from its config.json on the Hub.
smollm3_3b = sized(
    FAMILY,
    DecoderSpec(
        vocab_size=128_256,
        embed_dim=2048,
        intermediate_dim=11_008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        max_seq_len=65_536,
        norm_eps=1e-6,
        rope_base=5e6,
        rope_pattern=(True, True, True, False),
        tie_embeddings=True,
    ),
)
