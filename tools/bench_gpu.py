"""Training speed and memory of packed rows on one GPU, as Markdown for docs/benchmarks.md.

    python tools/bench_gpu.py                    a random model of Llama 3.2 1B's shape, bf16, 8,192 slots
    python tools/bench_gpu.py --device cpu       the same code on a tiny model, always sdpa, to see that it runs

Lognormal document lengths (median 300), every second half trained. Each line is one way to feed the same documents; the
ratio is to the first: padded batches with plain causal attention, as trainers without packing do it.
"""

import argparse
import time

import numpy as np
import torch

from torchmask.data import PackedDataset, Sample, collate
from torchmask.models import llama3_2_1b
from torchmask.models.family import build_model
from torchmask.models.llama import FAMILY
from torchmask.modules import DecoderSpec, linear_cross_entropy
from torchmask.training import build_optimizer, compile_layers, peak_memory_gib

WAYS = {  # name: (strategy, attention, compile)
    "padded rows, sdpa": ("none", "sdpa", False),
    "packed, flex": ("best_fit", "flex", False),
    "packed, varlen": ("best_fit", "varlen", False),
    "packed, flex, compiled layers": ("best_fit", "flex", True),
    "packed, varlen, compiled layers": ("best_fit", "varlen", True),
}


def documents(vocab_size, count, longest):
    rng = np.random.default_rng(0)
    for length in np.clip(rng.lognormal(5.7, 0.9, count).astype(int), 8, longest):
        tokens = rng.integers(0, vocab_size, length)
        yield Sample(tokens, np.arange(length) < length // 2)


def batches(packs, slots_per_step):
    """Rows in order of length, so that padding is as little as sorting can make it."""
    rows: list[int] = []
    for i in np.argsort(packs.row_lengths, kind="stable").tolist():
        if rows and (len(rows) + 1) * int(packs.row_lengths[i]) > slots_per_step:
            yield collate([packs[j] for j in rows])
            rows = []
        rows.append(i)
    yield collate([packs[j] for j in rows])


def measure(way, args, samples):
    strategy, attention, compiled = WAYS[way]
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        model = llama3_2_1b(dtype=torch.bfloat16, device="cuda")
    else:
        spec = DecoderSpec(1000, 64, 128, 2, 4, 2, 16, 512)
        model = build_model(FAMILY, spec, dtype=torch.float32, device="cpu")
        attention, compiled = "sdpa", False
    model.attention = attention
    compile_layers(model, compiled)
    optimizer = build_optimizer(
        model, lambda groups: torch.optim.AdamW(groups, lr=1e-5), bf16_updates="stochastic_rounding"
    )
    packs = PackedDataset(samples, max_seq_len=args.slots, strategy=strategy)
    tokens, seconds = 0, 0.0
    for i, batch in enumerate(batches(packs, args.slots)):
        if i == args.warmup + args.steps:
            break
        batch = batch.to(args.device)
        began = time.perf_counter()
        hidden = model(batch.tokens, batch.positions, batch.visible_until if strategy != "none" else None)
        loss = linear_cross_entropy(hidden, model.lm_head, batch.labels) / max(batch.num_targets, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        if i >= args.warmup:
            tokens, seconds = tokens + batch.num_tokens, seconds + time.perf_counter() - began
    return tokens / seconds, peak_memory_gib(args.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--slots", type=int, default=None, help="slots of a row and of a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=5)
    args = parser.parse_args()
    args.slots = args.slots or (8192 if args.device == "cuda" else 512)
    on_cuda = args.device == "cuda"
    samples = list(documents(128_256 if on_cuda else 1000, 1500 if on_cuda else 120, args.slots))
    name = torch.cuda.get_device_name() if on_cuda else "cpu"
    print(f"{name}, torch {torch.__version__}, {args.slots} slots a step\n")
    if not on_cuda:
        print("A tiny model on the CPU, every line with sdpa and not compiled: these figures compare nothing.\n")
    print("| fed as | tokens/s (no padding) | ratio | peak GiB |\n|---|---|---|---|")
    first = None
    for way in WAYS:
        rate, peak = measure(way, args, samples)
        first = first or rate
        print(f"| {way} | {rate:,.0f} | {rate / first:.2f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
