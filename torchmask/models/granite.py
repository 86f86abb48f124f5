"""The dense Granite family (3.0 to 3.3): Llama with multipliers of embeddings, scores, residuals and logits."""

from functools import partial
from typing import Any

from torchmask.models.config_values import with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS, DERIVED, WEIGHT_NAMES, common_entries, common_facts, rope_facts
from torchmask.models.rope_config import rope_entries
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "granite"
ARCHITECTURE = "GraniteForCausalLM"

_DEFAULTS = {
    **DEFAULTS,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes; logits are divided by `logits_scaling`."""
    config = with_defaults(config, _DEFAULTS)
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        mlp_bias=config["mlp_bias"],
        embed_scale=float(config["embedding_multiplier"]),
        residual_scale=float(config["residual_multiplier"]),
        attn_scale=float(config["attention_multiplier"]),
        logit_scale=1 / config["logits_scaling"],
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **common_entries(spec),
        **rope_entries(spec),
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "embedding_multiplier": spec.embed_scale,
        "residual_multiplier": spec.residual_scale,
        "attention_multiplier": spec.head_dim**-0.5 if spec.attn_scale is None else spec.attn_scale,
        "logits_scaling": round(1 / spec.logit_scale, 12),  # twice inverted, some numbers are an ulp off
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="Granite 3.0 to 3.3, dense",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)

# Published sizes: the config.json of each on the Hub; 3.1 and 3.2 are alike.
_granite = partial(
    DecoderSpec,
    vocab_size=49_155,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=131_072,
    rope_base=5e6,
    tie_embeddings=True,
    embed_scale=12.0,
    residual_scale=0.22,
)
_2b = partial(_granite, embed_dim=2048, intermediate_dim=8192, head_dim=64, attn_scale=0.015625, logit_scale=1 / 8)
_8b = partial(_granite, embed_dim=4096, intermediate_dim=12_800, head_dim=128, attn_scale=0.0078125, logit_scale=1 / 16)

granite_3_0_2b = sized(FAMILY, _2b(max_seq_len=4096, rope_base=10_000.0))
granite_3_0_8b = sized(FAMILY, _8b(max_seq_len=4096, rope_base=10_000.0))
granite_3_1_2b = sized(FAMILY, _2b())
granite_3_1_8b = sized(FAMILY, _8b(rope_base=1e7))
granite_3_3_2b = sized(FAMILY, _2b(vocab_size=49_159, rope_base=1e7))
granite_3_3_8b = sized(FAMILY, _8b(vocab_size=49_159, rope_base=1e7))
