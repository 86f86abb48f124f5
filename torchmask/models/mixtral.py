"""The Mixtral family: Mistral's layers with a mixture of experts in each.

Dropouts of config.json and the router's jitter are not applied, as in evaluation.
"""

from collections.abc import Callable
from typing import Any

from torchmask.models.config_values import experts_per_token_of, with_defaults
from torchmask.models.conversions import StackExperts, fused_experts
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS as _LLAMA
from torchmask.models.llama_like import DERIVED, WEIGHT_NAMES, common_entries, common_facts, rope_facts
from torchmask.models.rope_config import rope_entries
from torchmask.modules.decoder import Decoder
from torchmask.modules.spec import DecoderSpec, MoESpec

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"

_DEFAULTS = {
    **_LLAMA,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
_ALIASES = {"num_experts": "num_local_experts"}

_EXPERT = "model.layers.{}.block_sparse_moe.experts.{expert}."
CONVERSIONS = (
    StackExperts(f"{_EXPERT}w1.weight", ("layers.{}.mlp.experts.gate_proj",)),
    StackExperts(f"{_EXPERT}w3.weight", ("layers.{}.mlp.experts.up_proj",)),
    StackExperts(f"{_EXPERT}w2.weight", ("layers.{}.mlp.experts.down_proj",)),
)

OTHER_LAYOUT = fused_experts("model.layers.{}.mlp.gate.weight")


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes, rope in the old (`rope_theta`) or the new spelling."""
    config = with_defaults(config, _DEFAULTS, aliases=_ALIASES)
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config, default_base=1e6),
        sliding_window=config["sliding_window"],
        moe=MoESpec(
            num_experts=config["num_local_experts"],
            experts_per_token=experts_per_token_of(config, "num_experts_per_tok", "num_local_experts"),
            expert_dim=config["intermediate_size"],
        ),
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    assert spec.moe is not None
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **common_entries(spec),
        **rope_entries(spec),
        "sliding_window": spec.sliding_window,
        "num_local_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="Mixtral 8x7B and 8x22B",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names={**WEIGHT_NAMES, "model.layers.{}.block_sparse_moe.gate.weight": "layers.{}.mlp.router.weight"},
    conversions=CONVERSIONS,
    other_layout=OTHER_LAYOUT,
    derived=DERIVED,
)


# Published sizes: https://arxiv.org/abs/2401.04088, table 1, and the config.json of each on the Hub.
def _published(**config: Any) -> Callable[..., Decoder]:
    return sized(FAMILY, spec_from_config(config))


mixtral_8x7b = _published(max_position_embeddings=32_768)
mixtral_8x22b = _published(
    hidden_size=6144,
    intermediate_size=16_384,
    num_hidden_layers=56,
    num_attention_heads=48,
    max_position_embeddings=65_536,
    vocab_size=32_000,
)
