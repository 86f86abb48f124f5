"""What the dense families refuse, and what absent keys of their config.json stand for."""

import pytest
import torch

from torchmask.errors import WeightsError
from torchmask.models import from_config
from torchmask.models.config_values import ACTIVATIONS
from torchmask.models.folder import FAMILIES
from torchmask.modules import mlp

transformers = pytest.importorskip("transformers")

DENSE = [
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
]
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0]}


def spec_of(model_type, **changes):
    return from_config({"model_type": model_type, **TINY, **changes}, device="meta").spec


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("llama", {"hidden_act": "hardswish"}, "hidden_act is 'hardswish'"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation is 'mish'"),
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"rope_parameters": YARN}, "rope_parameters is {"),
        ("qwen3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}, "rope_parameters is {"),
        ("olmo2", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral'"),
        ("phi3", {"rope_scaling": LONGROPE}, "long_factor is (2.0, 3.0)"),
        ("qwen3", {"rope_scaling": LONGROPE}, "short_factor is (1.0, 1.0, 1.0, 1.0)"),
        ("olmo3", {"rope_scaling": LONGROPE}, "long_factor is (2.0, 3.0)"),
        ("falcon", {"rope_scaling": LONGROPE}, "long_factor is (2.0, 3.0)"),
        ("falcon", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gpt_neox", {"rotary_pct": 0.4, "rope_scaling": YARN}, "rope_type is 'yarn'; 3 channels rotate"),
        ("gpt_neox", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ("ministral", {"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention', 'full_attention']"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 3}, "layer_types is ['chunked_attention'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ("granite", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config is {"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_key_and_value(model_type, changes, named):
    with pytest.raises(WeightsError) as caught:
        spec_of(model_type, **changes)
    assert caught.value.id == "W05" and named in str(caught.value)


@pytest.mark.parametrize("model_type", DENSE)
def test_absent_keys_stand_for_what_they_do_in_transformers(model_type):
    said = {"model_type": model_type, "hidden_size": 2048, "num_hidden_layers": 7}
    spelt_out = transformers.AutoConfig.for_model(**said).to_dict()
    read = FAMILIES[model_type].spec_from_config
    assert read(said) == read(spelt_out)


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("lacking", ["hidden_size", "num_hidden_layers"])
def test_a_config_without_a_size_describes_no_model(model_type, lacking):
    config = {"model_type": model_type, **TINY}
    del config[lacking]
    with pytest.raises(WeightsError, match=lacking):
        from_config(config, device="meta")


def test_a_mistral_with_layer_types_is_read_as_a_ministral():
    types = ["full_attention", "sliding_attention", "full_attention"]
    spec = spec_of("mistral", sliding_window=8, layer_types=types)
    assert spec == spec_of("ministral", sliding_window=8, layer_types=types)
    assert [spec.window_of(i) for i in range(3)] == [None, 8, None]
    assert FAMILIES["mistral"].config_from_spec(spec)["layer_types"] == types


def test_a_part_of_a_head_is_written_so_that_it_is_read_again():
    parts = {"head_dim": 44, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 44}
    spec = spec_of("phi3", **parts, partial_rotary_factor=0.7)
    assert spec.rope_dim == 30
    assert from_config(FAMILIES["phi3"].config_from_spec(spec), device="meta").spec == spec


def test_two_ropes_that_switch_by_length_switch_each_at_its_own():
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    lengths = {"full_attention": 40, "sliding_attention": 20}
    tables = {name: {**factors, "original_max_position_embeddings": length} for name, length in lengths.items()}
    spec = spec_of("olmo3", rope_parameters=tables)
    assert spec.rope_switches_after == (40, 20)
    assert spec.rope_changes_after == 20


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-8, 8, 201, dtype=torch.float64)
    theirs = transformers.activations.ACT2FN[name](x)
    torch.testing.assert_close(mlp.ACTIVATIONS[ACTIVATIONS[name]](x), theirs, rtol=0, atol=1e-11)


def test_gelu_of_gemma_is_the_one_by_tanh_and_nowhere_else():
    assert spec_of("gemma", hidden_act="gelu", head_dim=8).activation == "gelu_tanh"
    assert spec_of("gemma2", hidden_activation="gelu").activation == "gelu"
    assert spec_of("qwen3", hidden_act="gelu").activation == "gelu"
