"""Folders that are written: over what is there, with heads of their own, and as transformers reads them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_LLAMA

from torchmask.models import export, from_config, from_pretrained, save_pretrained
from torchmask.models.weights import save_weights

SHARDED, SINGLE = 4000, 2**30


def save(model, folder, max_shard_bytes, monkeypatch):
    """`save_pretrained` with shards of a size."""
    monkeypatch.setattr(export, "save_weights", lambda *args: save_weights(*args, max_shard_bytes=max_shard_bytes))
    save_pretrained(model, folder)


def same(one, other):
    return all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("sizes", [(SHARDED, SINGLE), (SINGLE, SHARDED), (SHARDED, SHARDED), (SHARDED, 8000)])
def test_a_save_replaces_the_weights_of_the_one_before(tmp_path, monkeypatch, sizes):
    transformers = pytest.importorskip("transformers")
    before, after = (from_config(TINY_LLAMA, seed=seed) for seed in (1, 2))
    save(before, tmp_path, sizes[0], monkeypatch)
    save(after, tmp_path, sizes[1], monkeypatch)
    assert same(from_pretrained(tmp_path), after)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.lm_head.weight.equal(after.lm_head.weight)
    index = tmp_path / "model.safetensors.index.json"
    files = {"model.safetensors"} if sizes[1] == SINGLE else set(json.loads(index.read_text())["weight_map"].values())
    expected = files | {"config.json"} | ({index.name} if sizes[1] != SINGLE else set())
    assert {file.name for file in tmp_path.iterdir()} == expected


def test_a_sharded_model_is_saved_over_the_files_it_was_read_from(tmp_path, monkeypatch):
    save(from_config(TINY_LLAMA, seed=1), tmp_path, SHARDED, monkeypatch)
    model = from_pretrained(tmp_path)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    save(model, tmp_path, SHARDED, monkeypatch)
    assert same(from_pretrained(tmp_path), model)


def test_other_files_of_the_folder_stay(tmp_path):
    for name in ("pytorch_model.bin", "adapter_model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("kept")
    save_pretrained(from_config(TINY_LLAMA), tmp_path)
    for name in ("pytorch_model.bin", "adapter_model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_text() == "kept"


def while_any(left, act):
    """The act, as long as there is something left; then the process ends."""

    def step(*args, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return act(*args, **options)

    return step


@pytest.mark.parametrize("sizes", [(SHARDED, SINGLE), (SINGLE, SHARDED), (SHARDED, SHARDED), (SINGLE, SINGLE)])
def test_a_save_that_is_cut_off_anywhere_mixes_nothing_and_loses_nothing(tmp_path, monkeypatch, sizes):
    before, after = (from_config(TINY_LLAMA, seed=seed) for seed in (1, 2))
    outcomes = set()
    for last in range(40):
        folder = tmp_path / str(last)
        save(before, folder, sizes[0], monkeypatch)
        left = iter(range(last))
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "write_text"):
                patch.setattr(Path, name, while_any(left, getattr(Path, name)))
            try:
                save(after, folder, sizes[1], monkeypatch)
                break
            except KeyboardInterrupt:
                pass
        new = [load_file(file) for file in folder.glob(".*.new") if "json" not in file.name]
        try:
            model = from_pretrained(folder)
        except ValueError as error:
            assert error.id == "W03" and "a save was cut off here" in str(error)
            values = [tensor for tensors in new for tensor in tensors.values()]
            values += [t for file in folder.glob("model*.safetensors") for t in load_file(file).values()]
            assert all(any(p.equal(value) for value in values) for p in after.parameters())
            outcomes.add("told")
        else:
            assert same(model, before) or same(model, after)
            outcomes.add("before" if same(model, before) else "after")
    else:
        pytest.fail("more steps than were cut")
    assert {"before", "after"} <= outcomes
    assert ("told" in outcomes) == (sizes == (SHARDED, SHARDED))


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(ValueError, match=r"model: the model's folder cannot be made: there is a file") as caught:
        save_pretrained(from_config(TINY_LLAMA), tmp_path / "model")
    assert caught.value.id == "K05"
    assert (tmp_path / "model").read_text() == "a file"


def test_a_head_that_was_untied_is_saved_and_config_json_says_so(tmp_path):
    model = from_config({**TINY_LLAMA, "tie_word_embeddings": True}, seed=1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(41, 16))
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert from_pretrained(tmp_path).lm_head.weight.equal(model.lm_head.weight)


@pytest.fixture(params=["cpu", "meta"])
def two_heads(request, tmp_path):
    """A folder whose config.json ties what its files do not, and the device that a model is built on."""
    model = from_config({**TINY_LLAMA, "tie_word_embeddings": False}, seed=4)
    save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY_LLAMA, "tie_word_embeddings": True}))
    return tmp_path, model, request.param


def test_another_head_in_the_files_unties_the_model(two_heads, tmp_path_factory):
    folder, expected, device = two_heads
    model = from_pretrained(folder, device=device)
    assert not model.spec.tie_embeddings and model.hub_config["tie_word_embeddings"] is False
    if device == "cpu":
        assert model.lm_head.weight.equal(expected.lm_head.weight)
        copy = tmp_path_factory.mktemp("copy")
        save_pretrained(model, copy)
        assert same(from_pretrained(copy), expected)


def test_a_tied_model_does_not_take_files_with_another_head(two_heads):
    from torchmask.models import load_pretrained

    folder, _, _ = two_heads
    model = from_config(folder)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens(.|\n)*: false") as caught:
        load_pretrained(model, folder)
    assert caught.value.id == "W05"


def test_a_head_that_is_the_embedding_written_twice_stays_tied(tmp_path):
    config = {**TINY_LLAMA, "tie_word_embeddings": True}
    save_pretrained(from_config(config, seed=4), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embed_tokens.weight


WINDOW = {"rope_type": "default", "rope_theta": 100.0}
UNTRUNCATED = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "truncate": False}


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize(
    "ropes",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
        {"rope_parameters": {"full_attention": UNTRUNCATED, "sliding_attention": WINDOW}},
        {"rope_parameters": {"full_attention": {"type": "linear", "factor": 4.0}, "sliding_attention": WINDOW}},
    ],
)
def test_scalings_that_transformers_would_pass_over_are_exported_so_that_it_does_not(tmp_path, family, ropes):
    transformers = pytest.importorskip("transformers")
    types = ["full_attention", "sliding_attention"]
    config = {**TINY_LLAMA, **ropes, "model_type": family, "head_dim": 20, "layer_types": types, "pad_token_id": None}
    model = from_config({**config, "num_key_value_heads": 2, "max_position_embeddings": 128}, seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.lm_head(model(tokens)), rtol=1e-4, atol=1e-5)
    assert from_pretrained(tmp_path).spec == model.spec
