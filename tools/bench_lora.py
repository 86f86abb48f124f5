"""Times training steps with low-rank adapters beside steps of all weights, and counts the bytes that each holds.

    python tools/bench_lora.py [--rank 16] [--repeats 5] [--threads 2] [--slots 512]

One random model (8 layers, 512 wide, a vocabulary of 32,000), fp32, AdamW, one row of plain text, on the CPU. Both ways
take turns in one process; a time is the best of the repeats. Bytes are those of gradients and optimizer state, counted
tensor by tensor after a step, and of a checkpoint's tensors.
"""

import argparse
import copy
import time
from functools import partial

import torch

from torchmask.lora import LoRA
from torchmask.models import adapt
from torchmask.models.family import build_model
from torchmask.models.llama import FAMILY
from torchmask.modules import Decoder, DecoderSpec, linear_cross_entropy
from torchmask.training import Optimizer, build_optimizer, model_tensors

SPEC = DecoderSpec(
    vocab_size=32_000,
    embed_dim=512,
    intermediate_dim=1408,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    max_seq_len=4096,
)


def step(model: Decoder, optimizer: Optimizer, tokens: torch.Tensor) -> float:
    """Seconds of one step; gradients stay, so that they can be counted."""
    start = time.perf_counter()
    optimizer.zero_grad()
    loss = linear_cross_entropy(model(tokens), model.lm_head, tokens.roll(-1, 1)) / tokens.numel()
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def num_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rank", 16), ("repeats", 5), ("threads", 2), ("slots", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = torch.randint(0, SPEC.vocab_size, (1, args.slots), generator=torch.Generator().manual_seed(0))

    full = build_model(FAMILY, SPEC, dtype="fp32", device="cpu")
    lora = copy.deepcopy(full)
    adapt(lora, LoRA(rank=args.rank))
    ways = {"all weights": full, "adapters": lora}
    optimizers = {name: build_optimizer(model, partial(torch.optim.AdamW, lr=1e-4)) for name, model in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats + 1):
        for name, model in ways.items():
            times[name].append(step(model, optimizers[name], tokens))
    facts = {}
    for name, model in ways.items():
        facts[name] = {
            "seconds a step": min(times[name][1:]),
            "MiB of gradients": num_bytes(p.grad for p in model.parameters()) / 2**20,
            "MiB of optimizer state": num_bytes(optimizers[name].state_dict().values()) / 2**20,
            "MiB of a checkpoint's weights": num_bytes(model_tensors(model).values()) / 2**20,
        }
    print(f"torch {torch.__version__}, {args.threads} threads, {args.slots} slots, rank {args.rank}")
    for fact in facts["adapters"]:
        whole, part = (facts[name][fact] for name in ways)
        print(f"{fact:32} all weights {whole:9.3f}  adapters {part:9.3f}  ratio {part / whole:.3f}")


if __name__ == "__main__":
    main()
