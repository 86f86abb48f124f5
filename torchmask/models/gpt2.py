"""The GPT-2 family: learned positions, one norm before each block, projections stored [in, out] and fused.

Dropouts of config.json are not applied, as in evaluation; `reorder_and_upcast_attn` is what attention always does here.
"""

from collections.abc import Callable
from typing import Any

from torchmask.models.config_values import activation_of, head_dim_of, refusal, with_defaults
from torchmask.models.conversions import Split
from torchmask.models.family import Family, sized
from torchmask.modules.decoder import Decoder
from torchmask.modules.mlp import Activation
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"

_DEFAULTS = {
    "vocab_size": 50_257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_ACTIVATIONS: dict[Activation, str] = {"gelu_tanh": "gelu_new"}

WEIGHT_NAMES = {
    "transformer.wte.weight": "embed_tokens.weight",
    "transformer.wpe.weight": "embed_positions.weight",
    "transformer.h.{}.ln_1.weight": "layers.{}.attn_norm.weight",
    "transformer.h.{}.ln_1.bias": "layers.{}.attn_norm.bias",
    "transformer.h.{}.attn.c_proj.bias": "layers.{}.attn.o_proj.bias",
    "transformer.h.{}.ln_2.weight": "layers.{}.mlp_norm.weight",
    "transformer.h.{}.ln_2.bias": "layers.{}.mlp_norm.bias",
    "transformer.h.{}.mlp.c_fc.bias": "layers.{}.mlp.up_proj.bias",
    "transformer.h.{}.mlp.c_proj.bias": "layers.{}.mlp.down_proj.bias",
    "transformer.ln_f.weight": "norm.weight",
    "transformer.ln_f.bias": "norm.bias",
    "lm_head.weight": "lm_head.weight",
}
_QKV = ("layers.{}.attn.q_proj", "layers.{}.attn.k_proj", "layers.{}.attn.v_proj")
CONVERSIONS = (
    Split("transformer.h.{}.attn.c_attn.weight", tuple(f"{name}.weight" for name in _QKV), transposed=True),
    Split("transformer.h.{}.attn.c_attn.bias", tuple(f"{name}.bias" for name in _QKV)),
    Split("transformer.h.{}.attn.c_proj.weight", ("layers.{}.attn.o_proj.weight",), transposed=True),
    Split("transformer.h.{}.mlp.c_fc.weight", ("layers.{}.mlp.up_proj.weight",), transposed=True),
    Split("transformer.h.{}.mlp.c_proj.weight", ("layers.{}.mlp.down_proj.weight",), transposed=True),
)


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes."""
    config = with_defaults(config, _DEFAULTS, aliases=_ALIASES)
    if config["add_cross_attention"]:
        raise refusal(config, "add_cross_attention", "there is no encoder to attend to here")
    embed_dim, num_heads = config["n_embd"], config["n_head"]
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        embed_dim=embed_dim,
        intermediate_dim=4 * embed_dim if config["n_inner"] is None else config["n_inner"],
        num_layers=config["n_layer"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim_of(config, "n_embd", "n_head"),
        max_seq_len=config["n_positions"],
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        rope_pattern=(False,),
        learned_positions=True,
        tie_embeddings=config["tie_word_embeddings"],
        qkv_bias=True,
        o_bias=True,
        attn_scale=None if config["scale_attn_weights"] else 1.0,
        attn_scale_by_layer=config["scale_attn_by_inverse_layer_idx"],
        activation=activation_of(config, "activation_function"),
        gated_mlp=False,
        mlp_bias=True,
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": spec.vocab_size,
        "n_positions": spec.max_seq_len,
        "n_embd": spec.embed_dim,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": spec.intermediate_dim,
        "activation_function": _ACTIVATIONS.get(spec.activation, spec.activation),
        "layer_norm_epsilon": spec.norm_eps,
        "scale_attn_weights": spec.attn_scale is None,
        "scale_attn_by_inverse_layer_idx": spec.attn_scale_by_layer,
        "tie_word_embeddings": spec.tie_embeddings,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="GPT-2 and others of its kind (DistilGPT-2, DialoGPT)",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    conversions=CONVERSIONS,
    derived=(".attn.bias", ".attn.masked_bias"),  # causal masks that old files hold
    optional_prefix="transformer.",  # the published files lack it, those that transformers writes have it
)


# Published sizes: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
def _published(embed_dim: int, num_layers: int, num_heads: int) -> Callable[..., Decoder]:
    return sized(FAMILY, spec_from_config({"n_embd": embed_dim, "n_layer": num_layers, "n_head": num_heads}))


distilgpt2 = _published(768, 6, 12)
gpt2_small = _published(768, 12, 12)
gpt2_medium = _published(1024, 24, 16)
gpt2_large = _published(1280, 36, 20)
gpt2_xl = _published(1600, 48, 25)
