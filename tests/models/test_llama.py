"""The Llama family against transformers: logits alone and packed, loss, gradients, weights in and out."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchmask.models import from_config, from_pretrained, llama, load_pretrained, save_pretrained
from torchmask.models.weights import save_weights
from torchmask.modules import linear_cross_entropy

transformers = pytest.importorskip("transformers")

TINY = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
    "new_spelling": {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500_000.0}, "rope_theta": None},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16},
}


def _config(variant):
    config = {**TINY, **VARIANTS[variant]}
    return {k: v for k, v in config.items() if v is not None}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours, the folder both come from), every parameter random."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_config(request.param), attn_implementation="eager")
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(folder)
    # The reference keeps the old spelling out of its own files; ours must read what was asked for.
    (folder / "config.json").write_text(json.dumps(_config(request.param)))
    return theirs.eval(), from_pretrained(folder), folder


def _tokens(*shape):
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


def _fp32_rounding(theirs, tokens):
    """How far the reference itself is from its own fp64 twin on these tokens."""
    twin = copy.deepcopy(theirs).double()
    return (theirs(tokens).logits.double() - twin(tokens).logits).abs().max().item()


@torch.no_grad()
def test_logits_equal_transformers_to_fp32_rounding(pair):
    theirs, ours, _ = pair
    tokens = _tokens(2, 90)
    tolerance = 4 * _fp32_rounding(theirs, tokens) + 1e-7
    assert (ours.lm_head(ours(tokens)) - theirs(tokens).logits).abs().max().item() <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_packed_documents_get_the_logits_they_have_alone(pair, backend):
    theirs, ours, _ = pair
    documents = [_tokens(1, n) for n in (17, 1, 40, 23)]
    tokens = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    ends = torch.tensor([d.shape[1] for d in documents]).cumsum(0)
    until = torch.cat([torch.full((d.shape[1],), int(end)) for d, end in zip(documents, ends)])[None]
    alone = torch.cat([theirs(d).logits for d in documents], dim=1)
    tolerance = 4 * _fp32_rounding(theirs, tokens) + 1e-7
    ours.attention = backend
    packed = ours.lm_head(ours(tokens, positions, until))
    ours.attention = "auto"
    assert (packed - alone).abs().max().item() <= tolerance


def test_loss_and_every_gradient_equal_transformers(pair):
    theirs, ours, _ = pair
    layout = llama.FAMILY.layout(ours)
    tokens = _tokens(2, 31)
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    labels[0, :9] = -100
    reference, grads = {}, {}
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(theirs).to(dtype)
        loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
        reference[dtype], grads[dtype] = loss.item(), {n: p.grad for n, p in model.named_parameters()}
    ours.zero_grad()
    loss = linear_cross_entropy(ours(tokens), ours.lm_head, labels)
    loss.backward()
    rounding = abs(reference[torch.float32] - reference[torch.float64])
    assert loss.item() == pytest.approx(reference[torch.float64], abs=4 * rounding + 1e-3)
    for name, p in ours.named_parameters():
        exact = grads[torch.float64][layout[name][0].hub]
        rounding = (grads[torch.float32][layout[name][0].hub] - exact).abs().max()
        assert (p.grad - exact).abs().max() <= 4 * rounding + 1e-5, name


@torch.no_grad()
def test_fp64_stays_fp64_and_packing_is_exact_there(pair):
    _, ours, _ = pair
    model = copy.deepcopy(ours).double()
    documents = [_tokens(1, n) for n in (12, 30)]
    alone = torch.cat([model.lm_head(model(d)) for d in documents], dim=1)
    positions = torch.cat([torch.arange(12), torch.arange(30)])[None]
    until = torch.tensor([[12] * 12 + [42] * 30])
    packed = model.lm_head(model(torch.cat(documents, dim=1), positions, until))
    assert packed.dtype is torch.float64
    assert (packed - alone).abs().max().item() < 1e-12


def test_weights_are_written_back_bit_identical_and_transformers_loads_them(pair, tmp_path):
    theirs, ours, folder = pair
    save_pretrained(ours, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = _tokens(1, 40)
    with torch.no_grad():
        assert again(tokens).logits.equal(theirs(tokens).logits)


def test_sharded_files_load_like_a_single_one(pair, tmp_path):
    _, ours, folder = pair
    files = save_weights(tmp_path, load_file(folder / "model.safetensors").items(), max_shard_bytes=6_000)
    assert len(files) > 2 and files[-1] == "model.safetensors.index.json"
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(ours.named_parameters(), again.named_parameters()):
        assert a.equal(b), name


def test_written_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "new").touch()
    save_pretrained(from_config(TINY), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_tied_head_written_out_by_others_is_accepted(tmp_path):
    model = from_config(_config("tied"))
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    again = from_pretrained(tmp_path)
    assert again.lm_head.weight is again.embed_tokens.weight


def test_a_truncated_file_is_named_with_the_bytes_it_should_have(tmp_path):
    save_pretrained(from_config(TINY), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(
        ValueError, match=rf"model\.safetensors.*{len(whole) - 1000:,} bytes found.*asks for {len(whole):,}"
    ):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML page"),
    ],
)
def test_what_is_no_safetensors_file_is_told_apart(tmp_path, content, message):
    save_pretrained(from_config(TINY), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        from_pretrained(tmp_path)


def test_missing_weights_list_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ValueError, match=r"no model\.safetensors.*config\.json"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: the file is truncated or damaged"):
        from_pretrained(tmp_path)


def test_missing_shards_are_all_named(tmp_path):
    files = save_weights(tmp_path, ((f"t{i}", torch.zeros(100)) for i in range(4)), max_shard_bytes=500)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for name in files[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"{files[0]}, {files[1]}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{not json", "{}", '{"weight_map": []}', '{"weight_map": {"x": "a.safetensors"}}'])
def test_a_broken_index_is_named(tmp_path, content):
    save_pretrained(from_config(TINY), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"model_type": "llama"}', json.dumps({**TINY, "num_attention_heads": 0})])
def test_a_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        from_config(tmp_path)


def test_wrong_missing_and_unexpected_tensors_are_named_together(tmp_path):
    save_pretrained(from_config(TINY), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(31)
    tensors["model.layers.0.extra.weight"] = torch.zeros(1)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as caught:
        from_pretrained(tmp_path)
    text = str(caught.value)
    assert "model.norm.weight: the file has [31], the model [32]" in text
    assert "missing: lm_head.weight" in text and "unexpected: model.layers.0.extra.weight" in text


def test_an_unknown_family_lists_the_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "mamba"}))
    with pytest.raises(ValueError, match=r"'mamba'.*known: .*llama"):
        from_config(tmp_path)


def test_stories260k_gives_its_golden_logits(assets):
    folder = assets / "checkpoints/stories260k"
    golden = load_file(folder / "golden.safetensors")
    model = from_pretrained(folder)
    with torch.no_grad():
        logits = model.lm_head(model(golden["input_ids"].view(1, -1)))
    torch.testing.assert_close(logits.view_as(golden["logits"]), golden["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("builder", "parameters"),
    [
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
        ("llama3_8b", 8_030_261_248),
        ("llama3_1_70b", 70_553_706_496),
        ("llama3_1_405b", 405_853_388_800),
        ("llama3_2_1b", 1_235_814_400),
        ("llama3_2_3b", 3_212_749_824),
        ("llama3_3_70b", 70_553_706_496),
        ("code_llama_7b", 6_738_546_688),
        ("code_llama_34b", 33_743_970_304),
        ("tinyllama_1b", 1_100_048_384),
        ("smollm2_135m", 134_515_008),
        ("smollm2_360m", 361_821_120),
        ("smollm2_1_7b", 1_711_376_384),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(builder, parameters):
    import torchmask.models

    model = getattr(torchmask.models, builder)(device="meta")
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_dtype_may_be_named():
    import torchmask.models

    assert torchmask.models.llama3_2_1b(dtype="bf16", device="meta").norm.weight.dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"(?s)'bf61'.*bf16"):
        from_config(TINY, dtype="bf61")


def test_a_model_without_weights_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="meta device"):
        save_pretrained(from_config(TINY, device="meta"), tmp_path)


def test_loading_holds_about_one_model_in_memory(tmp_path):
    """Peak resident memory of a load in a fresh process, beyond the imports, stays near the size of the model."""
    import subprocess
    import sys

    config = {**TINY, "vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    save_pretrained(from_config(config), tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    code = (
        "import resource, sys; from torchmask.models import from_pretrained\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model = from_pretrained(sys.argv[1])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    largest = 60_000 * 512 * 4
    # The file is memory-mapped, and touched pages of the mapping count as resident while they stay in the page cache.
    assert int(out.stdout) < 2 * size + largest


def test_load_into_an_existing_model_casts_to_its_dtype(tmp_path):
    save_pretrained(from_config(TINY), tmp_path)
    model = from_config(TINY, dtype=torch.bfloat16, seed=9)
    load_pretrained(model, tmp_path)
    wanted = load_file(tmp_path / "model.safetensors")["model.norm.weight"].bfloat16()
    assert model.norm.weight.dtype is torch.bfloat16 and model.norm.weight.equal(wanted)
