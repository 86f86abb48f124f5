"""What a config.json may say: types, ranges, and what no decoder can be built from."""

import json
import re
from pathlib import Path

import pytest

from torchmask.models import from_config, from_pretrained, read_config
from torchmask.modules.spec import DecoderSpec, MoESpec

TINY = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = Path(__file__).parent / "configs"
EXPERTS = {"model_type": "gpt_oss", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": 32.0}, r"hidden_size is 32\.0; a whole number"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; a number"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; a number"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None; true or false"),
        ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]; a name"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; a whole number of at least 0"),
        ({"vocab_size": 0}, "vocab_size is 0; a whole number of at least 1"),
        ({"hidden_size": -32}, "hidden_size is -32; a whole number of at least 1"),
        ({"intermediate_size": 0}, "intermediate_size is 0; a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; a whole number of at least 1"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4; a whole number of at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; a whole number of at least 1"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads is '2'; a whole number of at least 1"),
        ({"head_dim": 0}, "head_dim is 0; a whole number of at least 1"),
        ({"model_type": "gpt2", "n_head": 0}, "n_head is 0; a whole number of at least 1"),
        ({"model_type": "bloom", "num_attention_heads": 0}, "num_attention_heads is 0; a whole number of at least 1"),
        ({"model_type": "gpt_neox", "num_attention_heads": 0}, "num_attention_heads is 0; a whole number of at least"),
        ({"model_type": "falcon", "num_attention_heads": 0}, "num_attention_heads is 0; a whole number of at least"),
        ({"model_type": "gpt_oss", "num_attention_heads": 0}, "num_attention_heads is 0; a whole number of at least"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_type is 'ntk'; known rope scalings: default"),
        ({"head_dim": 7}, "7 channels of heads of 7 cannot be rotated"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0; a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; a number above 0"),
        ({"rope_scaling": ["linear"]}, r"rope_scaling is \['linear'\]; a table"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None; a rope scaling of type 'linear' needs it"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None; a rope scaling"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4}}, "long_factor is None; a rope"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": "1"}}, "attention_factor is '1'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'; a number above 0"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "embeddings is 0",
        ),
        ({"model_type": "gpt_neox", "rotary_pct": 2.0}, "16 channels of heads of 8"),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"model_type": "falcon", "bias": "false"}, "bias is 'false'"),
        ({"model_type": "gemma2", "num_key_value_heads": 2, "sliding_window": -1}, "sliding_window is -1"),
        (
            {"model_type": "gemma2", "num_key_value_heads": 2, "final_logit_softcapping": 0.0},
            "final_logit_softcapping is 0",
        ),
        ({**EXPERTS, "swiglu_limit": None}, "swiglu_limit is None; a number"),
        ({"model_type": "bloom", "slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact is True; only false"),
    ],
)
def test_a_value_that_makes_no_model_is_told_with_its_key(change, told):
    with pytest.raises(ValueError, match=told) as caught:
        from_config({**TINY, **change}, device="meta")
    assert caught.value.id == "W05"


SIZE = re.compile(r"(hidden|intermediate|vocab|num_attention|num_key_value|head_dim|n_(head|embd|layer)|max_pos|.*eps)")
OTHERS = ("query_pre_attn_scalar", "sliding_window_pattern", "no_rope_layer_interval", "logits_scaling")


@pytest.mark.parametrize("case", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("wrong", [0, -1])
def test_sizes_of_no_extent_are_told_with_their_key_whatever_the_family(case, wrong):
    config = {key: value for key, value in read_config(case).items() if key != "_note"}
    sizes = [key for key in config if (SIZE.match(key) or key in OTHERS) and isinstance(config[key], int | float)]
    assert sizes
    for key in sizes:
        value = type(config[key])(wrong)
        if key.endswith(("layer", "layers")) and not wrong:
            continue  # a model without layers is one
        with pytest.raises(ValueError, match=rf"{key} is {value}; a (whole )?number") as caught:
            from_config({**config, key: value}, device="meta")
        assert caught.value.id == "W05"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "lamma"}, "model_type 'lamma'"),
        ({"model_type": None}, "model_type is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": 30, "head_dim": None}, "config.json describes no model"),
    ],
)
def test_the_file_is_told_with_its_folder(change, told, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **change}))
    for load, given in (
        (from_pretrained, tmp_path),
        (from_config, tmp_path),
        (from_config, tmp_path / "config.json"),
    ):
        with pytest.raises(ValueError) as caught:
            load(given)
        assert str(caught.value).startswith(f"{tmp_path}/config.json: {told}") and "\n  fix: " in str(caught.value)


@pytest.mark.parametrize("name", [["llama"], {"a": 1}, 5])
def test_a_model_type_that_is_no_name_is_no_family(name):
    with pytest.raises(ValueError, match=r"model_type .* is not a family") as caught:
        from_config({**TINY, "model_type": name})
    assert caught.value.id == "W10"


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000},
        {"num_hidden_layers": 0},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        {"model_type": "gpt_neox", "rotary_pct": 0.1},
        {"model_type": "bloom", "slow_but_exact": False, "pretraining_tp": 4},
        {"model_type": "bloom", "slow_but_exact": True},
        {"model_type": "granite", "embedding_multiplier": 12, "logits_scaling": 8},
    ],
)
def test_null_whole_numbers_and_nothing_rotated_are_read_where_they_mean_something(change):
    from_config({**TINY, **change}, device="meta")


SIZES = {"vocab_size": 8, "embed_dim": 8, "intermediate_dim": 8, "num_layers": 1, "max_seq_len": 8}
SIZES |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": True},
        {"tie_embeddings": 1},
        {"norm_eps": float("nan")},
        {"sliding_window": 0},
        {"num_kv_heads": 0},
        {"moe": MoESpec(2, 3, 8)},
    ],
)
def test_a_spec_checks_itself(change):
    DecoderSpec(**SIZES)
    with pytest.raises(ValueError, match=r"is|of"):
        DecoderSpec(**{**SIZES, **change})
