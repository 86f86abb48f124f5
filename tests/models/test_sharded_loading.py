"""Weights into and out of FSDP2's shards, with two gloo processes (this file, started as a script).

Each rank must read exactly as many numbers as it holds, whatever the layout in the file.
"""

import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

LLAMA = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 18,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


class Counted:
    """Counts the numbers that are read from files."""

    def __enter__(self):
        from torchmask.models.weight_files import PlainTensor

        self.kind, self.read, self.sizes = PlainTensor, PlainTensor.read, []

        def read(tensor, index):
            block = self.read(tensor, index)
            self.sizes.append(block.numel())
            return block

        PlainTensor.read = read
        return self

    def __exit__(self, *_):
        self.kind.read = self.read


def check_layouts(rank, folder, sharded):
    from test_conversions import CASES, Bag, layout_of, load

    from torchmask.models.conversions import hub_tensors

    for case, (hub, ours, table) in CASES.items():
        place = folder / f"{case}-{rank}"
        place.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in hub.items()}, place / "model.safetensors")
        model = sharded(Bag({name: tensor.shape for name, tensor in ours.items()}))
        with Counted() as counted:
            loaded = load(model, place, table)
        held = [parameter.to_local().numel() for parameter in loaded.values()]
        assert sum(counted.sizes) == sum(held) < sum(tensor.numel() for tensor in ours.values()), case
        for name, parameter in loaded.items():
            assert parameter.full_tensor().equal(ours[name]), (case, name)
        back = dict(hub_tensors(layout_of(ours, table), loaded, device="meta" if rank else "cpu"))
        assert back.keys() == hub.keys(), case
        for name, tensor in back.items():
            assert tensor.is_meta or tensor.equal(hub[name]), (case, name)


def by_rows(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def by_last_dimension(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shards = distribute_tensor(parameter.detach(), mesh, [Shard(parameter.ndim - 1)])
            module.register_parameter(name, nn.Parameter(shards))
    return model


def check_decoder(rank, folder):
    from torch.distributed.fsdp import fully_shard

    from torchmask.models import from_config, load_pretrained, save_pretrained

    whole = from_config(LLAMA)
    source = folder / f"source-{rank}"
    source.mkdir(parents=True)
    from torchmask.models.conversions import hub_tensors
    from torchmask.models.llama import FAMILY

    written = dict(hub_tensors(FAMILY.layout(whole), dict(whole.named_parameters())))
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, source / "model.safetensors")
    model = from_config(LLAMA, device="meta")
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False)
    model.to_empty(device="cpu")
    with Counted() as counted:
        load_pretrained(model, source)
    held = [parameter.to_local().numel() for parameter in model.parameters()]
    assert sum(counted.sizes) == sum(held)
    assert max(counted.sizes) <= max(held)
    for ours, theirs in zip(model.parameters(), whole.parameters()):
        assert ours.full_tensor().equal(theirs)
    out = folder.parent / "exported"  # which both ranks share
    save_pretrained(model, out)
    dist.barrier()
    again = load_file(out / "model.safetensors")
    assert again.keys() == written.keys() and all(again[name].equal(written[name]) for name in written)


def check_packed(rank, folder):
    from test_conversions import Bag, load

    from torchmask.models.conversions import Split
    from torchmask.models.mxfp4 import dequantise

    folder = folder / str(rank)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (5, 12, 1, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (5, 12, 1), dtype=torch.uint8, generator=generator)
    save_file({"w_blocks": blocks, "w_scales": scales}, folder / "model.safetensors")
    table = (Split("w", ("gate", "up"), groups=lambda spec: 6, dim=1, transposed=True),)
    with Counted() as counted:
        loaded = load(by_rows(Bag({"gate": (5, 6, 32), "up": (5, 6, 32)})), folder, table)
    whole = dequantise(blocks, scales)
    assert loaded["gate"].full_tensor().equal(whole[:, 0::2].float())
    assert loaded["up"].full_tensor().equal(whole[:, 1::2].float())
    experts = 3 - rank  # of 5
    assert sum(counted.sizes) == experts * (12 * 16 + 12)


CHECKS = {
    "rows": lambda rank, folder: check_layouts(rank, folder, by_rows),
    "last_dimension": lambda rank, folder: check_layouts(rank, folder, by_last_dimension),
    "decoder": check_decoder,
    "packed": check_packed,
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


@pytest.mark.parametrize("dimension", ["rows", "last_dimension"])
def test_every_layout_is_read_by_its_shards_alone_and_written_back(outcomes, dimension):
    assert outcomes[dimension] == ["passed", "passed"]


def test_a_sharded_decoder_reads_what_it_holds_and_is_exported_whole(outcomes):
    assert outcomes["decoder"] == ["passed", "passed"]


def test_of_packed_experts_each_rank_reads_its_own(outcomes):
    assert outcomes["packed"] == ["passed", "passed"]


def main(folder, rank):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    for check, function in CHECKS.items():
        try:
            function(rank, Path(folder, check))
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        Path(folder, f"{check}-{rank}.txt").write_text(outcome)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
