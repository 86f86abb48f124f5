"""The GPT-OSS family: attention sinks, windows in every other layer, experts with biases and clamped gates.

Dropouts of config.json are not applied, as in evaluation. The published files hold the experts in MXFP4; they are read
to the parameters' dtype and written back unpacked.
"""

from collections.abc import Callable
from typing import Any

from torchmask.models.config_values import experts_per_token_of, with_defaults
from torchmask.models.conversions import Split
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS as _LLAMA
from torchmask.models.llama_like import (
    FULL,
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
from torchmask.modules.spec import DecoderSpec, MoESpec

MODEL_TYPE = "gpt_oss"
ARCHITECTURE = "GptOssForCausalLM"

_DEFAULTS = {
    **_LLAMA,
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
_ALIASES = {"num_experts": "num_local_experts"}
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

_WEIGHT_NAMES = {
    **WEIGHT_NAMES,
    "model.layers.{}.self_attn.sinks": "layers.{}.attn.sinks",
    "model.layers.{}.mlp.router.weight": "layers.{}.mlp.router.weight",
    "model.layers.{}.mlp.router.bias": "layers.{}.mlp.router.bias",
    "model.layers.{}.mlp.experts.down_proj_bias": "layers.{}.mlp.experts.down_proj_bias",
}


def _expert_dim(spec: DecoderSpec) -> int:
    assert spec.moe is not None
    return spec.moe.expert_dim


_EXPERTS, _OURS = "model.layers.{}.mlp.experts.", "layers.{}.mlp.experts."
_GATE_UP = (f"{_OURS}gate_proj", f"{_OURS}up_proj")
CONVERSIONS = (  # gate and up rows by turns
    Split(f"{_EXPERTS}gate_up_proj", _GATE_UP, groups=_expert_dim, dim=1, transposed=True),
    Split(f"{_EXPERTS}gate_up_proj_bias", tuple(f"{name}_bias" for name in _GATE_UP), groups=_expert_dim, dim=1),
    Split(f"{_EXPERTS}down_proj", (f"{_OURS}down_proj",), transposed=True),
)


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes, rope in the old (`rope_scaling`) or the new spelling."""
    config = with_defaults(config, _DEFAULTS, aliases=_ALIASES)
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_scaling"] = _DEFAULT_ROPE
    usual = [FULL if i % 2 else SLIDING for i in range(config["num_hidden_layers"])]
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config, default_base=150_000.0),
        **window_facts(config, usual),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        attn_sinks=True,
        moe=MoESpec(
            num_experts=config["num_local_experts"],
            experts_per_token=experts_per_token_of(config, "num_experts_per_tok", "num_local_experts"),
            expert_dim=config["intermediate_size"],
            bias=True,
            gate_limit=config["swiglu_limit"],
            gate_slope=config["swiglu_alpha"],
        ),
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    assert spec.moe is not None
    rope = rope_entries(spec)
    if rope["rope_scaling"] is None:  # null stands for YaRN
        rope["rope_scaling"] = {"rope_type": "default"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **common_entries(spec),
        **rope,
        "attention_bias": spec.qkv_bias,
        # transformers wants a window even where no layer has one.
        "sliding_window": spec.sliding_window or _DEFAULTS["sliding_window"],
        "layer_types": layer_types_of(spec),
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "swiglu_limit": spec.moe.gate_limit,
        "swiglu_alpha": spec.moe.gate_slope,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="GPT-OSS 20B and 120B, from MXFP4 or 16-bit files",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=_WEIGHT_NAMES,
    conversions=CONVERSIONS,
)


# Published sizes: https://arxiv.org/abs/2508.10925, table 1, and the config.json of each on the Hub.
def _published(**config: Any) -> Callable[..., Decoder]:
    return sized(FAMILY, spec_from_config(config))


gpt_oss_20b = _published(num_hidden_layers=24, num_local_experts=32)
gpt_oss_120b = _published()
