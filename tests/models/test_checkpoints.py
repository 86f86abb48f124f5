"""Checkpoints as they come: without prefixes, in another layout, damaged, or with numbers that are none."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_LLAMA

from torchmask.models import FAMILIES, from_config, from_pretrained, load_pretrained, read_config, save_pretrained


@pytest.fixture
def folder(tmp_path):
    save_pretrained(from_config(TINY_LLAMA, seed=3), tmp_path / "model")
    return tmp_path / "model"


def change(folder, **tensors):
    """Puts other tensors in place of some."""
    held = load_file(folder / "model.safetensors")
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({**held, **renamed}, folder / "model.safetensors")


def id_of(folder, **options):
    with pytest.raises(ValueError) as caught:
        from_pretrained(folder, **options)
    return caught.value


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_files_without_the_prefix_are_read(name, tmp_path):
    case = next(iter(sorted((Path(__file__).parent / "configs").glob(f"{name}_*.json"))))
    model = from_config(read_config(case), seed=2)
    save_pretrained(model, tmp_path)
    prefix = FAMILIES[name].optional_prefix
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(hub.startswith(prefix) for hub in tensors)
    save_file({hub.removeprefix(prefix): t for hub, t in tensors.items()}, tmp_path / "model.safetensors")
    again = from_pretrained(tmp_path)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_experts_in_the_layout_that_transformers_has_in_memory_are_read(name, prefix, tmp_path):
    transformers = pytest.importorskip("transformers")
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    config = {**TINY_LLAMA, **experts, "model_type": name, "num_key_value_heads": 2, "head_dim": 8}
    config.update({"mlp_only_layers": [0]} if name == "qwen3_moe" else {})
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), experts_implementation="eager"
    )
    state = {hub.removeprefix("model.") if not prefix else hub: t.clone() for hub, t in theirs.state_dict().items()}
    assert f"{prefix}layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, tokens = from_pretrained(tmp_path), torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")])
def test_numbers_that_are_none_are_told_with_tensor_and_count(folder, value, what):
    norm = torch.ones(16)
    norm[3:5] = value
    change(folder, model__norm__weight=norm)
    error = id_of(folder)
    assert error.id == "W08" and f"model.norm.weight: 2 {what}" in str(error)


def test_numbers_beyond_the_parameters_dtype_are_told_as_such(folder):
    change(folder, model__norm__weight=torch.full((16,), 1e30))
    error = id_of(folder, dtype="fp16")
    assert error.id == "W08" and "model.norm.weight: 16 too large for float16" in str(error) and "bf16" in str(error)
    assert from_pretrained(folder, dtype="bf16").norm.weight.isfinite().all()


def test_two_files_with_one_tensor_and_no_index_are_both_named(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(16)}, folder / "b.safetensors")
    error = id_of(folder)
    assert error.id == "W05" and "model.norm.weight is in a.safetensors and in b.safetensors" in str(error)


def test_an_index_says_which_of_two_tensors_counts(folder):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    save_file({"model.norm.weight": torch.full((16,), 5.0)}, folder / "a.safetensors")
    weight_map = {name: "a.safetensors" if name == "model.norm.weight" else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert from_pretrained(folder).norm.weight.eq(5.0).all()


@pytest.mark.parametrize(("change", "asked"), [({"num_hidden_layers": 99}, 99), ({"num_hidden_layers": 1}, 1)])
def test_another_number_of_layers_than_config_json_has_is_told(change, asked, folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    error = id_of(folder)
    assert error.id == "W05" and f"(the weights have 2 layers, config.json says {asked}):" in str(error)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "bloom", "gpt_neox"])
def test_layers_are_counted_in_the_names_of_every_kind_of_files(name, tmp_path):
    case = next(iter(sorted((Path(__file__).parent / "configs").glob(f"{name}_*.json"))))
    config = read_config(case)
    save_pretrained(from_config(config), tmp_path)
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    (tmp_path / "config.json").write_text(json.dumps({**config, key: 50}))
    assert f"the weights have {config[key]} layers, config.json says 50" in str(id_of(tmp_path))


def test_missing_tensors_of_the_right_number_of_layers_are_told_without_a_guess(folder):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "attention_bias": True}))
    assert "the weights have" not in str(id_of(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_its_folder_is_told_as_such(folder, name):
    model = from_config(folder)
    for load in (from_pretrained, lambda file: load_pretrained(model, file)):
        with pytest.raises(ValueError, match=rf"{name}: this is a file; a model is a folder") as caught:
            load(folder / name)
        assert caught.value.id == "W03" and str(caught.value).endswith(f"fix: name the folder that holds it, {folder}")


@pytest.mark.parametrize("header", [b"[1,2]", b'{"a":1}', b'{"a":{"data_offsets":3}}'])
def test_headers_that_describe_no_tensors_are_damage(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert id_of(folder).id == "W01"


def test_a_folder_in_place_of_a_file_is_told(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    error = id_of(folder)
    assert error.id == "W02" and "this is a folder" in str(error)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_cut_off_anywhere_is_damaged_and_not_hostile(folder, new_format):
    from torchmask.models.weight_files import load_pickle

    tensors = {f"layer.{i}": torch.ones(5) for i in range(4)}
    file = folder / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=new_format)
    whole = file.read_bytes()
    for length in range(1, len(whole), 7 if new_format else 3):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError) as caught:
            load_pickle(file)
        assert caught.value.id == "W01", (length, str(caught.value))


def test_a_mark_of_the_byte_order_in_config_json_is_no_fault(folder):
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    from_pretrained(folder)


def test_an_empty_index_lists_what_is_missing_by_its_name_on_the_hub(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "missing: model.embed_tokens.weight" in str(id_of(folder))


@pytest.mark.parametrize(
    ("options", "id", "what"),
    [
        ({"dtype": torch.int8}, "C09", r"torch\.int8"),
        ({"dtype": "int8"}, "C09", "'int8'"),
        ({"device": "foo"}, "C09", "'foo'"),
        ({"device": "xpu:7"}, "R14", "'xpu:7'"),
    ],
)
def test_dtypes_and_devices_that_there_are_not_are_told(folder, options, id, what):
    error = id_of(folder, **options)
    assert error.id == id and what.replace("\\", "") in str(error) and "fix: choose" in str(error)
