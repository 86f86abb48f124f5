"""The GPT-NeoX family: GPT-NeoX 20B and Pythia, with parallel residuals, partly rotated heads and fused projections.

Dropouts of config.json are not applied, as in evaluation.
"""

from collections.abc import Callable
from typing import Any

from torchmask.models.config_values import activation_of, head_dim_of, with_defaults
from torchmask.models.conversions import Split, kv_heads
from torchmask.models.family import Family, sized
from torchmask.models.rope_config import read_rope, rope_entries
from torchmask.modules.decoder import Decoder
from torchmask.modules.mlp import Activation
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"

_DEFAULTS = {
    "vocab_size": 50_432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24_576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}
_ACTIVATIONS: dict[Activation, str] = {"gelu_tanh": "gelu_fast"}

WEIGHT_NAMES = {
    "gpt_neox.embed_in.weight": "embed_tokens.weight",
    "gpt_neox.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
    "gpt_neox.layers.{}.input_layernorm.bias": "layers.{}.attn_norm.bias",
    "gpt_neox.layers.{}.attention.dense.weight": "layers.{}.attn.o_proj.weight",
    "gpt_neox.layers.{}.attention.dense.bias": "layers.{}.attn.o_proj.bias",
    "gpt_neox.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
    "gpt_neox.layers.{}.post_attention_layernorm.bias": "layers.{}.mlp_norm.bias",
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight": "layers.{}.mlp.up_proj.weight",
    "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias": "layers.{}.mlp.up_proj.bias",
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight": "layers.{}.mlp.down_proj.weight",
    "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias": "layers.{}.mlp.down_proj.bias",
    "gpt_neox.final_layer_norm.weight": "norm.weight",
    "gpt_neox.final_layer_norm.bias": "norm.bias",
    "embed_out.weight": "lm_head.weight",
}
CONVERSIONS = tuple(
    Split(
        f"gpt_neox.layers.{{}}.attention.query_key_value.{leaf}",
        tuple(f"layers.{{}}.attn.{name}_proj.{leaf}" for name in "qkv"),
        groups=kv_heads,
    )
    for leaf in ("weight", "bias")
)


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes, rope in the old (`rotary_pct`) or the new spelling."""
    config = with_defaults(config, _DEFAULTS)
    num_heads, head_dim = config["num_attention_heads"], head_dim_of(config, "hidden_size", "num_attention_heads")
    rope = read_rope(config, base_key="rotary_emb_base", fraction_key="rotary_pct", default_fraction=0.25)
    rope_dim = rope.dim(head_dim)
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        max_seq_len=config["max_position_embeddings"],
        norm="layer",
        norm_eps=config["layer_norm_eps"],
        parallel_residual=config["use_parallel_residual"],
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        rope_dim=rope_dim,
        rope_pattern=(rope_dim != 0,),
        tie_embeddings=config["tie_word_embeddings"],
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        activation=activation_of(config, "hidden_act"),
        gated_mlp=False,
        mlp_bias=True,
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    rope = rope_entries(spec)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "intermediate_size": spec.intermediate_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.max_seq_len,
        "layer_norm_eps": spec.norm_eps,
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": rope.pop("partial_rotary_factor", 1.0),
        **rope,
        "use_parallel_residual": spec.parallel_residual,
        "attention_bias": spec.qkv_bias,
        "hidden_act": _ACTIVATIONS.get(spec.activation, spec.activation),
        "tie_word_embeddings": spec.tie_embeddings,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="GPT-NeoX 20B, Pythia, StableLM alpha, RedPajama-INCITE, Dolly 2",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    conversions=CONVERSIONS,
    other_layout=(Split("lm_head.weight", ("lm_head.weight",)),),  # its name in the memory of transformers 5
    derived=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),  # masks and tables of old files
    optional_prefix="gpt_neox.",
)


# Published sizes: https://arxiv.org/abs/2304.01373, table 1, and the config.json of each on the Hub.
def _pythia(embed_dim: int, num_layers: int, num_heads: int, **more: Any) -> Callable[..., Decoder]:
    sizes = {"hidden_size": embed_dim, "num_hidden_layers": num_layers, "num_attention_heads": num_heads}
    sizes |= {"intermediate_size": 4 * embed_dim, "vocab_size": 50_304}
    return sized(FAMILY, spec_from_config({**sizes, **more}))


pythia_14m = _pythia(128, 6, 4, max_position_embeddings=512)
pythia_31m = _pythia(256, 6, 8, max_position_embeddings=1024)
pythia_70m = _pythia(512, 6, 8)
pythia_160m = _pythia(768, 12, 12)
pythia_410m = _pythia(1024, 24, 16)
pythia_1b = _pythia(2048, 16, 8)
pythia_1_4b = _pythia(2048, 24, 16)
pythia_2_8b = _pythia(2560, 32, 32)
pythia_6_9b = _pythia(4096, 32, 32, vocab_size=50_432)
pythia_12b = _pythia(5120, 36, 40, vocab_size=50_688)
gpt_neox_20b = sized(FAMILY, spec_from_config({"hidden_act": "gelu_fast"}))
