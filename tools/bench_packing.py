"""Times the pack plan, the rows written in order, a row's fetch and the block mask, beside a packer of the plain kind.

    .venv/bin/python tools/bench_packing.py [--documents 1000000] [--capacity 4096]

Lengths are lognormal (median 400, sigma 1), as those of instruction data are. The baseline is first fit in data order,
one document at a time over the last 64 open rows; it is timed on a part of the documents and scaled, since its time is
proportional to their number. What runs in one thread is measured in seconds of that thread, the best of a few calls,
so that others who compute on the machine change little; what is written to the disk, in seconds of the clock.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from torchmask.data import PackedDataset, Samples, plan_packs
from torchmask.data.plan import STRATEGIES


def naive_packer(lengths, capacity, window=64):
    """The fill of a packer that takes one document after the other."""
    rows, room = [], []
    for i, length in enumerate(lengths):
        first = max(0, len(rows) - window)
        for row in range(first, len(rows)):
            if room[row] >= length:
                rows[row].append(i)
                room[row] -= length
                break
        else:
            rows.append([i])
            room.append(capacity - length)
    return sum(lengths) / (len(rows) * capacity)


def timed(function, *args, times=1, clock=time.perf_counter):
    """The result and the seconds of the fastest of so many calls."""
    best = float("inf")
    for _ in range(times):
        start = clock()
        result = function(*args)
        best = min(best, clock() - start)
    return result, best


own_time = time.thread_time


def store(lengths, rng, *, prompt=0.0):
    """Samples of these lengths, of each of which the first token and this share are a masked prompt."""
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    sizes = np.maximum((prompt * lengths).astype(np.int64), 1)
    mask = np.repeat(np.tile(np.array([1, 0], np.uint8), len(lengths)), np.stack([sizes, lengths - sizes], 1).ravel())
    return Samples(
        tokens=rng.integers(0, 32_000, total, dtype=np.int32),
        mask=mask,
        weights=None,
        offsets=offsets,
        stops=(lengths - 1).astype(np.int32),
        source_rows=np.arange(1, len(lengths) + 1),
        source_ids=np.zeros(len(lengths), np.int32),
    )


def write_in_order(plan, tokens, offsets, path, *, chunk_rows=32):
    """Writes the tokens of all rows, in the order of the plan, to a file; chunks stay in the processor's cache."""
    lengths = np.diff(offsets)
    starts = offsets[plan.order]
    sizes = lengths[plan.order]
    slots = np.concatenate([[0], np.cumsum(sizes)])
    edges = slots[np.append(plan.offsets[:-1:chunk_rows], len(sizes))]
    numbers = np.arange(np.diff(edges).max())
    buffer = np.empty(len(numbers), tokens.dtype)
    with open(path, "wb", buffering=0) as file:
        for first in range(0, len(plan), chunk_rows):
            a, b = plan.offsets[first], plan.offsets[min(first + chunk_rows, len(plan))]
            begin, end = slots[a], slots[b]
            places = np.repeat(starts[a:b] - (slots[a:b] - begin), sizes[a:b])
            places += numbers[: end - begin]
            tokens.take(places, out=buffer[: end - begin], mode="clip")
            file.write(buffer[: end - begin].data)


def line(name, value, wanted, unit="s", better="<="):
    """One measurement beside its target."""
    ratio = value / wanted if better == ">=" else wanted / value
    verdict = "ok" if ratio >= 1 else "MISSED"
    print(f"{name:<52} {value:>9.3f} {unit:<7} target {better} {wanted:<6} {ratio:>6.2f}x {verdict}")


def bench(documents, capacity, fetch_documents):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, documents), 8, capacity).astype(np.int64)
    part = lengths[: max(1, documents // 20)].tolist()
    fill, seconds = timed(naive_packer, part, capacity, clock=own_time)
    naive = seconds * len(lengths) / len(part)
    print(f"{len(lengths):,} documents, {lengths.sum():,} tokens, rows of {capacity:,} slots")
    print(f"{'plan':<12} {'seconds':>8} {'fill':>9} {'faster than naive':>18}")
    print(f"{'naive':<12} {naive:>8.2f} {fill:>8.2%} {'1':>17}x")
    for strategy in STRATEGIES:
        plan, seconds = timed(plan_packs, lengths, capacity, strategy, times=3, clock=own_time)
        fill = lengths.sum() / (len(plan) * capacity)
        print(f"{strategy:<12} {seconds:>8.3f} {fill:>8.2%} {naive / seconds:>17,.0f}x")

    plan, seconds = timed(plan_packs, lengths, capacity, times=3, clock=own_time)
    line("plan, best_fit", seconds, 1.0)
    line("fill, best_fit", 100 * lengths.sum() / (len(plan) * capacity), 99.5, "%", ">=")
    samples = store(lengths, rng)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (plan, samples.tokens, samples.offsets, Path(folder) / "rows.bin")
        start = time.perf_counter()
        _, gathering = timed(write_in_order, *arguments, clock=own_time)
        writing = time.perf_counter() - start
    print(
        f"tokens of all rows, {samples.tokens.nbytes / 2**30:.1f} GiB, on the disk after {writing:.1f} s of the clock"
    )
    line("plan and rows written in order, this thread's own", seconds + gathering, 3.0)

    few = samples[:fetch_documents]
    dataset, seconds = timed(lambda: PackedDataset(few, max_seq_len=capacity))
    print(f"data set of {len(few):,} documents ({len(few.tokens):,} tokens) with its ledger: {seconds:.2f} s")
    order = dataset.row_order(0, 0)[:1000].tolist()
    packs, fetch = timed(lambda: [dataset[i] for i in order], times=5, clock=own_time)

    def copies():
        return [[v.copy() for v in vars(p).values() if isinstance(v, np.ndarray)] for p in packs]

    _, copy = timed(copies, times=5, clock=own_time)
    per_row = 1e6 / len(order)
    line(f"row fetch beyond copying it ({copy * per_row:.0f} us)", (fetch - copy) * per_row, 50, "us")
    block_mask(dataset, capacity)


def bench_rows(samples, capacity):
    """The whole way: a data set with its ledger, and every row fetched in order, its tokens and labels written."""

    def write(dataset, path):
        with open(path, "wb") as file:
            for pack in dataset:
                file.write(pack.tokens.data)
                file.write(pack.labels.data)

    print(f"{len(samples):,} documents, {len(samples.tokens):,} tokens, as a PackedDataset of {capacity:,} slots")
    for shares in (False, True):
        dataset, building = timed(
            lambda s=shares: PackedDataset(samples, max_seq_len=capacity, share_prefixes=s), times=3, clock=own_time
        )
        with tempfile.TemporaryDirectory() as folder:
            _, writing = timed(write, dataset, Path(folder) / "rows.bin", times=2, clock=own_time)
        name = "PackedDataset" + (", share_prefixes" if shares else "")
        print(f"  {name}: made in {building:.2f} s, {len(dataset):,} rows written in {writing:.2f} s of this thread")
        line(f"{name} and its rows in order", building + writing, 3.0)


def block_mask(dataset, capacity):
    """The mask of a batch of two rows, from `visible_until`, as each kernel takes it."""
    import torch

    from torchmask.data import collate
    from torchmask.modules import build_attention_mask

    torch.set_num_threads(1)
    batch = collate([dataset[0], dataset[1]], pad_to=capacity)
    for backend, name in (("flex", "FlexAttention's block mask"), ("sdpa", "the CPU kernel's plan")):
        _, seconds = timed(
            lambda b=backend: build_attention_mask(batch.visible_until, batch.tokens, backend=b),
            times=30,
            clock=own_time,
        )
        line(f"{name} of a 2 x {capacity} batch", 1e3 * seconds, 2.0, "ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--fetch-documents", type=int, default=100_000, help="documents of the row fetch's data set")
    args = parser.parse_args()
    bench(args.documents, args.capacity, args.fetch_documents)


if __name__ == "__main__":
    main()
