"""The Phi-3 family: Phi-3, Phi-3.5 and Phi-4 and their mini models (`phi3`): fused projections, LongRoPE, and in
Phi-4-mini rotary positions for a part of each head.
"""

import math
from functools import partial
from typing import Any

from torchmask.models.config_values import with_defaults
from torchmask.models.conversions import Split
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS, DERIVED, WEIGHT_NAMES, common_entries, common_facts, rope_facts
from torchmask.models.rope_config import rope_entries
from torchmask.modules.rope_scaling import LongRopeScaling
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "phi3"
ARCHITECTURE = "Phi3ForCausalLM"

_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 32_064,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}

CONVERSIONS = (
    Split(
        "model.layers.{}.self_attn.qkv_proj.weight",
        tuple(f"layers.{{}}.attn.{name}_proj.weight" for name in "qkv"),
    ),
    Split(
        "model.layers.{}.mlp.gate_up_proj.weight",
        ("layers.{}.mlp.gate_proj.weight", "layers.{}.mlp.up_proj.weight"),
    ),
)


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes."""
    config = with_defaults(config, _DEFAULTS)
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config, whole_heads=False),
        sliding_window=config["sliding_window"],
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **common_entries(spec),
        **rope_entries(spec),
        "pad_token_id": None,  # that of absent keys need not be in the vocabulary
        "sliding_window": spec.sliding_window,
    }


_SPLIT = {name for conversion in CONVERSIONS for name in conversion.ours}

FAMILY = Family(
    model_type=MODEL_TYPE,
    title="Phi-3, Phi-3.5, Phi-4 and Phi-4-mini",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names={theirs: ours for theirs, ours in WEIGHT_NAMES.items() if ours not in _SPLIT},
    conversions=CONVERSIONS,
    derived=DERIVED,
)

# Published sizes: https://arxiv.org/abs/2404.14219 (3, 3.5), 2412.08905 (4), 2503.01743 (4 mini), and config.json
# of each on the Hub; the factors of 3.5 to two decimals.
_3_5_SHORT = """
    1 1.02 1.03 1.03 1.05 1.05 1.05 1.05 1.05 1.07 1.1 1.11 1.16 1.16 1.17 1.29 1.34 1.68 1.79 1.82 1.85 1.88
    1.91 1.94 1.99 2.02 2.02 2.02 2.02 2.02 2.02 2.03 2.03 2.03 2.03 2.03 2.03 2.03 2.03 2.03 2.08 2.09 2.19
    2.22 2.59 2.73 2.75 2.84
"""
_3_5_LONG = """
    1.08 1.11 1.14 1.34 1.59 1.6 1.62 2.62 3.23 3.23 4.79 7.4 7.7 9.09 12.2 17.67 24.46 28.57 30.42 30.84 32.59
    32.93 42.32 44.96 50.34 50.45 57.55 57.93 58.21 60.14 62.61 62.62 62.71 63.14 63.14 63.77 63.93 63.96 63.97
    64.03 64.07 64.08 64.12 64.41 64.48 64.51 64.53 64.84
"""
_4_MINI_LONG = """
    1.0 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898
    2.735880826 3.059592084 3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555
    7.485043894 8.370679318 9.36110372 10.4687158 11.70738129 13.09260651 14.64173252 16.37415215 18.31155283
    20.47818807 22.90118105 25.61086418 28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71
    32.93 32.97 33.28 33.49 33.5 44.16 47.77
"""


def _longrope(short_factors: str, long_factors: str) -> LongRopeScaling:
    short, long = (tuple(float(factor) for factor in factors.split()) for factors in (short_factors, long_factors))
    return LongRopeScaling(short, long, 4096, attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)))


_phi3 = partial(DecoderSpec, vocab_size=32_064, embed_dim=3072, intermediate_dim=8192, num_layers=32, num_heads=32)
_mini = partial(_phi3, num_kv_heads=32, head_dim=96)
_mini_128k = partial(_phi3, max_seq_len=131_072, sliding_window=262_144)
_medium = partial(
    _phi3, embed_dim=5120, intermediate_dim=17_920, num_layers=40, num_heads=40, num_kv_heads=10, head_dim=128
)

phi3_mini_4k = sized(FAMILY, _mini(max_seq_len=4096, sliding_window=2047))
phi3_medium_4k = sized(FAMILY, _medium(max_seq_len=4096, sliding_window=2047))
phi3_5_mini = sized(FAMILY, _mini_128k(num_kv_heads=32, head_dim=96, rope_scaling=_longrope(_3_5_SHORT, _3_5_LONG)))
phi4_14b = sized(FAMILY, _medium(vocab_size=100_352, max_seq_len=16_384, rope_base=250_000.0))
phi4_mini = sized(
    FAMILY,
    _mini_128k(
        vocab_size=200_064,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        rope_dim=96,
        rope_scaling=_longrope("1 " * 48, _4_MINI_LONG),
        tie_embeddings=True,
    ),
)
