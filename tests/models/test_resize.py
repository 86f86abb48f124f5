"""Vocabularies of another size: rows kept, made and cut, in memory and while weights are read.

As a script this file is one of two gloo processes that read a folder into a resized, sharded model.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchmask.errors import ConfigError, WeightsError
from torchmask.models import from_config, from_pretrained, load_pretrained, resize_embeddings, save_pretrained

CONFIGS = Path(__file__).parent / "configs"
TIED, UNTIED = "llama_tied", "llama_gqa"
CASES = [TIED, UNTIED, "gpt2_small", "gpt_neox_parallel", "gemma2_usual", "falcon_grouped", "phi3_plain", "bloom_alibi"]


def model_of(case, **options):
    config = json.loads((CONFIGS / f"{case}.json").read_text())
    config.pop("_note", None)
    return from_config(config, **options)


def tables(model):
    return [model.embed_tokens.weight, model.lm_head.weight]


@pytest.mark.parametrize("case", CASES)
def test_old_rows_are_kept_and_new_ones_are_their_mean(case):
    model, old = model_of(case), model_of(case)
    size = old.spec.vocab_size
    assert resize_embeddings(model, size + 3) == size + 3
    for table, before in zip(tables(model), tables(old), strict=True):
        assert table.shape == (size + 3, before.shape[1]) and table[:size].equal(before)
        mean = before.double().mean(0).to(before.dtype)
        assert all(row.equal(mean) for row in table[size:])
    assert model.spec.vocab_size == model.hub_config["vocab_size"] == size + 3
    assert (model.lm_head.weight is model.embed_tokens.weight) == old.spec.tie_embeddings
    tokens = torch.tensor([[size + 2, 1, 5]])
    logits = model.lm_head(model(tokens))
    assert logits.shape == (1, 3, size + 3) and logits.isfinite().all()
    expected = old.lm_head(old(tokens.clamp(max=size - 1)[:, 1:]))
    torch.testing.assert_close(model.lm_head(model(tokens[:, 1:]))[..., :size], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_resized_model_is_saved_reloaded_and_read_by_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = model_of(case)
    resize_embeddings(model, model.spec.vocab_size + 2, multiple_of=8)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    for (name, parameter), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert parameter.equal(other), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="sdpa" if "falcon" in case else "eager"
    )
    assert theirs.get_input_embeddings().weight.shape[0] == model.spec.vocab_size
    tokens = torch.tensor([[model.spec.vocab_size - 1, 3, 7, 1]])
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(model(tokens)), theirs(tokens).logits, rtol=2e-4, atol=2e-5)


def test_a_new_token_can_be_learnt_and_changes_no_old_logit():
    model = model_of(TIED)
    resize_embeddings(model, model.spec.vocab_size + 1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.lm_head(model(torch.tensor([[97]]))).sum().backward()
    assert model.embed_tokens.weight.grad[97].any()


def test_noise_tells_new_rows_apart_and_is_always_the_same():
    first, second = model_of(UNTIED), model_of(UNTIED)
    for model in (first, second):
        resize_embeddings(model, 101, init="noise")
    rows = first.embed_tokens.weight[97:]
    assert rows.equal(second.embed_tokens.weight[97:]) and not rows[0].equal(rows[1])
    old = first.embed_tokens.weight[:97]
    assert (rows - old.mean(0)).std() < 0.05 * old.std()


def test_the_size_is_rounded_up_to_a_multiple():
    model = model_of(UNTIED)
    assert resize_embeddings(model, 98, multiple_of=64) == 128 == model.lm_head.out_features
    assert resize_embeddings(model, 100, multiple_of=64) == 128  # as it is
    assert model.embed_tokens.num_embeddings == 128


def test_rows_behind_the_trained_ones_are_made_anew_on_request():
    model = model_of(UNTIED)
    model.embed_tokens.weight.data[90:] = 1e6
    resize_embeddings(model, 97, num_trained=90)
    weight = model.embed_tokens.weight
    torch.testing.assert_close(weight[90:], weight[:90].mean(0).expand(7, -1))
    assert resize_embeddings(model, 97) == 97


@pytest.mark.parametrize("padding", [0.0, 0.25])
def test_padding_is_cut_off(padding):
    model = model_of(UNTIED)
    for table in tables(model):
        table.data[90:] = padding
    assert resize_embeddings(model, 90) == 90 == model.embed_tokens.weight.shape[0]


@pytest.mark.parametrize(("case", "size"), [(TIED, 90), (UNTIED, 96)])
def test_rows_that_hold_something_are_not_cut_off(case, size):
    model = model_of(case)
    with pytest.raises(ConfigError, match=f"vocab_size {size} would cut {97 - size} of 97 rows") as raised:
        resize_embeddings(model, size)
    assert raised.value.id == "C09" and model.embed_tokens.weight.shape[0] == 97


@pytest.mark.parametrize(
    ("arguments", "id"),
    [
        ({"vocab_size": 0}, "C13"),
        ({"vocab_size": 98, "multiple_of": 0}, "C13"),
        ({"vocab_size": 98, "num_trained": 98}, "C13"),
        ({"vocab_size": 98, "init": "median"}, "C09"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, id):
    with pytest.raises(ConfigError) as raised:
        resize_embeddings(model_of(TIED), **arguments)
    assert raised.value.id == id


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("init", ["mean", "noise"])
def test_weights_read_into_a_resized_model_are_those_of_one_resized_in_memory(case, init, tmp_path):
    original = model_of(case, seed=3)
    save_pretrained(original, tmp_path)
    resize_embeddings(original, 120, init=init)
    model = model_of(case, device="meta")
    resize_embeddings(model, 100, init=init)
    resize_embeddings(model, 120, init=init)
    model.to_empty(device="cpu").tie_weights()
    load_pretrained(model, tmp_path)
    for (name, parameter), (_, other) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-8, msg=name)
    save_pretrained(model, tmp_path / "resized")
    load_pretrained(model, tmp_path / "resized")  # as any model: nothing is new in it


def test_gpt2s_older_names_are_found_too(tmp_path):
    original = model_of("gpt2_small")
    save_pretrained(original, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(stripped, tmp_path / "model.safetensors")
    model = model_of("gpt2_small", device="meta")
    resize_embeddings(model, 99)
    model.to_empty(device="cpu").tie_weights()
    load_pretrained(model, tmp_path)
    assert model.embed_tokens.weight[:97].equal(original.embed_tokens.weight)


def test_a_model_that_was_not_resized_still_refuses_weights_of_another_size(tmp_path):
    save_pretrained(model_of(TIED), tmp_path)
    other = model_of(TIED)
    resize_embeddings(other, 98)  # in memory: it has all its rows
    with pytest.raises(WeightsError, match=r"the file has \[97, 32\], the model \[98, 32\]"):
        load_pretrained(other, tmp_path)


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    save_pretrained(model_of(UNTIED, seed=5), folder / "hub")
    processes = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


def test_a_sharded_model_reads_its_part_of_old_and_new_rows(sharded_runs):
    expected = model_of(UNTIED, seed=5)
    resize_embeddings(expected, 103, init="noise")
    for table, other in zip(tables(from_pretrained(sharded_runs / "out")), tables(expected), strict=True):
        torch.testing.assert_close(table, other, rtol=1e-6, atol=1e-8)


def check_sharded(folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(str(folder / "store"), 2)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = model_of(UNTIED, device="meta")
    resize_embeddings(model, 103, init="noise")
    fully_shard(model)
    model.to_empty(device="cpu")
    load_pretrained(model, folder / "hub")
    with pytest.raises(ConfigError, match="a sharded model cannot be resized"):
        resize_embeddings(model, 110)
    save_pretrained(model, folder / "out")
    dist.destroy_process_group()


if __name__ == "__main__":
    check_sharded(Path(sys.argv[1]))
