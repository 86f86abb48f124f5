"""The Falcon family: 7B (one key for all heads), 40B, 180B, 11B (grouped, one norm or two) and the RW models (ALiBi).

Dropouts of config.json are not applied, as in evaluation. ALiBi is added to RW's scores before they are divided
by the square root of the head's width, as in the models' own code and by transformers' default attention (its eager
attention adds it twice), and rounded to bf16 as there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchmask.models.config_values import activation_of, head_dim_of, refusal, with_defaults
from torchmask.models.conversions import Conversion, Piece, Shape, Split, kv_heads
from torchmask.models.family import Family, sized
from torchmask.models.rope_config import read_rope, rope_entries
from torchmask.modules.decoder import Decoder
from torchmask.modules.mlp import Activation
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "falcon"
ARCHITECTURE = "FalconForCausalLM"

_DEFAULTS = {
    "vocab_size": 65_024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_ln_in_parallel_attn": None,
    "layer_norm_epsilon": 1e-5,
    "num_kv_heads": None,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "max_position_embeddings": 2048,
    "ffn_hidden_size": None,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
_FLAGS = ("alibi", "bias", "multi_query", "new_decoder_architecture", "parallel_attn")
_ACTIVATIONS: dict[Activation, str] = {"gelu_tanh": "gelu_pytorch_tanh"}

WEIGHT_NAMES = {
    "transformer.word_embeddings.weight": "embed_tokens.weight",
    "transformer.h.{}.self_attention.dense.weight": "layers.{}.attn.o_proj.weight",
    "transformer.h.{}.self_attention.dense.bias": "layers.{}.attn.o_proj.bias",
    "transformer.h.{}.mlp.dense_h_to_4h.weight": "layers.{}.mlp.up_proj.weight",
    "transformer.h.{}.mlp.dense_h_to_4h.bias": "layers.{}.mlp.up_proj.bias",
    "transformer.h.{}.mlp.dense_4h_to_h.weight": "layers.{}.mlp.down_proj.weight",
    "transformer.h.{}.mlp.dense_4h_to_h.bias": "layers.{}.mlp.down_proj.bias",
    "transformer.ln_f.weight": "norm.weight",
    "transformer.ln_f.bias": "norm.bias",
    "lm_head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class _Norm:
    """A norm that goes by another name where attention and feed-forward have one each, side by side; a `Conversion`."""

    ours: tuple[str, ...]
    hub: str
    hub_side_by_side: str

    def pieces(self, shapes: Sequence[Shape], spec: DecoderSpec) -> list[list[Piece]]:
        """See `Conversion`."""
        two = spec.parallel_residual and not spec.shared_norm
        return Split(self.hub_side_by_side if two else self.hub, self.ours).pieces(shapes, spec)


def _conversions(leaf: str) -> tuple[Conversion, ...]:
    layer, qkv = "transformer.h.{}.", tuple(f"layers.{{}}.attn.{name}_proj.{leaf}" for name in "qkv")
    return (
        Split(f"{layer}self_attention.query_key_value.{leaf}", qkv, groups=kv_heads),
        _Norm((f"layers.{{}}.attn_norm.{leaf}",), f"{layer}input_layernorm.{leaf}", f"{layer}ln_attn.{leaf}"),
        _Norm((f"layers.{{}}.mlp_norm.{leaf}",), f"{layer}post_attention_layernorm.{leaf}", f"{layer}ln_mlp.{leaf}"),
    )


CONVERSIONS = (*_conversions("weight"), *_conversions("bias"))


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes; flags that are null are off, whatever absent ones are."""
    config = with_defaults({**config, **{key: False for key in _FLAGS if config.get(key, ...) is None}}, _DEFAULTS)
    if config.get("n_embed") is not None:  # the width's first name
        config["hidden_size"] = config["n_embed"]
    embed_dim, head_dim = config["hidden_size"], head_dim_of(config, "hidden_size", "num_attention_heads")
    rope = read_rope(config)
    if not config["alibi"]:
        rope.check_whole(head_dim)
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        embed_dim=embed_dim,
        intermediate_dim=config["ffn_hidden_size"] or 4 * embed_dim,
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=_num_kv_heads(config),
        head_dim=head_dim,
        max_seq_len=config["max_position_embeddings"],
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        parallel_residual=bool(config["parallel_attn"]),
        shared_norm=_has_shared_norm(config),
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        alibi=bool(config["alibi"]),
        alibi_scale=head_dim**-0.5 if config["alibi"] else 1.0,
        alibi_rounded=bool(config["alibi"]),
        tie_embeddings=config["tie_word_embeddings"],
        qkv_bias=bool(config["bias"]),
        o_bias=bool(config["bias"]),
        activation=activation_of(config, "activation"),
        gated_mlp=False,
        mlp_bias=bool(config["bias"]),
    )


def _num_kv_heads(config: dict[str, Any]) -> int:
    if config["new_decoder_architecture"]:
        return int(config["num_kv_heads"] or config["num_attention_heads"])
    return 1 if config["multi_query"] else int(config["num_attention_heads"])


def _has_shared_norm(config: dict[str, Any]) -> bool:
    """Whether attention and feed-forward, side by side, read through one norm.

    Raises:
        WeightsError: W05, a combination that no model has.
    """
    num_norms, is_new = config["num_ln_in_parallel_attn"], bool(config["new_decoder_architecture"])
    if not config["parallel_attn"]:
        if is_new:
            raise refusal(config, "parallel_attn", "new_decoder_architecture goes with true")
        return False
    if num_norms not in ((None, 1, 2) if is_new else (None, 1)):
        raise refusal(config, "num_ln_in_parallel_attn", "1 goes with all models, 2 with new_decoder_architecture")
    return not is_new or num_norms == 1


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    is_old = not spec.parallel_residual or (spec.shared_norm and spec.num_kv_heads in (1, spec.num_heads))
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "ffn_hidden_size": spec.intermediate_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_kv_heads": spec.num_heads if is_old else spec.num_kv_heads,
        "multi_query": spec.num_kv_heads == 1,
        "new_decoder_architecture": not is_old,
        "parallel_attn": spec.parallel_residual,
        "num_ln_in_parallel_attn": None if is_old else 1 if spec.shared_norm else 2,
        "max_position_embeddings": spec.max_seq_len,
        "layer_norm_epsilon": spec.norm_eps,
        **rope_entries(spec),
        "alibi": spec.alibi,
        "bias": spec.qkv_bias,
        "activation": _ACTIVATIONS.get(spec.activation, spec.activation),
        "tie_word_embeddings": spec.tie_embeddings,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="Falcon 7B, 11B, 40B, 180B and RefinedWeb 1B, 7B",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    conversions=CONVERSIONS,
    derived=("rotary_emb.inv_freq",),  # a buffer that some old checkpoints wrote out
    optional_prefix="transformer.",
)


# Published sizes: https://arxiv.org/abs/2311.16867 and 2407.14885 (11B), and the config.json of each on the Hub.
def _published(embed_dim: int, num_layers: int, num_heads: int, **more: Any) -> Callable[..., Decoder]:
    sizes = {"hidden_size": embed_dim, "num_hidden_layers": num_layers, "num_attention_heads": num_heads}
    return sized(FAMILY, spec_from_config({**sizes, **more}))


_grouped = partial(_published, new_decoder_architecture=True, num_kv_heads=8)
_rw = partial(_published, alibi=True, bias=True, multi_query=False, parallel_attn=False)

falcon_7b = _published(4544, 32, 71)
falcon_40b = _grouped(8192, 60, 128)
falcon_180b = _grouped(14_848, 80, 232)
falcon_11b = _grouped(
    4096,
    60,
    32,
    num_ln_in_parallel_attn=1,
    max_position_embeddings=8192,
    rope_theta=500_042.0,
    tie_word_embeddings=False,
)
falcon_rw_1b = _rw(2048, 24, 32, vocab_size=50_304)
falcon_rw_7b = _rw(4096, 36, 64)
