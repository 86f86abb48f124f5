"""The Qwen 3 mixtures: Qwen 3's layers (each head's queries and keys are normed), with experts in some or all.

Dropouts of config.json are not applied, as in evaluation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torchmask.models.config_values import experts_per_token_of, refusal, shortest_pattern, with_defaults
from torchmask.models.conversions import StackExperts, fused_experts
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS as _LLAMA
from torchmask.models.llama_like import QK_NORMS, WEIGHT_NAMES, common_entries, common_facts, rope_facts
from torchmask.models.rope_config import rope_entries
from torchmask.modules.decoder import Decoder
from torchmask.modules.spec import DecoderSpec, MoESpec

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"

_DEFAULTS = {
    **_LLAMA,
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}
_ALIASES = {"num_local_experts": "num_experts"}

CONVERSIONS = tuple(
    StackExperts(f"model.layers.{{}}.mlp.experts.{{expert}}.{name}.weight", (f"layers.{{}}.mlp.experts.{name}",))
    for name in ("gate_proj", "up_proj", "down_proj")
)


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes, rope in the old (`rope_theta`) or the new spelling."""
    config = with_defaults(config, _DEFAULTS, aliases=_ALIASES)
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        qk_norm="head",
        sliding_window=config["sliding_window"] if config["use_sliding_window"] else None,
        moe=_experts(config),
    )


def _experts(config: dict[str, Any]) -> MoESpec | None:
    dense, every = config["mlp_only_layers"] or [], config["decoder_sparse_step"]
    if every < 1:
        raise refusal(config, "decoder_sparse_step", "every how many layers there are experts")
    has_experts = [i not in dense and (i + 1) % every == 0 for i in range(config["num_hidden_layers"])]
    if config["num_experts"] == 0 or not any(has_experts):
        return None
    return MoESpec(
        num_experts=config["num_experts"],
        experts_per_token=experts_per_token_of(config, "num_experts_per_tok", "num_experts"),
        expert_dim=config["moe_intermediate_size"],
        normalize=config["norm_topk_prob"],
        layer_pattern=shortest_pattern(has_experts),
    )


def config_from_spec(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a model with this architecture, as transformers reads it."""
    experts = {"num_experts": 0}
    if spec.moe is not None:
        experts = {
            "num_experts": spec.moe.num_experts,
            "num_experts_per_tok": spec.moe.experts_per_token,
            "moe_intermediate_size": spec.moe.expert_dim,
            "norm_topk_prob": spec.moe.normalize,
        }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **common_entries(spec),
        **rope_entries(spec),
        "attention_bias": spec.qkv_bias,
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.num_layers) if spec.moe_of(i) is None],
        **experts,
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="Qwen3 30B-A3B and 235B-A22B, Qwen3-Coder 30B-A3B",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names={**WEIGHT_NAMES, **QK_NORMS, "model.layers.{}.mlp.gate.weight": "layers.{}.mlp.router.weight"},
    conversions=CONVERSIONS,
    other_layout=fused_experts("model.layers.{}.mlp.gate.weight"),
)


# Published sizes: https://arxiv.org/abs/2505.09388, table 2, and the config.json of each on the Hub.
def _published(**config: Any) -> Callable[..., Decoder]:
    same = {"head_dim": 128, "rope_theta": 1e6, "norm_topk_prob": True, "max_position_embeddings": 40_960}
    return sized(FAMILY, spec_from_config({**same, **config}))


_30b_a3b = partial(_published, num_hidden_layers=48)
_235b_a22b = partial(
    _published,
    hidden_size=4096,
    intermediate_size=12_288,
    moe_intermediate_size=1536,
    num_hidden_layers=94,
    num_attention_heads=64,
)

qwen3_30b_a3b = _30b_a3b()
qwen3_30b_a3b_2507 = _30b_a3b(max_position_embeddings=262_144, rope_theta=1e7)
qwen3_235b_a22b = _235b_a22b()
qwen3_235b_a22b_2507 = _235b_a22b(max_position_embeddings=262_144, rope_theta=5e6)
qwen3_coder_30b_a3b = _30b_a3b(max_position_embeddings=262_144, rope_theta=1e7)
