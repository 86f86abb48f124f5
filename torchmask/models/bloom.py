"""The Bloom family (BigScience): Bloom and Bloomz, with ALiBi, a norm after the embedding and fused projections.

Dropouts of config.json are not applied, as in evaluation.
"""

from collections.abc import Callable
from typing import Any

from torchmask.models.config_values import head_dim_of, refusal, with_defaults
from torchmask.models.conversions import Split, kv_heads
from torchmask.models.family import Family, sized
from torchmask.modules.decoder import Decoder
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "bloom"
ARCHITECTURE = "BloomForCausalLM"

_DEFAULTS = {
    "vocab_size": 250_880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "layer_norm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "pretraining_tp": 1,
    "slow_but_exact": False,
    "tie_word_embeddings": True,
}
_ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

WEIGHT_NAMES = {
    "transformer.word_embeddings.weight": "embed_tokens.weight",
    "transformer.word_embeddings_layernorm.weight": "embed_norm.weight",
    "transformer.word_embeddings_layernorm.bias": "embed_norm.bias",
    "transformer.h.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "transformer.h.{}.input_layernorm.bias": "layers.{}.attn_norm.bias",
    "transformer.h.{}.self_attention.dense.weight": "layers.{}.attn.o_proj.weight",
    "transformer.h.{}.self_attention.dense.bias": "layers.{}.attn.o_proj.bias",
    "transformer.h.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "transformer.h.{}.post_attention_layernorm.bias": "layers.{}.mlp_norm.bias",
    "transformer.h.{}.mlp.dense_h_to_4h.weight": "layers.{}.mlp.up_proj.weight",
    "transformer.h.{}.mlp.dense_h_to_4h.bias": "layers.{}.mlp.up_proj.bias",
    "transformer.h.{}.mlp.dense_4h_to_h.weight": "layers.{}.mlp.down_proj.weight",
    "transformer.h.{}.mlp.dense_4h_to_h.bias": "layers.{}.mlp.down_proj.bias",
    "transformer.ln_f.weight": "norm.weight",
    "transformer.ln_f.bias": "norm.bias",
    "lm_head.weight": "lm_head.weight",
}
CONVERSIONS = tuple(
    Split(
        f"transformer.h.{{}}.self_attention.query_key_value.{leaf}",
        tuple(f"layers.{{}}.attn.{name}_proj.{leaf}" for name in "qkv"),
        groups=kv_heads,
    )
    for leaf in ("weight", "bias")
)


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes."""
    config = with_defaults(config, _DEFAULTS, aliases=_ALIASES)
    if config.get("n_embed") is not None:  # the width's first name
        config["hidden_size"] = config["n_embed"]
    if config["slow_but_exact"] and config["pretraining_tp"] > 1:  # transformers leaves biases out there
        raise refusal(config, "slow_but_exact", "only false is known, which is the same but for rounding")
    embed_dim, num_heads = config["hidden_size"], config["n_head"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        embed_dim=embed_dim,
        intermediate_dim=4 * embed_dim,
        num_layers=config["n_layer"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim_of(config, "hidden_size", "n_head"),
        max_seq_len=config.get("seq_length") or 2048,
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        residual_from_norm=config["apply_residual_connection_post_layernorm"],
        alibi=True,
        embed_norm=True,
        tie_embeddings=config["tie_word_embeddings"],
        qkv_bias=True,
        o_bias=True,
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "seq_length": spec.max_seq_len,
        "layer_norm_epsilon": spec.norm_eps,
        "apply_residual_connection_post_layernorm": spec.residual_from_norm,
        "tie_word_embeddings": spec.tie_embeddings,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="BLOOM and BLOOMZ, 560M to 176B",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    conversions=CONVERSIONS,
    optional_prefix="transformer.",
)


# Published sizes: https://arxiv.org/abs/2211.05100, table 3, and the config.json of each on the Hub.
def _published(embed_dim: int, num_layers: int, num_heads: int) -> Callable[..., Decoder]:
    return sized(FAMILY, spec_from_config({"hidden_size": embed_dim, "n_layer": num_layers, "n_head": num_heads}))


bloom_560m = _published(1024, 24, 16)
bloom_1b1 = _published(1536, 24, 16)
bloom_1b7 = _published(2048, 24, 16)
bloom_3b = _published(2560, 30, 32)
bloom_7b1 = _published(4096, 30, 32)
bloom_176b = _published(14_336, 70, 112)
