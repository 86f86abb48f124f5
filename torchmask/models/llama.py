"""The Llama family: 2, 3, 3.1, 3.2, 3.3, Code Llama, TinyLlama, SmolLM2 and everything else with `model_type: llama`.

A family is: a reading of config.json into a `DecoderSpec`, the way back, a table of weight names, and one line a size.
"""

from functools import partial
from typing import Any

from torchmask.models.config_values import with_defaults
from torchmask.models.family import Family, sized
from torchmask.models.llama_like import DEFAULTS, DERIVED, WEIGHT_NAMES, common_entries, common_facts, rope_facts
from torchmask.models.rope_config import rope_entries
from torchmask.modules.rope_scaling import Llama3RopeScaling
from torchmask.modules.spec import DecoderSpec

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def spec_from_config(config: dict[str, Any]) -> DecoderSpec:
    """The architecture that a config.json describes, rope in the old (`rope_scaling`) or the new spelling."""
    config = with_defaults(config, DEFAULTS)
    return DecoderSpec(
        **common_facts(config),
        **rope_facts(config),
        qkv_bias=config["attention_bias"],
        o_bias=config["attention_bias"],
        mlp_bias=config["mlp_bias"],
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
    }


FAMILY = Family(
    model_type=MODEL_TYPE,
    title="Llama 2 to 3.3, Code Llama, TinyLlama, SmolLM2, Yi, Falcon3, DeepSeek-R1 distills",
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    weight_names=WEIGHT_NAMES,
    derived=DERIVED,
)

# Published sizes: https://arxiv.org/abs/2307.09288 (2), 2308.12950 (Code), 2407.21783 (3, 3.1), 2401.02385 (TinyLlama),
# 2502.02737 (SmolLM2), 2403.04652 (Yi), 2501.12948 (R1 distills), and the config.json of each on the Hub.
_llama2 = partial(DecoderSpec, vocab_size=32_000, head_dim=128, max_seq_len=4096)
_code_llama = partial(_llama2, vocab_size=32_016, rope_base=1e6, max_seq_len=16_384)
_llama3 = partial(DecoderSpec, vocab_size=128_256, num_kv_heads=8, head_dim=128, max_seq_len=8192, rope_base=500_000.0)
_llama3_1 = partial(_llama3, max_seq_len=131_072, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192))
_llama3_2 = partial(
    _llama3, max_seq_len=131_072, rope_scaling=Llama3RopeScaling(32.0, 1.0, 4.0, 8192), tie_embeddings=True
)
_smollm2 = partial(
    DecoderSpec, vocab_size=49_152, head_dim=64, max_seq_len=8192, rope_base=100_000.0, tie_embeddings=True
)
_yi = partial(DecoderSpec, vocab_size=64_000, head_dim=128, max_seq_len=4096, rope_base=5e6)
_falcon3 = partial(
    DecoderSpec,
    vocab_size=131_072,
    embed_dim=3072,
    num_heads=12,
    num_kv_heads=4,
    head_dim=256,
    max_seq_len=32_768,
    norm_eps=1e-6,
    rope_base=1_000_042.0,
)

_7b: dict[str, Any] = {
    "embed_dim": 4096,
    "intermediate_dim": 11_008,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
}
_13b: dict[str, Any] = {
    "embed_dim": 5120,
    "intermediate_dim": 13_824,
    "num_layers": 40,
    "num_heads": 40,
    "num_kv_heads": 40,
}
_34b: dict[str, Any] = {
    "embed_dim": 8192,
    "intermediate_dim": 22_016,
    "num_layers": 48,
    "num_heads": 64,
    "num_kv_heads": 8,
}
_70b: dict[str, Any] = {
    "embed_dim": 8192,
    "intermediate_dim": 28_672,
    "num_layers": 80,
    "num_heads": 64,
    "num_kv_heads": 8,
}
_8b: dict[str, Any] = {"embed_dim": 4096, "intermediate_dim": 14_336, "num_layers": 32, "num_heads": 32}
_70b_v3: dict[str, Any] = {"embed_dim": 8192, "intermediate_dim": 28_672, "num_layers": 80, "num_heads": 64}
_405b: dict[str, Any] = {"embed_dim": 16_384, "intermediate_dim": 53_248, "num_layers": 126, "num_heads": 128}

llama2_7b = sized(FAMILY, _llama2(**_7b))
llama2_13b = sized(FAMILY, _llama2(**_13b))
llama2_70b = sized(FAMILY, _llama2(**_70b))
code_llama_7b = sized(FAMILY, _code_llama(**_7b))
code_llama_13b = sized(FAMILY, _code_llama(**_13b))
code_llama_34b = sized(FAMILY, _code_llama(**_34b, vocab_size=32_000))
# Not its Instruct and Python versions: these have a rope base of 10,000 and were made for 4096 tokens.
code_llama_70b = sized(FAMILY, _code_llama(**_70b))
llama3_8b = sized(FAMILY, _llama3(**_8b))
llama3_70b = sized(FAMILY, _llama3(**_70b_v3))
llama3_1_8b = sized(FAMILY, _llama3_1(**_8b))
llama3_1_70b = sized(FAMILY, _llama3_1(**_70b_v3))
llama3_1_405b = sized(FAMILY, _llama3_1(**_405b))
llama3_2_1b = sized(FAMILY, _llama3_2(embed_dim=2048, intermediate_dim=8192, num_layers=16, num_heads=32, head_dim=64))
llama3_2_3b = sized(FAMILY, _llama3_2(embed_dim=3072, intermediate_dim=8192, num_layers=28, num_heads=24))
llama3_3_70b = sized(FAMILY, _llama3_1(**_70b_v3))
deepseek_r1_distill_llama_8b = sized(FAMILY, _llama3_1(**_8b))
deepseek_r1_distill_llama_70b = sized(FAMILY, _llama3_1(**_70b_v3))
yi_6b = sized(FAMILY, _yi(**{**_7b, "num_kv_heads": 4}))
yi_9b = sized(FAMILY, _yi(**{**_7b, "num_kv_heads": 4, "num_layers": 48}, norm_eps=1e-6, rope_base=10_000.0))
yi_34b = sized(FAMILY, _yi(embed_dim=7168, intermediate_dim=20_480, num_layers=60, num_heads=56, num_kv_heads=8))
falcon3_1b = sized(
    FAMILY, _falcon3(embed_dim=2048, intermediate_dim=8192, num_layers=18, num_heads=8, max_seq_len=4096)
)
falcon3_3b = sized(FAMILY, _falcon3(intermediate_dim=9216, num_layers=22))
falcon3_7b = sized(FAMILY, _falcon3(intermediate_dim=23_040, num_layers=28))
falcon3_10b = sized(FAMILY, _falcon3(intermediate_dim=23_040, num_layers=40))
tinyllama_1b = sized(
    FAMILY,
    DecoderSpec(
        vocab_size=32_000,
        embed_dim=2048,
        intermediate_dim=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        max_seq_len=2048,
    ),
)
smollm2_135m = sized(FAMILY, _smollm2(embed_dim=576, intermediate_dim=1536, num_layers=30, num_heads=9, num_kv_heads=3))
smollm2_360m = sized(
    FAMILY, _smollm2(embed_dim=960, intermediate_dim=2560, num_layers=32, num_heads=15, num_kv_heads=5)
)
smollm2_1_7b = sized(
    FAMILY,
    _smollm2(embed_dim=2048, intermediate_dim=8192, num_layers=24, num_heads=32, num_kv_heads=32, rope_base=130_000.0),
)
