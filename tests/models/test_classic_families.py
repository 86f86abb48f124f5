"""What the families before Llama and the mixtures have that a config.json in `configs/` cannot show."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchmask.errors import WeightsError
from torchmask.models import from_config, from_pretrained, read_config, save_pretrained
from torchmask.models.folder import FAMILIES

CONFIGS = Path(__file__).parent / "configs"
CLASSIC = ("bloom", "falcon", "gpt2", "gpt_neox", "gpt_oss", "mixtral", "qwen3_moe")


def config_of(case):
    config = read_config(CONFIGS / f"{case}.json")
    config.pop("_note")
    return config


@pytest.mark.parametrize("model_type", CLASSIC)
def test_absent_keys_stand_for_the_defaults_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    everything = transformers.AutoConfig.for_model(model_type).to_dict()
    read = FAMILIES[model_type].spec_from_config
    assert read({"model_type": model_type}) == read(json.loads(json.dumps(everything)))


def test_keys_may_go_by_the_second_name_that_transformers_gives_them():
    bloom, gpt2, qwen = (FAMILIES[name].spec_from_config for name in ("bloom", "gpt2", "qwen3_moe"))
    assert bloom({"num_hidden_layers": 5, "n_embed": 24}) == bloom({"n_layer": 5, "hidden_size": 24})
    assert gpt2({"max_position_embeddings": 7, "hidden_size": 24}) == gpt2({"n_positions": 7, "n_embd": 24})
    assert qwen({"num_local_experts": 16}) == qwen({"num_experts": 16})


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("bloom_alibi", {"n_head": 5}),
        ("gpt2_small", {"add_cross_attention": True}),
        ("gpt2_small", {"activation_function": "mish"}),
        ("falcon_grouped", {"parallel_attn": False}),
        ("falcon_multi_query", {"num_ln_in_parallel_attn": 2}),
        ("gpt_oss_yarn", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
        ("gpt_oss_yarn", {"num_key_value_heads": 3}),
        ("mixtral_top2", {"num_experts_per_tok": 9}),
        ("qwen3_moe_normalized", {"decoder_sparse_step": 0}),
    ],
)
def test_what_no_model_here_computes_is_refused_by_key_and_value(case, changed):
    (key, value), *_ = changed.items()
    with pytest.raises(WeightsError) as caught:
        from_config({**config_of(case), **changed})
    assert caught.value.id == "W05"
    assert key in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("case", "prefix", "buffers"),
    [
        ("bloom_alibi", "transformer.", ()),
        ("falcon_grouped", "transformer.", ()),
        ("gpt2_small", "transformer.", ("h.{}.attn.bias", "h.{}.attn.masked_bias")),
        (
            "gpt_neox_parallel",
            "gpt_neox.",
            ("layers.{}.attention.bias", "layers.{}.attention.masked_bias", "layers.{}.attention.rotary_emb.inv_freq"),
        ),
    ],
)
def test_published_files_without_the_prefix_and_with_old_buffers_load(case, prefix, buffers, tmp_path):
    model = from_config(config_of(case))
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith(prefix) for name in tensors)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    tensors.update({name.format(i): torch.ones(1, 1, 8, 8) for name in buffers for i in range(3)})
    save_file(tensors, tmp_path / "model.safetensors")
    again = from_pretrained(tmp_path)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert ours.equal(theirs), name


@pytest.mark.parametrize("flag", ["alibi", "bias", "multi_query", "new_decoder_architecture", "parallel_attn"])
def test_flags_of_falcon_that_are_null_are_off(flag):
    config = config_of("falcon_alibi")
    off, null = (from_config({**config, flag: value}, device="meta").spec for value in (False, None))
    assert null == off


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_gpt_neox_may_have_its_name_in_the_memory_of_transformers(tied, tmp_path):
    model = from_config({**config_of("gpt_neox_parallel"), "tie_word_embeddings": tied})
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(model.lm_head.weight)
    tensors.pop("embed_out.weight", None)
    save_file(tensors, tmp_path / "model.safetensors")
    again = from_pretrained(tmp_path)  # which is untied, as its files have another head
    assert again.lm_head.weight.equal(tensors["lm_head.weight"])
    assert again.embed_tokens.weight.equal(model.embed_tokens.weight)


@torch.no_grad()
def test_a_document_longer_than_the_learned_positions_is_told_with_both_lengths():
    model = from_config(config_of("gpt2_small"))
    with pytest.raises(ValueError, match="a document of 129 tokens: the model has learned positions for 128"):
        model(torch.zeros(1, 129, dtype=torch.int64))
    cache = model.new_cache(1, 129)
    model(torch.zeros(1, 128, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="129 tokens"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


@torch.no_grad()
def test_a_row_may_be_longer_than_the_learned_positions_of_its_documents():
    model = from_config(config_of("gpt2_small"))
    tokens, positions = torch.arange(180)[None] % 97, torch.arange(90).repeat(2)[None]
    ends = torch.tensor([[90] * 90 + [180] * 90])
    alone = torch.cat([model(tokens[:, :90]), model(tokens[:, 90:])], dim=1)
    assert (model(tokens, positions, ends) - alone).abs().max() < 1e-5
