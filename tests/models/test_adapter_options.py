"""What adapters a model takes, what is refused, and what their folders say."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, adapted, logits_of, shake, tiny, tokens_of

from torchmask.errors import ConfigError, EnvironmentFault, WeightsError
from torchmask.lora import LoRA
from torchmask.models import (
    adapt,
    from_config,
    load_adapter,
    read_config,
    resize_embeddings,
    save_adapter,
    save_pretrained,
    weights_fingerprint,
)
from torchmask.models.adapters import merged_parameters
from torchmask.modules.lora import LoRALinear, adapted_layers, is_adapter


def test_only_what_is_named_is_adapted_and_all_else_is_frozen():
    model = tiny("llama_biases")
    assert adapt(model, LoRA(targets=["q_proj", "down_proj"], also_train=["lm_head"])) == 2 * model.spec.num_layers
    names = {name.rpartition(".")[2] for name, _ in adapted_layers(model)}
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "down_proj"} and trained == names | {"lm_head"}


def test_no_adapter_means_no_change():
    model = tiny("llama_mha")
    assert adapt(model, None) == 0
    assert all(p.requires_grad for p in model.parameters())


def test_by_default_routers_and_the_head_have_no_adapter():
    model = tiny("mixtral_top2")
    adapt(model, LoRA())
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_scale_is_alpha_by_the_rank_or_by_its_root():
    assert (LoRA(rank=16, alpha=8).scale, LoRA(rank=16, alpha=8, rank_stabilized=True).scale) == (0.5, 2.0)


def test_dropout_is_of_the_adapters_input_and_in_training_only():
    model = adapted("llama_mha", LoRA(rank=3, dropout=0.5))
    tokens = tokens_of(model, 1, 9)
    shake(model, 0.1, seed=8, only=is_adapter)
    first, second = logits_of(model, tokens), logits_of(model, tokens)
    model.eval()
    assert not first.equal(second) and logits_of(model, tokens).equal(logits_of(model, tokens))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"targets": []}, "null means all"),
        ({"targets": ["query"]}, "q_proj"),
        ({"targets": ["lm_head"]}, "lm_head"),
        ({"also_train": ["embeddings"]}, "embed_tokens"),
    ],
)
def test_what_makes_no_adapter_is_refused_with_the_choices(options, words):
    with pytest.raises(ConfigError) as caught:
        adapt(tiny("llama_mha"), LoRA(**options))
    assert caught.value.id == "C09"
    assert words in str(caught.value)


def test_a_second_adapter_is_refused():
    model = adapted("llama_mha")
    with pytest.raises(ConfigError, match="has adapters already"):
        adapt(model, LoRA())


def test_new_tokens_beside_a_frozen_embedding_are_refused():
    config = read_config(CONFIGS / "llama_tied.json")
    model = from_config({key: value for key, value in config.items() if key != "_note"}, device="meta")
    resize_embeddings(model, model.spec.vocab_size + 5)
    with pytest.raises(ConfigError, match="also_train"):
        adapt(model, LoRA())
    assert adapt(model, LoRA(also_train=["embed_tokens"]))


def test_new_tokens_on_spare_rows_of_a_frozen_embedding_are_refused():
    with pytest.raises(ConfigError, match="also_train"):
        adapt(tiny("llama_tied"), LoRA(), has_new_tokens=True)
    assert adapt(tiny("llama_tied"), LoRA(also_train=["embed_tokens"]), has_new_tokens=True)


def test_an_adapter_of_other_weights_is_told_by_their_fingerprint(tmp_path):
    model = adapted("llama_mha")
    base, other = tiny("llama_mha"), from_config(model.hub_config, seed=99)
    for each, name in ((base, "base"), (other, "other")):
        save_pretrained(each, tmp_path / name)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    with pytest.raises(WeightsError) as caught:
        load_adapter(other, tmp_path / "adapter", base=tmp_path / "other")
    assert caught.value.id == "W09"
    for name in ("base", "other"):
        assert weights_fingerprint(tmp_path / name) in str(caught.value)
    load_adapter(base, tmp_path / "adapter", base=tmp_path / "base")


def test_an_adapter_that_does_not_fit_is_refused_with_the_names(tmp_path):
    save_adapter(adapted("llama_mha"), tmp_path)
    with pytest.raises(WeightsError) as caught:
        load_adapter(tiny("llama_gqa"), tmp_path)
    assert caught.value.id == "W05"
    assert "k_proj" in str(caught.value)
    with pytest.raises(WeightsError, match="no such linear layer"):
        load_adapter(tiny("gpt2_small"), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "biases")],
)
def test_an_adapter_of_another_kind_is_refused_by_name(tmp_path, change, words):
    save_adapter(adapted("llama_mha"), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(WeightsError) as caught:
        load_adapter(tiny("llama_mha"), tmp_path)
    assert caught.value.id == "W10"
    assert words in str(caught.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(WeightsError) as caught:
        load_adapter(tiny("llama_mha"), tmp_path)
    assert caught.value.id == "W03"


def test_an_embedding_trained_apart_from_its_tied_head_is_refused(tmp_path):
    model = adapted("llama_mha", LoRA(rank=2, also_train=["embed_tokens"]))
    save_adapter(model, tmp_path)
    tied = from_config({**model.hub_config, "tie_word_embeddings": True})
    with pytest.raises(WeightsError, match="one parameter"):
        load_adapter(tied, tmp_path)


def test_a_tied_embedding_that_is_trained_goes_out_with_its_head(tmp_path):
    model = adapted("llama_tied", LoRA(rank=2, also_train=["embed_tokens"]))
    shake(model, 0.1, seed=2, only=lambda name: name == "embed_tokens.weight")
    save_adapter(model, tmp_path)
    fresh = tiny("llama_tied")
    load_adapter(fresh, tmp_path)
    assert fresh.embed_tokens.weight.equal(model.embed_tokens.weight)
    assert fresh.lm_head.weight is fresh.embed_tokens.weight


def test_a_model_without_adapters_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(tiny("llama_mha"), tmp_path)


def test_a_layer_keeps_its_parameters_under_their_names():
    model = tiny("llama_biases")
    before = dict(model.named_parameters())
    adapt(model, LoRA())
    assert all(dict(model.named_parameters())[name] is p for name, p in before.items())
    layer = model.layers[0].attn.q_proj
    assert isinstance(layer, LoRALinear) and "rank=16" in repr(layer)
    assert isinstance(copy.deepcopy(layer), LoRALinear)


def test_a_head_of_its_own_is_trained_for_new_tokens_too():
    for also_train in ([], ["embed_tokens"], ["lm_head"]):
        with pytest.raises(ConfigError, match="added to the vocabulary") as caught:
            adapt(tiny("llama_mha"), LoRA(also_train=also_train), has_new_tokens=True)
        assert "lora.also_train=[embed_tokens,lm_head]" in str(caught.value)
    assert adapt(tiny("llama_mha"), LoRA(also_train=["embed_tokens", "lm_head"]), has_new_tokens=True)


@pytest.mark.parametrize(
    ("case", "name"),
    [("phi3_plain", "v_proj"), ("mixtral_top2", "experts"), ("mixtral_top2", "router"), ("gpt_oss_yarn", "attn")],
)
def test_what_a_folder_of_adapters_cannot_hold_is_not_trained_beside_them(case, name):
    with pytest.raises(ConfigError, match="cannot be trained whole") as caught:
        adapt(tiny(case), LoRA(also_train=[name]))
    assert caught.value.id == "C09" and "attn_norm, embed_tokens" in str(caught.value)


def test_experts_and_routers_are_no_targets_and_the_message_says_so():
    for name in ("router", "gate_proj"):
        with pytest.raises(ConfigError, match="experts take no adapters"):
            adapt(tiny("mixtral_top2"), LoRA(targets=[name]))


def test_new_adapters_are_drawn_by_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        model = tiny("llama_mha")
        adapt(model, LoRA(rank=2), seed=seed)
        drawn.append(model.layers[0].attn.q_proj.lora_a)
        assert not model.layers[0].attn.q_proj.lora_b.any()
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    assert drawn[0].abs().max() <= 1 / drawn[0].shape[1] ** 0.5


@torch.no_grad()
def test_merging_rounds_once():
    model = adapted("llama_mha", LoRA(rank=8, alpha=1.0), dtype=torch.bfloat16)
    layer = model.layers[0].attn.q_proj
    exact = layer.weight.double() + layer.scale * layer.lora_b.double() @ layer.lora_a.double()
    merged = merged_parameters(model)["layers.0.attn.q_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().max() <= (exact.bfloat16().double() - exact).abs().max() * 1.01
    assert merged.equal(exact.to(torch.float32).bfloat16())


@torch.no_grad()
def test_layers_of_other_scales_in_one_module_keep_theirs(tmp_path):
    model = adapted("phi3_plain", dtype=torch.float64)
    model.layers[0].attn.k_proj.scale *= 3.0
    save_adapter(model, tmp_path)
    loaded, tokens = tiny("phi3_plain", torch.float64), tokens_of(model, 1, 19)
    load_adapter(loaded, tmp_path)
    assert (logits_of(loaded, tokens) - logits_of(model, tokens)).abs().max() < 1e-10


def test_an_adapter_does_not_grow_when_it_is_saved_again(tmp_path):
    save_adapter(adapted("phi3_plain"), tmp_path / "1")
    model = tiny("phi3_plain")
    load_adapter(model, tmp_path / "1")
    save_adapter(model, tmp_path / "2")
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "12")
    assert one.keys() == two.keys() and all(two[name].equal(tensor) for name, tensor in one.items())


@pytest.mark.parametrize(("case", "transposed"), [("gpt2_small", True), ("llama_mha", False)])
def test_the_layout_of_the_layers_below_is_said(case, transposed, tmp_path):
    save_adapter(adapted(case), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is transposed


def test_a_copy_in_another_dtype_is_the_same_base(tmp_path):
    base = tiny("llama_mha")
    save_pretrained(base, tmp_path / "base")
    save_pretrained(base, tmp_path / "half", dtype=torch.bfloat16)
    assert weights_fingerprint(tmp_path / "base") == weights_fingerprint(tmp_path / "half")


def test_an_adapter_on_top_of_another_is_refused(tmp_path):
    model = adapted("llama_mha")
    save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has adapters already"):
        load_adapter(model, tmp_path)


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "adapter").write_text("")
    with pytest.raises(EnvironmentFault) as caught:
        save_adapter(adapted("llama_mha"), tmp_path / "adapter")
    assert caught.value.id == "K05"
