"""Times the pack plan, a row's fetch and the ledger on a million documents, beside a packer written the plain way.

    .venv/bin/python tools/bench_packing.py [--documents 1000000] [--capacity 4096]

Lengths are lognormal (median 400, sigma 1), as those of instruction data are. The baseline is first fit in data order,
one document at a time over the last 64 open rows; it is timed on a part of the documents and scaled, since its time is
proportional to their number.
"""

import argparse
import time

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


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def store(lengths, rng):
    total = int(lengths.sum())
    return Samples(
        tokens=rng.integers(0, 32_000, total, dtype=np.int32),
        mask=rng.integers(0, 2, total, dtype=np.uint8),
        weights=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        stops=(lengths - 1).astype(np.int32),
        source_rows=np.arange(1, len(lengths) + 1),
        source_ids=np.zeros(len(lengths), np.int32),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--fetch-documents", type=int, default=200_000, help="documents of the row fetch's data set")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 1, args.documents), 8, args.capacity).astype(np.int64)

    part = lengths[: max(1, args.documents // 20)].tolist()
    fill, seconds = timed(naive_packer, part, args.capacity)
    naive = seconds * len(lengths) / len(part)
    print(f"{len(lengths):,} documents, {lengths.sum():,} tokens, rows of {args.capacity:,} slots")
    print(f"{'plan':<12} {'seconds':>8} {'fill':>9} {'faster than naive':>18}")
    print(f"{'naive':<12} {naive:>8.2f} {fill:>8.2%} {'1':>17}x")
    for strategy in STRATEGIES:
        runs = [timed(plan_packs, lengths, args.capacity, strategy) for _ in range(3)]
        plan, seconds = runs[0][0], min(s for _, s in runs)
        fill = lengths.sum() / (len(plan) * args.capacity)
        print(f"{strategy:<12} {seconds:>8.3f} {fill:>8.2%} {naive / seconds:>17,.0f}x")

    samples = store(lengths[: args.fetch_documents], rng)
    dataset, seconds = timed(lambda: PackedDataset(samples, max_seq_len=args.capacity))
    print(f"data set of {len(samples):,} documents ({len(samples.tokens):,} tokens) with its ledger: {seconds:.2f} s")
    order = dataset.row_order(0, 0)[:2000].tolist()
    packs, fetch = timed(lambda: [dataset[i] for i in order])
    _, copy = timed(
        lambda: [(p.tokens.copy(), p.labels.copy(), p.positions.copy(), p.visible_until.copy()) for p in packs]
    )
    per_row = 1e6 / len(order)
    print(f"row fetch {fetch * per_row:.0f} us, of which copying such a row {copy * per_row:.0f} us")


if __name__ == "__main__":
    main()
