"""The Mistral family: 7B, Nemo, Small, Large and Codestral (`mistral`), and Ministral 8B (`ministral`).

In the first all layers have a sliding window or none has; in the second `layer_types` says which. A config.json that
says `mistral` and has `layer_types` is read as the second, as transformers reads it.
"""

from functools import partial
from typing import Any

from torchmask.models.config_values import with_defaults
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

_DEFAULTS = {
    **DEFAULTS,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes."""
    config = with_defaults(config, _DEFAULTS)
    usual = FULL if config["sliding_window"] is None else SLIDING
    windows = window_facts(config, [usual] * config["num_hidden_layers"])
    return DecoderSpec(**common_facts(config), **rope_facts(config), **windows)


def mistral_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model whose layers all have the same window, as transformers reads it."""
    types = layer_types_of(spec)
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **common_entries(spec),
        **rope_entries(spec),
        "sliding_window": spec.sliding_window,
        **({"layer_types": types} if len(set(types)) > 1 else {}),
    }


def ministral_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        **common_entries(spec),
        **rope_entries(spec),
        # transformers wants a window even where no layer has one.
        "sliding_window": spec.sliding_window or _DEFAULTS["sliding_window"],
        "layer_types": layer_types_of(spec),
    }


FAMILY = Family(
    model_type="mistral",
    title="Mistral 7B, Nemo, Small, Zephyr",
    spec_from_config=spec_from_config,
    config_from_spec=mistral_config,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)
MINISTRAL = Family(
    model_type="ministral",
    title="Ministral 8B",
    spec_from_config=spec_from_config,
    config_from_spec=ministral_config,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)

# Published sizes: https://arxiv.org/abs/2310.06825 (7B) and the config.json of each on the Hub.
_mistral = partial(DecoderSpec, num_heads=32, num_kv_heads=8, head_dim=128, max_seq_len=32_768, rope_base=1e6)
_7b = partial(_mistral, embed_dim=4096, intermediate_dim=14_336, num_layers=32)
_22b = partial(_mistral, vocab_size=32_768, embed_dim=6144, intermediate_dim=16_384, num_layers=56, num_heads=48)
_nemo = partial(_mistral, vocab_size=131_072, embed_dim=5120, num_layers=40)
_large = partial(_mistral, embed_dim=12_288, intermediate_dim=28_672, num_layers=88, num_heads=96)
_ministral = partial(_mistral, embed_dim=4096, intermediate_dim=12_288, num_layers=36, max_seq_len=131_072)

mistral_7b_v0_1 = sized(FAMILY, _7b(vocab_size=32_000, rope_base=10_000.0, sliding_window=4096))
mistral_7b_v0_2 = sized(FAMILY, _7b(vocab_size=32_000))
mistral_7b_v0_3 = sized(FAMILY, _7b(vocab_size=32_768))
mistral_nemo_12b = sized(FAMILY, _nemo(intermediate_dim=14_336, max_seq_len=128_000))
mistral_small_22b = sized(FAMILY, _22b())
mistral_small_24b = sized(FAMILY, _nemo(intermediate_dim=32_768, rope_base=1e8))
mistral_large_123b = sized(FAMILY, _large(vocab_size=32_768, max_seq_len=131_072))
codestral_22b = sized(FAMILY, _22b())
ministral_8b = sized(
    MINISTRAL,
    _ministral(vocab_size=131_072, rope_base=1e8, sliding_window=32_768, window_pattern=(False, True, True, True)),
)
