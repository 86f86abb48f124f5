"""Mixtures of experts under FSDP2 and checkpointed layers, with two gloo processes (this file, started as a script)."""

import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from torchmask.models import from_config, from_pretrained, load_pretrained, read_config, save_pretrained
from torchmask.modules import linear_cross_entropy
from torchmask.training import checkpoint_activations

CONFIGS = Path(__file__).parent / "configs"
CASES = {
    "mixtral_top2": {"num_local_experts": 5},  # shards of unequal size
    "qwen3_moe_some_layers": {},
    "gpt_oss_yarn": {},
}


def config_of(case):
    config = {**read_config(CONFIGS / f"{case}.json"), **CASES[case]}
    config.pop("_note")
    return config


def tokens_of(rank):
    # The second rank's rows are one token over and over, so that most experts get nothing there.
    return torch.full((2, 19), 7) if rank else torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(3))


def backward(model, tokens):
    loss = linear_cross_entropy(model(tokens), model.lm_head, tokens.roll(-1, 1))
    loss.backward()
    return loss.detach()


def check_sharded(rank, case, folder):
    from torch.distributed.device_mesh import init_device_mesh

    from torchmask.training.distributed import materialise, shard

    source, out = folder / f"source-{rank}", folder / "exported"  # both ranks write out
    whole = from_config(config_of(case))
    save_pretrained_alone(whole, source)
    losses = [backward(whole, tokens_of(r)) for r in range(2)]

    model = from_config(config_of(case), device="meta")
    run = SimpleNamespace(mesh=init_device_mesh("cpu", (2,)), device=torch.device("cpu"))
    checkpoint_activations(model, True)
    shard(model, run)
    materialise(model, run)
    load_pretrained(model, source)
    loss = backward(model, tokens_of(rank))
    assert loss.item() == pytest.approx(losses[rank].item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert ours.full_tensor().equal(theirs), name
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    save_pretrained(model, out)
    dist.barrier()
    for (name, ours), theirs in zip(from_pretrained(out).named_parameters(), whole.parameters(), strict=True):
        assert ours.equal(theirs), name


def save_pretrained_alone(model, folder):
    """As one process would: exports are written by rank 0 alone."""
    from torchmask.models.conversions import hub_tensors
    from torchmask.models.folder import family_of
    from torchmask.models.weights import save_weights

    layout = family_of(model.hub_config).layout(model)
    save_weights(folder, hub_tensors(layout, dict(model.named_parameters())))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each check came to on each rank, from one pair of processes that makes all of them."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = [sys.executable, __file__, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        codes = [process.wait(timeout=180) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0]
    return {case: [(folder / f"{case}-{rank}.txt").read_text() for rank in range(2)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_sharded_and_checkpointed_experts_get_the_gradients_of_one_process_and_are_written_back(outcomes, case):
    assert outcomes[case] == ["passed", "passed"]


def main(folder, rank):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    for case in CASES:
        try:
            check_sharded(rank, case, folder / case)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        (folder / f"{case}-{rank}.txt").write_text(outcome)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
