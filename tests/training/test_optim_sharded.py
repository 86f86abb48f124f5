"""The optimizer over FSDP2's DTensors, with two gloo processes (this file, started as a script)."""

import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from torchmask.training.muon import MuonAdamW
from torchmask.training.optim import build_optimizer


def tiny_model(seed=0):
    torch.manual_seed(seed)
    # 11 rows over 2 ranks: shards of unequal size, and a bias of 11.
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)).to(torch.bfloat16)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def muon(groups):
    return MuonAdamW(groups, lr=1e-2, weight_decay=0.1)


def train(model, optimizer, *, first, num_steps):
    losses = []
    for step in range(first, first + num_steps):
        tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), (tokens * 3 % 11).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_sharded_training(rank, folder, bf16_updates, make=adamw, moment="0.weight.exp_avg"):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def sharded(seed):
        model = fully_shard(tiny_model(seed))
        return model, build_optimizer(model, make, bf16_updates=bf16_updates)

    # Every rank sees the same rows, so the averaged gradient is that of one process.
    whole = tiny_model()
    alone = train(whole, build_optimizer(whole, make, bf16_updates=bf16_updates), first=0, num_steps=8)
    unbroken, optimizer = sharded(0)
    expected = train(unbroken, optimizer, first=0, num_steps=8)
    if bf16_updates == "master_weights":
        # Rounding of the reduced bf16 gradients only; other noise is drawn for other shards.
        assert expected == pytest.approx(alone, abs=2e-3)
    state = optimizer.state_dict()
    assert isinstance(state[moment], DTensor)
    assert state[moment].dtype == torch.float32

    stopped, first = sharded(0)
    losses = train(stopped, first, first=0, num_steps=3)
    dcp.save(first.state_dict(), storage_writer=HuggingFaceStorageWriter(f"{folder}/optim", save_distributed=True))
    weights = {name: value.clone() for name, value in stopped.state_dict().items()}

    resumed, second = sharded(7)
    resumed.load_state_dict(weights)
    template = second.state_dict()
    dcp.load(template, storage_reader=HuggingFaceStorageReader(f"{folder}/optim"))
    second.load_state_dict(template)
    assert losses + train(resumed, second, first=3, num_steps=5) == expected
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters()):
        assert torch.equal(ours.to_local(), theirs.to_local())


def check_replicas(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(16, 16, bias=False)
    weight = torch.ones(16, 16, dtype=torch.bfloat16)
    model.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
    optimizer = build_optimizer(model, adamw, bf16_updates="stochastic_rounding")
    torch.manual_seed(rank)  # ranks' random streams differ, as they do for dropout
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    mine = model.weight.detach().to_local().float()
    total = mine.clone()
    dist.all_reduce(total)
    assert mine.unique().numel() > 1
    assert torch.equal(total, 2 * mine)


CHECKS = {
    "master_weights": lambda rank, folder: check_sharded_training(rank, folder, "master_weights"),
    "stochastic_rounding": lambda rank, folder: check_sharded_training(rank, folder, "stochastic_rounding"),
    "muon": lambda *a: check_sharded_training(*a, "master_weights", make=muon, moment="1.weight.momentum_buffer"),
    "replicas": check_replicas,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check came to on each rank, from one pair of processes that makes all of them."""
    folder = tmp_path_factory.mktemp("two_ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        codes = [process.wait(timeout=180) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0]
    return {check: [(folder / f"{check}-{rank}.txt").read_text() for rank in range(2)] for check in CHECKS}


@pytest.mark.parametrize("bf16_updates", ["master_weights", "stochastic_rounding", "muon"])
def test_sharded_bf16_training_resumes_bit_equal_through_dcp(outcomes, bf16_updates):
    assert outcomes[bf16_updates] == ["passed", "passed"]


def test_replicas_of_a_weight_round_alike(outcomes):
    assert outcomes["replicas"] == ["passed", "passed"]


def main(folder, rank):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    for check, function in CHECKS.items():
        try:
            function(rank, f"{folder}/{check}")
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check}-{rank}.txt").write_text(outcome)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
