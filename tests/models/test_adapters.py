"""Adapters on every family: they start as nothing, train as the dense sum would, and leave as PEFT reads them."""

import pytest
import torch
from tiny_models import adapted, logits_of, loss_of, reload, shake, tiny, tokens_of

from torchmask.lora import LoRA
from torchmask.models import adapt, load_adapter, save_adapter, save_pretrained
from torchmask.modules.lora import adapted_layers, is_adapter

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
    "ministral3_growth",
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
    model = tiny(case)
    save_pretrained(model, tmp_path / "base")
    # A part of what a module holds; and no gate beside experts, where PEFT 0.21 takes every `gate_proj` for theirs.
    targets = ["q_proj", "v_proj", "o_proj"] if case.startswith(("phi3", "bloom", "qwen3_moe")) else None
    tables = ["embed_tokens"] if model.spec.tie_embeddings else ["embed_tokens", "lm_head"]
    adapt(model, LoRA(rank=3, alpha=5.0, targets=targets, also_train=[*tables, "norm"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    shake(model, 0.1, seed=8, only=lambda name: name in trained)
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
