"""A checkpoint that exists is whole, whatever happened while it was written."""

import errno
import json
import shutil

import pytest
import torch

from torchmask.errors import ConfigError, WeightsError
from torchmask.training import checkpoint
from torchmask.training.checkpoint import (
    find_checkpoints,
    load_rank_state,
    load_state,
    load_tensors,
    save_checkpoint,
    verify,
)
from torchmask.training.resume import _differences, check_belongs, choose_checkpoint
from torchmask.training.run import Run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out", torch.device("cpu"))


def _tensors(value=1.0):
    return {
        "model": {"a.weight": torch.full((3, 2), value), "b": torch.full((4,), value, dtype=torch.bfloat16)},
        "optim": {"a.weight.step": torch.tensor(7), "a.weight.exp_avg": torch.full((3, 2), 2 * value)},
    }


def _save(run, step, value=1.0, keep_last_n=None):
    return save_checkpoint(run, step, _tensors(value), {"facts": {"data": "x", "seed": 0}}, keep_last_n=keep_last_n)


def test_tensors_and_state_come_back_as_they_were(run):
    folder = _save(run, 5, value=0.1)
    verify(folder)
    assert load_state(folder)["step"] == 5
    into = _tensors(0.0)
    for part, named in into.items():
        load_tensors(run, folder, part, named)
        for name, tensor in named.items():
            assert tensor.equal(_tensors(0.1)[part][name]), name


def test_what_only_a_rank_knows_is_hashed_and_comes_back_to_it(run):
    folder = save_checkpoint(run, 5, _tensors(), {}, keep_last_n=None, rank_state={"window": 3, "taken": 7})
    verify(folder)
    assert load_rank_state(run, folder) == {"window": 3, "taken": 7}
    (folder / "data-rank00000.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"data-rank00000\.json"):
        verify(folder)


def test_what_another_number_of_ranks_saved_is_refused_with_their_number(run):
    folder = save_checkpoint(run, 5, _tensors(), {}, keep_last_n=None, rank_state={"window": 3})
    with pytest.raises(ConfigError, match="the places of 1 process in") as caught:
        load_rank_state(Run(run.output_dir, run.device, rank=1, world_size=2), folder)
    assert caught.value.id == "K08" and "--nproc-per-node 1" in caught.value.fix
    with pytest.raises(ConfigError, match="no place in a stream"):
        load_rank_state(run, _save(run, 6))


def test_nothing_in_a_checkpoint_is_a_pickle(run):
    suffixes = {p.suffix for p in _save(run, 1).rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}


def test_only_the_newest_are_kept(run):
    for step in (1, 2, 3, 4):
        _save(run, step, keep_last_n=2)
    assert [p.name for p in find_checkpoints(run.checkpoints_dir)] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_file_named(run, damage):
    folder = _save(run, 1)
    file = next((folder / "model").iterdir())
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(ValueError, match=f"damaged: model/{file.name}"):
        verify(folder)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_no_rubbish(run, monkeypatch):
    good = _save(run, 1)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError, match=r"No space left.*step-00000001 is whole") as caught:
        _save(run, 2)
    assert caught.value.exit_code == 7
    verify(good)
    assert [p.name for p in run.checkpoints_dir.iterdir()] == [good.name]


def test_a_full_disk_gets_a_second_try_after_old_checkpoints_are_deleted(run, monkeypatch):
    for step in (1, 2, 3):
        _save(run, step)
    real, calls = checkpoint.save_file, []

    def full_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full_once)
    verify(_save(run, 4, keep_last_n=2))
    assert [p.name for p in find_checkpoints(run.checkpoints_dir)] == ["step-00000003", "step-00000004"]


def test_what_an_interrupted_save_left_is_ignored_and_removed(run):
    folder = _save(run, 1)
    torn = run.checkpoints_dir / ".tmp-step-00000002"
    shutil.copytree(folder, torn)
    assert find_checkpoints(run.checkpoints_dir) == [folder]
    _save(run, 3)
    assert not torn.exists()


def test_resuming_passes_over_a_damaged_checkpoint_and_says_so(run):
    older, newer = _save(run, 1), _save(run, 2)
    (newer / "state.json").write_text("{}")
    said = []
    assert choose_checkpoint(run, True, said.append) == older
    assert "step-00000002" in said[0] and "state.json" in said[0]


def test_checkpoints_after_the_step_resumed_from_are_set_aside_and_new_ones_are_kept(run):
    for step in (1, 2, 3):
        _save(run, step)
    said = []
    chosen = choose_checkpoint(run, str(run.checkpoints_dir / "step-00000001"), said.append)
    assert chosen.name == "step-00000001" and "stale-step-00000003" in " ".join(said)
    _save(run, 2, value=5.0, keep_last_n=2)
    assert [p.name for p in find_checkpoints(run.checkpoints_dir)] == ["step-00000001", "step-00000002"]
    into = _tensors(0.0)["model"]
    load_tensors(run, run.checkpoints_dir / "step-00000002", "model", into)
    assert into["b"][0] == 5.0, "the checkpoint of the course that is not taken any more was kept instead"


def test_a_damaged_newest_checkpoint_does_not_outlive_the_good_ones_that_follow(run):
    for step in (1, 2):
        _save(run, step)
    (run.checkpoints_dir / "step-00000002/state.json").write_text("{}")
    choose_checkpoint(run, True, lambda _: None)
    for step in (2, 3):
        _save(run, step, keep_last_n=2)
    for folder in find_checkpoints(run.checkpoints_dir):
        verify(folder)
    assert [p.name for p in find_checkpoints(run.checkpoints_dir)] == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("manifest", ["[]", "{}", "{not json"])
def test_a_manifest_that_says_nothing_is_no_checkpoint(run, manifest):
    folder = _save(run, 1)
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="manifest"):
        verify(folder)


def test_resuming_stops_when_every_checkpoint_is_damaged_and_names_them(run):
    for step in (1, 2):
        (_save(run, step) / "state.json").unlink()
    with pytest.raises(ValueError, match=r"step-00000002.*step-00000001") as caught:
        choose_checkpoint(run, True, print)
    assert caught.value.exit_code == 4


def test_resuming_where_there_is_nothing_starts_fresh_and_says_so(run):
    said = []
    assert choose_checkpoint(run, True, said.append) is None
    assert "from the beginning" in said[0]


def test_resuming_from_a_path_that_is_no_checkpoint_lists_those_there(run):
    _save(run, 1)
    with pytest.raises(ValueError, match="step-00000001") as caught:
        choose_checkpoint(run, str(run.checkpoints_dir / "step-00000009"), print)
    assert caught.value.exit_code == 4


def test_changed_settings_are_shown_side_by_side(run):
    folder = _save(run, 1)
    with pytest.raises(ValueError, match=r"seed: the checkpoint has 0, this run 3") as caught:
        check_belongs(folder, {"data": "x", "seed": 3})
    assert caught.value.exit_code == 2


def test_changed_data_is_told_apart_from_changed_settings(run):
    folder = _save(run, 1)
    with pytest.raises(ValueError, match=r"data changed.*fingerprint x, now y") as caught:
        check_belongs(folder, {"data": "y", "seed": 0})
    assert caught.value.exit_code == 4


def test_a_tensor_that_is_not_there_is_named(run):
    folder = _save(run, 1)
    with pytest.raises(ValueError, match=r"Missing key.*c\.weight"):
        load_tensors(run, folder, "model", {"c.weight": torch.zeros(1)})


def test_the_manifest_names_every_file(run):
    folder = _save(run, 1)
    listed = set(json.loads((folder / "manifest.json").read_text()))
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert listed == there


def test_of_a_section_only_the_settings_that_differ_are_shown():
    before = {"max_seq_len": 128, "strategy": "best_fit", "inner": {"a": 1, "b": 2}}
    now = {**before, "strategy": "split", "inner": {"a": 1, "b": 3}, "extra": True}
    assert _differences("packing", before, now) == [
        ("packing.strategy", "best_fit", "split"),
        ("packing.inner.b", 2, 3),
        ("packing.extra", None, True),
    ]
    assert _differences("dtype", "fp32", "bf16") == [("dtype", "fp32", "bf16")]
