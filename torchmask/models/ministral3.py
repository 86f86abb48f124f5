"""Ministral 3 (`ministral3`): Mistral with YaRN, and queries that grow with their position as in Llama 4.

Published with an image encoder, as `mistral3`; this is its `text_config`, a model of its own.
"""

from functools import partial
from typing import Any

from torchmask.models.config_values import refusal, with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS, DERIVED, WEIGHT_NAMES, common_entries, common_facts, rope_facts
from torchmask.models.rope_config import scaling_entry
from torchmask.modules.rope_scaling import YarnRopeScaling
from torchmask.modules.spec import DecoderSpec

_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 131_072,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""What transformers takes where config.json has no `rope_parameters`."""


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes."""
    config = with_defaults(config, _DEFAULTS)
    table: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or _ROPE
    growth = table.get("llama_4_scaling_beta") or 0.0
    if type(growth) not in (int, float):
        raise refusal(table, "llama_4_scaling_beta", "a number is wanted")
    return DecoderSpec(
        **common_facts(config),
        **rope_facts({**config, "rope_parameters": table}),
        sliding_window=config["sliding_window"],
        query_growth=float(growth),
        query_growth_length=table.get("original_max_position_embeddings") if growth else None,
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    rope = {"rope_theta": spec.rope_base, **(scaling_entry(spec.rope_scaling) or {"rope_type": "default"})}
    # transformers wants both, growing or not.
    growth = {"llama_4_scaling_beta": spec.query_growth}
    length = spec.query_growth_length or rope.get("original_max_position_embeddings") or spec.max_seq_len
    return {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        **common_entries(spec),
        "rope_parameters": {**rope, **growth, "original_max_position_embeddings": length},
        "pad_token_id": None,  # that of absent keys need not be in the vocabulary
        "sliding_window": spec.sliding_window,
    }


FAMILY = Family(
    model_type="ministral3",
    title="Ministral 3, the text models",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)

# Published sizes: the `text_config` of each on the Hub.
_ministral3 = partial(
    DecoderSpec,
    vocab_size=131_072,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=262_144,
    rope_base=1e6,
    rope_scaling=YarnRopeScaling(16.0, 16_384, attention_factor=1.0),
    query_growth=0.1,
    query_growth_length=16_384,
)

ministral3_3b = sized(FAMILY, _ministral3(embed_dim=3072, intermediate_dim=9216, num_layers=26, tie_embeddings=True))
ministral3_8b = sized(FAMILY, _ministral3(embed_dim=4096, intermediate_dim=14_336, num_layers=34))
ministral3_14b = sized(FAMILY, _ministral3(embed_dim=5120, intermediate_dim=16_384, num_layers=40, rope_base=1e9))
