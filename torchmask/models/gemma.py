"""The Gemma families: Gemma, Gemma 2 and the text models of Gemma 3 (`gemma`, `gemma2`, `gemma3_text`).

Norms multiply by 1 + weight, and embeddings by sqrt(D). Gemma 2 has norms on both sides of each block, squeezed scores
and logits, and a window in every other layer; Gemma 3 has norms of queries and keys in place of squeezed scores, a
window in five of six layers, and other rotary positions there. Its `attn_logit_softcapping` is not used, as in
transformers.
"""

from functools import partial
from typing import Any

from torchmask.models.config_values import refusal, with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.layered_rope import layered_rope_entries, layered_rope_facts
from torchmask.models.llama_like import (
    BOTH_NORMS,
    DEFAULTS,
    DERIVED,
    ENDS,
    FULL,
    PROJECTIONS,
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
from torchmask.modules.rope_scaling import LinearRopeScaling
from torchmask.modules.spec import DecoderSpec

_GEMMA_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 256_000,
    "intermediate_size": 24_576,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA3_DEFAULTS = {
    **_GEMMA2_DEFAULTS,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
}
_GEMMA3_BASES = (1_000_000.0, 10_000.0)


def gemma_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of Gemma describes; its "gelu" is the one by tanh."""
    config = with_defaults(config, _GEMMA_DEFAULTS)
    if config["hidden_act"] == "gelu":
        config["hidden_act"] = "gelu_pytorch_tanh"
    return DecoderSpec(**_facts(config, "hidden_act"), **rope_facts(config))


def gemma2_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of Gemma 2 describes."""
    config = with_defaults(config, _GEMMA2_DEFAULTS)
    usual = [FULL if i % 2 == 1 else SLIDING for i in range(config["num_hidden_layers"])]
    return DecoderSpec(
        **_facts(config, "hidden_activation"),
        **_later_facts(config, usual),
        **rope_facts(config),
        attn_softcap=config["attn_logit_softcapping"],
    )


def gemma3_spec(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json of Gemma 3's text model describes."""
    config = with_defaults(config, _GEMMA3_DEFAULTS)
    every = config["sliding_window_pattern"]
    usual = [SLIDING if (i + 1) % every else FULL for i in range(config["num_hidden_layers"])]
    facts = _facts(config, "hidden_activation")
    rope = layered_rope_facts(
        config,
        head_dim=facts["head_dim"],
        default_bases=_GEMMA3_BASES,
        window_base_key="rope_local_base_freq",
    )
    return DecoderSpec(**facts, **_later_facts(config, usual), **rope, qk_norm="head")


def _facts(config: dict[str, Any], activation_key: str) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise refusal(config, "use_bidirectional_attention", "only causal models are known")
    return {
        **common_facts(config, activation_key=activation_key),
        "norm_offset": 1.0,
        "embed_scale": config["hidden_size"] ** 0.5,
        "qkv_bias": config["attention_bias"],
        "o_bias": config["attention_bias"],
    }


def _later_facts(config: dict[str, Any], usual_types: list[str]) -> dict[str, Any]:
    return {
        **window_facts(config, usual_types),
        "norm_placement": "both",
        "attn_scale": config["query_pre_attn_scalar"] ** -0.5,
        "logit_softcap": config["final_logit_softcapping"],
    }


def gemma_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    entries = {**common_entries(spec), **rope_entries(spec), "attention_bias": spec.qkv_bias}
    if spec.activation == "gelu":  # which this family takes for the one by tanh
        entries["hidden_act"] = "gelu_python"
    return {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **entries}


def gemma2_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    entries = {**_later_entries(spec), **rope_entries(spec), "attn_logit_softcapping": spec.attn_softcap}
    return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **entries}


def gemma3_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    entries = {**_later_entries(spec), **layered_rope_entries(spec)}
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **entries}


def _later_entries(spec: DecoderSpec) -> dict[str, Any]:
    scalar = spec.head_dim if spec.attn_scale is None else round(spec.attn_scale**-2)
    return {
        **common_entries(spec, activation_key="hidden_activation"),
        "attention_bias": spec.qkv_bias,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": spec.logit_softcap,
        # transformers wants a window even where no layer has one.
        "sliding_window": spec.sliding_window or _GEMMA2_DEFAULTS["sliding_window"],
        "layer_types": layer_types_of(spec),
    }


GEMMA = Family(
    model_type="gemma",
    title="Gemma 2B and 7B, CodeGemma",
    spec_from_config=gemma_spec,
    config_from_spec=gemma_config,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)
GEMMA2 = Family(
    model_type="gemma2",
    title="Gemma 2",
    spec_from_config=gemma2_spec,
    config_from_spec=gemma2_config,
    weight_names={**ENDS, **BOTH_NORMS, **PROJECTIONS},
    derived=DERIVED,
)
GEMMA3 = Family(
    model_type="gemma3_text",
    title="Gemma 3, the text models",
    spec_from_config=gemma3_spec,
    config_from_spec=gemma3_config,
    weight_names={**ENDS, **BOTH_NORMS, **PROJECTIONS, **QK_NORMS},
    derived=DERIVED,
)


def _gemma(embed_dim: int, **facts: Any) -> DecoderSpec:
    return DecoderSpec(
        embed_dim=embed_dim,
        embed_scale=embed_dim**0.5,
        norm_eps=1e-6,
        norm_offset=1.0,
        activation="gelu_tanh",
        tie_embeddings=True,
        **facts,
    )


# Published sizes: https://arxiv.org/abs/2403.08295, 2408.00118 (2), 2503.19786 (3), and the config.json of each.
_gemma1 = partial(_gemma, vocab_size=256_000, head_dim=256, max_seq_len=8192)
_gemma2 = partial(
    _gemma1,
    norm_placement="both",
    attn_scale=1 / 16,
    attn_softcap=50.0,
    logit_softcap=30.0,
    sliding_window=4096,
    window_pattern=(True, False),
)
_gemma3 = partial(
    _gemma,
    vocab_size=262_208,
    head_dim=256,
    max_seq_len=131_072,
    norm_placement="both",
    qk_norm="head",
    attn_scale=1 / 16,
    rope_base=1e6,
    rope_scaling=LinearRopeScaling(8.0),
    window_rope_base=10_000.0,
    sliding_window=1024,
    window_pattern=(True, True, True, True, True, False),
)
_gemma3_small = partial(_gemma3, vocab_size=262_144, max_seq_len=32_768, rope_scaling=None, sliding_window=512)

gemma_2b = sized(GEMMA, _gemma1(2048, intermediate_dim=16_384, num_layers=18, num_heads=8, num_kv_heads=1))
gemma_7b = sized(GEMMA, _gemma1(3072, intermediate_dim=24_576, num_layers=28, num_heads=16, num_kv_heads=16))
gemma2_2b = sized(GEMMA2, _gemma2(2304, intermediate_dim=9216, num_layers=26, num_heads=8, num_kv_heads=4))
gemma2_9b = sized(GEMMA2, _gemma2(3584, intermediate_dim=14_336, num_layers=42, num_heads=16, num_kv_heads=8))
gemma2_27b = sized(
    GEMMA2,
    _gemma2(
        4608,
        intermediate_dim=36_864,
        num_layers=46,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        attn_scale=144**-0.5,
    ),
)
gemma3_270m = sized(GEMMA3, _gemma3_small(640, intermediate_dim=2048, num_layers=18, num_heads=4, num_kv_heads=1))
gemma3_1b = sized(GEMMA3, _gemma3_small(1152, intermediate_dim=6912, num_layers=26, num_heads=4, num_kv_heads=1))
gemma3_4b = sized(GEMMA3, _gemma3(2560, intermediate_dim=10_240, num_layers=34, num_heads=8, num_kv_heads=4))
gemma3_12b = sized(GEMMA3, _gemma3(3840, intermediate_dim=15_360, num_layers=48, num_heads=16, num_kv_heads=8))
gemma3_27b = sized(
    GEMMA3,
    _gemma3(
        5376,
        intermediate_dim=21_504,
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        attn_scale=168**-0.5,
    ),
)
