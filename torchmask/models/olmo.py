"""The OLMo 2 and OLMo 3 families: norms after the blocks, and of all queries and all keys of a token together.

OLMo 3 has sliding windows in three of four layers; only the fourth's rotary positions are scaled.
"""

from functools import partial
from typing import Any

from torchmask.models.config_values import with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.layered_rope import layered_rope_entries, layered_rope_facts
from torchmask.models.llama_like import (
    DEFAULTS,
    DERIVED,
    ENDS,
    FULL,
    POST_NORMS,
    PROJECTIONS,
    QK_NORMS,
    SLIDING,
    common_entries,
    common_facts,
    layer_types_of,
    rope_facts,
    window_facts,
)
from torchmask.models.rope_config import rope_entries
from torchmask.modules.rope_scaling import YarnRopeScaling
from torchmask.modules.spec import DecoderSpec

_OLMO2_DEFAULTS = {**DEFAULTS, "vocab_size": 50_304, "rms_norm_eps": 1e-5}
_OLMO3_DEFAULTS = {**_OLMO2_DEFAULTS, "sliding_window": 4096}

# In the old spelling transformers gives `rope_theta` to the layers without a window alone.
_OLMO3_BASES = (500_000.0, 500_000.0)

WEIGHT_NAMES = {**ENDS, **POST_NORMS, **PROJECTIONS, **QK_NORMS}


def olmo2_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of OLMo 2 describes."""
    config = with_defaults(config, _OLMO2_DEFAULTS)
    return DecoderSpec(**_facts(config), **rope_facts(config))


def olmo3_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of OLMo 3 describes."""
    config = with_defaults(config, _OLMO3_DEFAULTS)
    windows = window_facts(config, [FULL if i % 4 == 3 else SLIDING for i in range(config["num_hidden_layers"])])
    facts = _facts(config)
    rope = layered_rope_facts(config, head_dim=facts["head_dim"], default_bases=_OLMO3_BASES, window_base_key=None)
    return DecoderSpec(**facts, **windows, **rope)


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    return {
        **common_facts(config),
        "norm_placement": "post",
        "qk_norm": "full",
        "qkv_bias": config["attention_bias"],
        "o_bias": config["attention_bias"],
    }


def olmo2_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    entries = {**common_entries(spec), **rope_entries(spec), "attention_bias": spec.qkv_bias}
    return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **entries}


def olmo3_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        **common_entries(spec),
        **layered_rope_entries(spec),
        "attention_bias": spec.qkv_bias,
        # transformers wants a window even where no layer has one.
        "sliding_window": spec.sliding_window or _OLMO3_DEFAULTS["sliding_window"],
        "layer_types": layer_types_of(spec),
    }


OLMO2 = Family(
    model_type="olmo2",
    title="OLMo 2",
    spec_from_config=olmo2_spec,
    config_from_spec=olmo2_config,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)
OLMO3 = Family(
    model_type="olmo3",
    title="OLMo 3",
    spec_from_config=olmo3_spec,
    config_from_spec=olmo3_config,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)

# Published sizes: https://arxiv.org/abs/2501.00656 (2), 2512.13961 (3), and the config.json of each on the Hub.
_olmo2 = partial(
    DecoderSpec,
    vocab_size=100_352,
    head_dim=128,
    max_seq_len=4096,
    norm_eps=1e-6,
    norm_placement="post",
    qk_norm="full",
    rope_base=500_000.0,
)
_olmo3 = partial(
    _olmo2,
    vocab_size=100_278,
    max_seq_len=65_536,
    rope_scaling=YarnRopeScaling(8.0, 8192, attention_factor=1.2079441541679836),
    window_rope_base=500_000.0,
    sliding_window=4096,
    window_pattern=(True, True, True, False),
)
_1b: dict[str, Any] = {"embed_dim": 2048, "intermediate_dim": 8192, "num_layers": 16, "num_heads": 16}
_7b: dict[str, Any] = {"embed_dim": 4096, "intermediate_dim": 11_008, "num_layers": 32, "num_heads": 32}
_13b: dict[str, Any] = {"embed_dim": 5120, "intermediate_dim": 13_824, "num_layers": 40, "num_heads": 40}
_32b: dict[str, Any] = {"embed_dim": 5120, "intermediate_dim": 27_648, "num_layers": 64, "num_heads": 40}

olmo2_1b = sized(OLMO2, _olmo2(**_1b, num_kv_heads=16))
olmo2_7b = sized(OLMO2, _olmo2(**_7b, num_kv_heads=32))
olmo2_13b = sized(OLMO2, _olmo2(**_13b, num_kv_heads=40))
olmo2_32b = sized(OLMO2, _olmo2(**_32b, num_kv_heads=8))
olmo3_7b = sized(OLMO3, _olmo3(**_7b, num_kv_heads=32))
olmo3_32b = sized(OLMO3, _olmo3(**_32b, num_kv_heads=8))
