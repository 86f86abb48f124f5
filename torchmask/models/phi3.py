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
# of each on the Hub, with their factors digit by digit; those of 3 mini are of its update in June 2024.
_3_SHORT = """
    1.1 1.1 1.1 1.3000000000000003 1.3500000000000003 1.3500000000000003 1.4000000000000004 1.5500000000000005
    2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001
    2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001
    2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.000000000000001 2.0500000000000007
    2.0500000000000007 2.0500000000000007 2.0500000000000007 2.0500000000000007 2.0500000000000007 2.1000000000000005
    2.1000000000000005 2.1500000000000004 2.25 2.25 2.25 2.25 2.25 2.3999999999999995 2.4499999999999993
    2.499999999999999 2.6999999999999984 2.6999999999999984 2.7499999999999982 2.799999999999998 2.8999999999999977
    3.049999999999997
"""
_3_LONG = """
    1.0700000524520874 1.1200000047683716 1.149999976158142 1.4199999570846558 1.5699999332427979 1.7999999523162842
    2.129999876022339 2.129999876022339 3.009999990463257 5.910000324249268 6.950000286102295 9.070000648498535
    9.930000305175781 10.710000038146973 11.130000114440918 14.609999656677246 15.409998893737793 19.809999465942383
    37.279998779296875 38.279998779296875 38.599998474121094 40.12000274658203 46.20000457763672 50.940006256103516
    53.66000747680664 54.9373893737793 56.89738845825195 57.28738784790039 59.98738479614258 60.86738586425781
    60.887386322021484 61.71739196777344 62.91739273071289 62.957393646240234 63.41739273071289 63.8173942565918
    63.83739471435547 63.897396087646484 63.93739700317383 64.06739807128906 64.11434936523438 64.12435150146484
    64.15435028076172 64.19435119628906 64.24435424804688 64.57435607910156 64.69000244140625 64.76000213623047
"""
_3_5_SHORT = """
    1.0 1.0199999809265137 1.0299999713897705 1.0299999713897705 1.0499999523162842 1.0499999523162842
    1.0499999523162842 1.0499999523162842 1.0499999523162842 1.0699999332427979 1.0999999046325684 1.1099998950958252
    1.1599998474121094 1.1599998474121094 1.1699998378753662 1.2899998426437378 1.339999794960022 1.679999828338623
    1.7899998426437378 1.8199998140335083 1.8499997854232788 1.8799997568130493 1.9099997282028198 1.9399996995925903
    1.9899996519088745 2.0199997425079346 2.0199997425079346 2.0199997425079346 2.0199997425079346 2.0199997425079346
    2.0199997425079346 2.0299997329711914 2.0299997329711914 2.0299997329711914 2.0299997329711914 2.0299997329711914
    2.0299997329711914 2.0299997329711914 2.0299997329711914 2.0299997329711914 2.0799996852874756 2.0899996757507324
    2.189999580383301 2.2199995517730713 2.5899994373321533 2.729999542236328 2.749999523162842 2.8399994373321533
"""
_3_5_LONG = """
    1.0800000429153442 1.1100000143051147 1.1399999856948853 1.340000033378601 1.5899999141693115 1.600000023841858
    1.6200000047683716 2.620000123977661 3.2300000190734863 3.2300000190734863 4.789999961853027 7.400000095367432
    7.700000286102295 9.09000015258789 12.199999809265137 17.670000076293945 24.46000099182129 28.57000160217285
    30.420001983642578 30.840002059936523 32.590003967285156 32.93000411987305 42.320003509521484 44.96000289916992
    50.340003967285156 50.45000457763672 57.55000305175781 57.93000411987305 58.21000289916992 60.1400032043457
    62.61000442504883 62.62000274658203 62.71000289916992 63.1400032043457 63.1400032043457 63.77000427246094
    63.93000411987305 63.96000289916992 63.970001220703125 64.02999877929688 64.06999969482422 64.08000183105469
    64.12000274658203 64.41000366210938 64.4800033569336 64.51000213623047 64.52999877929688 64.83999633789062
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
_mini_128k = partial(_mini, max_seq_len=131_072, sliding_window=262_144)
_medium = partial(
    _phi3, embed_dim=5120, intermediate_dim=17_920, num_layers=40, num_heads=40, num_kv_heads=10, head_dim=128
)

phi3_mini_4k = sized(FAMILY, _mini(max_seq_len=4096, sliding_window=2047))
phi3_mini_128k = sized(FAMILY, _mini_128k(rope_scaling=_longrope(_3_SHORT, _3_LONG)))
phi3_medium_4k = sized(FAMILY, _medium(max_seq_len=4096, sliding_window=2047))
phi3_5_mini = sized(FAMILY, _mini_128k(rope_scaling=_longrope(_3_5_SHORT, _3_5_LONG)))
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
