"""The dense Qwen families: Qwen2 and 2.5 (`qwen2`: biases of queries, keys and values) and Qwen3 (`qwen3`: norms of
queries and keys in their place).

Sliding windows are off unless `use_sliding_window` is set; then layers from `max_window_layers` on have them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torchmask.models.config_values import with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import (
    DEFAULTS,
    DERIVED,
    FULL,
    QK_NORMS,
    SLIDING,
    WEIGHT_NAMES,
    common_entries,
    common_facts,
    layer_types_of,
    rope_facts,
    window_facts,
)
from torchmask.models.rope_config import rope_entries
from torchmask.modules.decoder import Decoder
from torchmask.modules.spec import DecoderSpec

_QWEN2_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3_DEFAULTS = {**_QWEN2_DEFAULTS, "head_dim": 128}


def qwen2_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of Qwen2 describes."""
    config = with_defaults(config, _QWEN2_DEFAULTS)
    return DecoderSpec(**common_facts(config), **rope_facts(config), **_windows(config), qkv_bias=True)


def qwen3_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of Qwen3 describes."""
    config = with_defaults(config, _QWEN3_DEFAULTS)
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config),
        **_windows(config),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        qk_norm="head",
    )


def _windows(config: dict[str, Any]) -> dict[str, Any]:
    window = config["sliding_window"] if config["use_sliding_window"] else None
    first = config["num_hidden_layers"] if window is None else config["max_window_layers"]
    usual = [FULL if i < first else SLIDING for i in range(config["num_hidden_layers"])]
    return window_facts({**config, "sliding_window": window}, usual)


def _entries(spec: DecoderSpec) -> dict[str, Any]:
    return {
        **common_entries(spec),
        **rope_entries(spec),
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "layer_types": layer_types_of(spec),
    }


def qwen2_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_entries(spec)}


def qwen3_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    entries = {**_entries(spec), "attention_bias": spec.qkv_bias}
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **entries}


QWEN2 = Family(
    model_type="qwen2",
    title="Qwen 1.5, 2, 2.5, QwQ, DeepSeek-R1 distills",
    spec_from_config=qwen2_spec,
    config_from_spec=qwen2_config,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)
QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3, dense",
    spec_from_config=qwen3_spec,
    config_from_spec=qwen3_config,
    weight_names={**WEIGHT_NAMES, **QK_NORMS},
    derived=DERIVED,
)

# Published sizes: https://arxiv.org/abs/2407.10671 (2), 2412.15115 (2.5), 2505.09388 (3), and their config.json.
_qwen2 = partial(DecoderSpec, norm_eps=1e-6, rope_base=1e6, max_seq_len=131_072, qkv_bias=True)
_0_5b = partial(
    _qwen2,
    vocab_size=151_936,
    embed_dim=896,
    intermediate_dim=4864,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    tie_embeddings=True,
)
_1_5b = partial(
    _qwen2,
    vocab_size=151_936,
    embed_dim=1536,
    intermediate_dim=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    tie_embeddings=True,
)
_large = partial(_qwen2, vocab_size=152_064, num_kv_heads=8, head_dim=128)
_7b = partial(_large, embed_dim=3584, intermediate_dim=18_944, num_layers=28, num_heads=28, num_kv_heads=4)
_14b = partial(_large, embed_dim=5120, intermediate_dim=13_824, num_layers=48, num_heads=40)
_32b = partial(_large, embed_dim=5120, intermediate_dim=27_648, num_layers=64, num_heads=40)
_72b = partial(_large, embed_dim=8192, intermediate_dim=29_568, num_layers=80, num_heads=64)
_qwen3 = partial(
    DecoderSpec,
    vocab_size=151_936,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-6,
    rope_base=1e6,
    max_seq_len=40_960,
    qk_norm="head",
)
_small = partial(_qwen3, tie_embeddings=True)


def _qwen1_5(
    embed_dim: int, intermediate_dim: int, num_layers: int, num_heads: int, vocab_size: int = 151_936, **more: Any
) -> Callable[..., Decoder]:
    sizes = {"embed_dim": embed_dim, "intermediate_dim": intermediate_dim, "num_layers": num_layers}
    heads = {"num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": embed_dim // num_heads}
    return sized(QWEN2, _qwen2(**{"vocab_size": vocab_size, "max_seq_len": 32_768, **sizes, **heads, **more}))


qwen1_5_0_5b = _qwen1_5(1024, 2816, 24, 16, tie_embeddings=True)
qwen1_5_1_8b = _qwen1_5(2048, 5504, 24, 16)
qwen1_5_4b = _qwen1_5(2560, 6912, 40, 20, rope_base=5e6)
qwen1_5_7b = _qwen1_5(4096, 11_008, 32, 32)
qwen1_5_14b = _qwen1_5(5120, 13_696, 40, 40, vocab_size=152_064)
qwen1_5_32b = _qwen1_5(5120, 27_392, 64, 40, vocab_size=152_064, num_kv_heads=8)
qwen1_5_72b = _qwen1_5(8192, 24_576, 80, 64, vocab_size=152_064)
qwen1_5_110b = _qwen1_5(8192, 49_152, 80, 64, vocab_size=152_064, num_kv_heads=8)
qwen2_0_5b = sized(QWEN2, _0_5b())
qwen2_1_5b = sized(QWEN2, _1_5b())
qwen2_7b = sized(QWEN2, _7b())
qwen2_72b = sized(QWEN2, _72b(norm_eps=1e-5))
qwen2_5_0_5b = sized(QWEN2, _0_5b(max_seq_len=32_768))
qwen2_5_1_5b = sized(QWEN2, _1_5b())
qwen2_5_3b = sized(
    QWEN2, _1_5b(embed_dim=2048, intermediate_dim=11_008, num_layers=36, num_heads=16, max_seq_len=32_768)
)
qwen2_5_7b = sized(QWEN2, _7b())
qwen2_5_14b = sized(QWEN2, _14b(norm_eps=1e-5))
qwen2_5_32b = sized(QWEN2, _32b(norm_eps=1e-5))
qwen2_5_72b = sized(QWEN2, _72b(norm_eps=1e-5))
deepseek_r1_distill_qwen_1_5b = sized(QWEN2, _1_5b(rope_base=10_000.0, tie_embeddings=False))
deepseek_r1_distill_qwen_7b = sized(QWEN2, _7b(rope_base=10_000.0))
deepseek_r1_distill_qwen_14b = sized(QWEN2, _14b(norm_eps=1e-5))
deepseek_r1_distill_qwen_32b = sized(QWEN2, _32b(norm_eps=1e-5))
qwen3_0_6b = sized(QWEN3, _small(embed_dim=1024, intermediate_dim=3072, num_layers=28, num_heads=16))
qwen3_1_7b = sized(QWEN3, _small(embed_dim=2048, intermediate_dim=6144, num_layers=28, num_heads=16))
qwen3_4b = sized(QWEN3, _small(embed_dim=2560, intermediate_dim=9728, num_layers=36, num_heads=32))
qwen3_4b_2507 = sized(
    QWEN3,
    _small(embed_dim=2560, intermediate_dim=9728, num_layers=36, num_heads=32, max_seq_len=262_144, rope_base=5e6),
)
qwen3_8b = sized(QWEN3, _qwen3(embed_dim=4096, intermediate_dim=12_288, num_layers=36, num_heads=32))
qwen3_14b = sized(QWEN3, _qwen3(embed_dim=5120, intermediate_dim=17_408, num_layers=40, num_heads=40))
qwen3_32b = sized(QWEN3, _qwen3(embed_dim=5120, intermediate_dim=25_600, num_layers=64, num_heads=64))
