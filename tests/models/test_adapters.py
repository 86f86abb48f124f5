"""Adapters on every family: they start as nothing, train as the dense sum would, and leave as PEFT reads them."""

import copy
import json
from pathlib import Path

import pytest
import torch

from torchmask.errors import ConfigError, WeightsError
from torchmask.lora import LoRA
from torchmask.models import (
    adapt,
    from_config,
    from_pretrained,
    load_adapter,
    read_config,
    resize_embeddings,
    save_adapter,
    save_pretrained,
    weights_fingerprint,
)
from torchmask.modules import linear_cross_entropy
from torchmask.modules.lora import LoRALinear, adapted_layers, is_adapter

HERE = Path(__file__).parent
CASES = [  # one of each way in which files hold linear layers, and of each kind of layer
    "bloom_alibi",
    "falcon_grouped",
    "falcon_multi_query",
    "gemma2_usual",
    "gemma3_text_usual",
    "gemma_untied",
    "gpt2_small",
    "gpt_neox_parallel",
    "gpt_oss_yarn",
    "granite_multipliers",
    "llama_biases",
    "llama_tied",
    "ministral_pattern",
    "mistral_window",
    "mixtral_top2",
    "olmo2_gqa",
    "olmo3_usual",
    "phi3_longrope",
    "qwen2_window",
    "qwen3_moe_dense_first",
    "qwen3_tied",
    "smollm3_list",
]


def tiny(case, dtype=torch.float32):
    config = read_config(HERE / "configs" / f"{case}.json")
    config.pop("_note", None)
    model = from_config(config, dtype=dtype, seed=3)
    shake(model, 0.1, seed=7)
    return model


@torch.no_grad()
def shake(model, size, *, seed, only=lambda name: True):
    """Adds noise to parameters, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if only(name):
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * size)


def adapted(case, lora=None, dtype=torch.float32):
    model = tiny(case, dtype)
    adapt(model, lora or LoRA(rank=3, alpha=5.0))
    shake(model, 0.1, seed=8, only=is_adapter)
    return model


def tokens_of(model, *shape, seed=5):
    return torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, *layout):
    with torch.no_grad():
        return model.lm_head(model(tokens, *layout))


def reload(model, folder):
    save_pretrained(model, folder)
    return from_pretrained(folder, dtype=model.norm.weight.dtype)


def loss_of(model, tokens, labels, *layout):
    return linear_cross_entropy(model(tokens, *layout), model.lm_head, labels)


@pytest.mark.parametrize("case", CASES)
def test_a_new_adapter_changes_nothing(case):
    model = tiny(case)
    tokens = tokens_of(model, 2, 33)
    before = logits_of(model, tokens)
    adapt(model, LoRA(rank=4))
    assert logits_of(model, tokens).equal(before)
    assert any(adapted_layers(model))


@pytest.mark.parametrize("case", CASES)
def test_an_export_has_the_adapters_merged_and_the_model_keeps_them_apart(case, tmp_path):
    model = adapted(case, dtype=torch.float64)
    tokens = tokens_of(model, 2, 33)
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = reload(model, tmp_path)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert not any(adapted_layers(merged))
    assert (logits_of(merged, tokens) - logits_of(model, tokens)).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_give_the_adapters_the_gradient_that_they_give_alone(case):
    model = adapted(case, dtype=torch.float64)
    documents = [tokens_of(model, 1, n, seed=n) for n in (13, 2, 21)]
    labels = [torch.cat([d[:, 1:], torch.full((1, 1), -100)], dim=1) for d in documents]
    for document, targets in zip(documents, labels):
        loss_of(model, document, targets).backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sizes = torch.tensor([d.shape[1] for d in documents])
    positions = torch.cat([torch.arange(n) for n in sizes])[None]
    ends = sizes.cumsum(0).repeat_interleave(sizes)[None]
    loss_of(model, torch.cat(documents, 1), torch.cat(labels, 1), positions, ends).backward()
    assert alone.keys() == {name for name, _ in model.named_parameters() if is_adapter(name)}
    for name, p in model.named_parameters():
        if is_adapter(name):
            assert (p.grad - alone[name]).abs().max() < 1e-10 * max(1.0, alone[name].abs().max()), name


@pytest.mark.parametrize("case", ["llama_biases", "phi3_longrope", "gpt2_small", "mixtral_top2"])
def test_gradients_are_those_of_the_product_in_the_merged_weight(case, tmp_path):
    model = adapted(case, dtype=torch.float64)
    merged = reload(model, tmp_path)
    tokens = tokens_of(model, 2, 19)
    for each in (model, merged):
        loss_of(each, tokens, tokens.roll(-1, 1)).backward()
    dense = dict(merged.named_parameters())
    for name, layer in adapted_layers(model):
        full = dense[f"{name}.weight"].grad
        assert torch.allclose(layer.lora_a.grad, layer.scale * layer.lora_b.T @ full, atol=1e-10), name
        assert torch.allclose(layer.lora_b.grad, layer.scale * full @ layer.lora_a.T, atol=1e-10), name


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_comes_back_onto_the_same_base(case, tmp_path):
    model = adapted(case, LoRA(rank=3, alpha=5.0, also_train=["norm"]), dtype=torch.float64)
    shake(model, 0.1, seed=9, only=lambda name: name == "norm.weight")
    save_adapter(model, tmp_path)
    fresh = tiny(case, torch.float64)
    load_adapter(fresh, tmp_path)
    tokens = tokens_of(model, 2, 33)
    assert (logits_of(fresh, tokens) - logits_of(model, tokens)).abs().max() < 1e-10
    save_adapter(fresh, tmp_path / "again")
    again = tiny(case, torch.float64)
    load_adapter(again, tmp_path / "again")
    assert (logits_of(again, tokens) - logits_of(model, tokens)).abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_the_adapter_and_says_the_same(case, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    # A part of what a module holds; and no gate beside experts, where PEFT 0.21 takes every `gate_proj` for theirs.
    targets = ["q_proj", "v_proj", "o_proj"] if case.startswith(("phi3", "bloom", "qwen3_moe")) else None
    model = tiny(case)
    save_pretrained(model, tmp_path / "base")
    adapt(model, LoRA(rank=3, alpha=5.0, targets=targets))
    shake(model, 0.1, seed=8, only=is_adapter)
    save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
    options = {"attn_implementation": "sdpa" if "falcon" in case else "eager", "experts_implementation": "eager"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    tokens = tokens_of(model, 2, 33)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert not expected.isclose(theirs.unload()(tokens).logits).all()
    assert (logits_of(model, tokens) - expected).abs().max() < 2e-4 * max(1.0, expected.abs().max())


@torch.no_grad()
def test_an_adapter_that_peft_made_is_read(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = tiny("phi3_plain")
    save_pretrained(base, tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["qkv_proj", "down_proj"],
        alpha_pattern={"down_proj": 9},
        rank_pattern={"down_proj": 2},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(theirs, config).eval()
    shake(theirs, 0.1, seed=4, only=lambda name: "lora" in name or "modules_to_save" in name)
    theirs.save_pretrained(tmp_path / "adapter")
    assert load_adapter(base, tmp_path / "adapter") == (3 + 1) * base.spec.num_layers
    tokens = tokens_of(base, 2, 33)
    assert (logits_of(base, tokens) - theirs(tokens).logits).abs().max() < 1e-4
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in base.named_parameters() if is_adapter(name)} | {"lm_head.weight"}


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
    config = read_config(HERE / "configs" / "llama_tied.json")
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
