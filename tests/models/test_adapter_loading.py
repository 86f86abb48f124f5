"""Adapter folders that are damaged, or of other models: an error of its kind that names the place."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchmask.errors import WeightsError
from torchmask.lora import LoRA
from torchmask.models import adapt, from_config, load_adapter, resize_embeddings, save_adapter, save_pretrained
from torchmask.models.weights import save_weights
from torchmask.modules.lora import adapted_layers

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture
def folder(tmp_path):
    """An adapter of the model."""
    model = from_config(CONFIG)
    adapt(model, LoRA(rank=2))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder, id):
    with pytest.raises(WeightsError) as caught:
        load_adapter(from_config(CONFIG), folder)
    assert caught.value.id == id and str(folder) in str(caught.value.where)
    return caught.value.message


def set_config(folder, **changes):
    """Changes keys of adapter_config.json; None takes one away."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def set_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": None}, "'peft_type' is missing"),
        ({"lora_alpha": None}, "'lora_alpha' is missing"),
        ({"lora_alpha": "much"}, "could not convert"),
        ({"lora_alpha": [1]}, "list"),
        ({"alpha_pattern": {"q_proj": "much"}}, "could not convert"),
        ({"alpha_pattern": {"(": 3}}, "unterminated"),
    ],
)
def test_a_configuration_that_describes_no_adapter_is_named(folder, changes, words):
    set_config(folder, **changes)
    assert words in refused(folder, "W05")


def test_a_configuration_that_is_no_json_is_named(folder):
    (folder / "adapter_config.json").write_text("{")
    assert "describes no adapter" in refused(folder, "W05")


@pytest.mark.parametrize("end", ["A", "B"])
def test_one_matrix_without_the_other_is_refused(folder, end):
    set_tensors(folder, lambda tensors: tensors.pop(f"{Q_PROJ}{end}.weight"))
    assert "model.layers.0.self_attn.q_proj" in refused(folder, "W05")


def test_a_file_without_tensors_is_refused(folder):
    set_tensors(folder, lambda tensors: tensors.clear())
    assert "it holds no tensor" in refused(folder, "W05")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_numbers_that_are_no_plain_floats_are_refused(folder, dtype):
    set_tensors(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    assert "lora_A.weight is stored as" in refused(folder, "W05")


def test_numbers_that_are_not_finite_are_counted(folder):
    def spoil(tensors):
        tensors[f"{Q_PROJ}A.weight"][0, :3] = torch.nan
        tensors[f"{Q_PROJ}B.weight"][0, 0] = torch.inf

    set_tensors(folder, spoil)
    message = refused(folder, "W08")
    assert "q_proj.lora_A.weight: 3 NaN" in message and "q_proj.lora_B.weight: 1 Inf" in message


def test_a_truncated_file_is_named(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    refused(folder, "W01")


def test_a_configuration_alone_is_no_adapter(folder):
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "W03")


def test_a_pickle_is_refused_with_what_to_do(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(WeightsError) as caught:
        load_adapter(from_config(CONFIG), folder)
    assert caught.value.id == "W06" and "save_pretrained" in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head.lora_A.weight", "model.embed_tokens.lora_embedding_A"])
def test_adapters_of_the_vocabulary_are_a_kind_of_their_own(folder, name):
    set_tensors(folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(2, 32)}))
    assert name in refused(folder, "W10")


def test_a_refused_adapter_leaves_the_model_as_it_was(folder):
    def spoil(tensors):
        tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(60, 32)
        tensors[f"{Q_PROJ}A.weight"][0, 0] = torch.nan

    set_tensors(folder, spoil)
    model = from_config(CONFIG)
    with pytest.raises(WeightsError):
        load_adapter(model, folder)
    assert model.spec.vocab_size == 50 and not any(adapted_layers(model))
    assert all(p.requires_grad for p in model.parameters())


def test_half_precision_is_read(folder):
    set_tensors(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert load_adapter(from_config(CONFIG), folder) == 7


def test_a_model_grows_by_the_tokens_that_its_adapter_was_trained_on(tmp_path):
    model = from_config(CONFIG)
    resize_embeddings(model, 53)
    adapt(model, LoRA(rank=2, also_train=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        model.embed_tokens.weight[50:] += 1.0
    save_adapter(model, tmp_path)
    loaded = from_config(CONFIG)
    load_adapter(loaded, tmp_path)
    assert loaded.spec.vocab_size == 53
    assert loaded.embed_tokens.weight.equal(model.embed_tokens.weight)
    assert loaded.lm_head.weight.equal(model.lm_head.weight)


def test_equal_adapters_are_equal_files(tmp_path):
    """Safetensors writes the names of its metadata in another order each time."""
    model = from_config(CONFIG)
    save_pretrained(model, tmp_path / "base")
    adapt(model, LoRA(rank=2))
    for i in range(8):
        save_adapter(model, tmp_path / str(i), base=tmp_path / "base")
    assert len({(tmp_path / str(i) / "adapter_model.safetensors").read_bytes() for i in range(8)}) == 1


def test_a_file_with_metadata_holds_what_was_saved(tmp_path):
    tensors = {"b": torch.arange(5.0), "ä": torch.ones(2, 3, dtype=torch.bfloat16)}
    save_weights(tmp_path, tensors.items(), metadata={"z": "last", "é": 'with "quotes" and \n'})
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys() and all(read[name].equal(tensor) for name, tensor in tensors.items())
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "first")
    save_weights(tmp_path, tensors.items(), metadata={"é": 'with "quotes" and \n', "z": "last"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "first").read_bytes()
