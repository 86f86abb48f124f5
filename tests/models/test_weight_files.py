"""Pickled weights, and what is refused."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_LLAMA

from torchmask.models import from_config, from_pretrained, save_pretrained
from torchmask.models.weight_files import open_folder


class Hostile:
    """Makes a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama in Hugging Face layout."""
    save_pretrained(from_config(TINY_LLAMA, seed=3), tmp_path / "model")
    return tmp_path / "model"


def pickle_instead(folder, files=1, **options):
    """Replaces the safetensors by pickled shards; returns the tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return tensors
    weight_map = {name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file, **options)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_weights_are_read(folder, files, new_format):
    expected = from_pretrained(folder).state_dict()
    pickle_instead(folder, files, _use_new_zipfile_serialization=new_format)
    loaded = from_pretrained(folder).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())


def test_safetensors_are_read_where_both_are(folder):
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert {tensor.file.name for tensor in open_folder(folder).values()} == {"model.safetensors"}
    from_pretrained(folder)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_hostile_pickle_is_refused_and_does_not_run(folder, tmp_path, new_format):
    canary = tmp_path / "canary"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {**tensors, "extra": Hostile(canary)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(
        ValueError, match=r"(?s)pytorch_model\.bin.*pickled weights.*GLOBAL posix\.system.*safetensors"
    ) as caught:
        from_pretrained(folder)
    assert caught.value.id == "W06"
    assert not canary.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # it would have worked
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "id"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "W02"),
        (b"<html>", "W02"),
        (b"", "W01"),
        (b"PK\x03\x04 cut off", "W01"),
        (b"\x80\x02junk", "W01"),
        (pickle.dumps(print, 2), "W06"),
    ],
)
def test_what_is_no_pickle_of_tensors_is_told_apart(folder, content, id):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: ") as caught:
        from_pretrained(folder)
    assert caught.value.id == id


@pytest.mark.parametrize("content", [{"model": {"w": torch.ones(1)}, "epoch": 3}, [torch.ones(1)]])
def test_a_training_checkpoint_is_not_taken_for_weights(folder, content):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be named tensors; this has (keys model, epoch|list)"):
        from_pretrained(folder)


def test_a_pickle_that_was_cut_off_is_told_as_such(folder):
    pickle_instead(folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[:-500])
    with pytest.raises(ValueError, match=rf"truncated or damaged: {len(whole) - 500:,} bytes found") as caught:
        from_pretrained(folder)
    assert caught.value.id == "W01"


def test_a_missing_pickled_shard_is_named(folder):
    pickle_instead(folder, files=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ValueError, match=r"bin\.index\.json are missing: pytorch_model-00002-of-00003\.bin"):
        from_pretrained(folder)


def test_a_pickle_by_another_name_is_pointed_out(folder):
    (folder / "model.safetensors").rename(folder / "weights.pt")
    with pytest.raises(ValueError, match=r"only pickled weights here \(weights\.pt\)"):
        from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_tensors_are_refused_by_their_dtype(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 weights are quantised, such as {name} \((F8_E4M3|I8)\)") as caught:
        from_pretrained(folder)
    assert caught.value.id == "W11"
