"""Times the mask of a 2 x 4096 batch in every form, beside torch's own ways to make one; CPU.

    python tools/bench_masks.py [--threads 1] [--slots 4096]

Rows are random: documents (median 150), the same with hidden tokens, trees of two levels, prompts that see themselves
both ways, and limits without any pattern, which is the worst case.
"""

import argparse
import time

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask

from torchmask.modules import build_attention_mask, may_attend


def documents(num_slots, rng):
    ends = np.minimum(np.cumsum(rng.lognormal(5.0, 0.8, num_slots).astype(np.int64) + 1), num_slots)
    return ends[np.searchsorted(ends, np.arange(num_slots), side="right")]


def trees(num_slots, rng):
    """Prefixes of about 200 slots, each with about ten branches of 20 to 60."""
    until, start = np.zeros(num_slots, np.int64), 0
    while start < num_slots:
        prefix = start + int(rng.integers(100, 300))
        branches = np.minimum(prefix + np.cumsum(rng.integers(20, 60, int(rng.integers(5, 15)))), num_slots)
        until[start:prefix] = branches[-1]
        for a, b in zip([prefix, *branches], branches):
            until[a:b] = b
        start = int(branches[-1])
    return until


def rows(kind, num_slots, rng):
    """visible_until and visible_from of one row."""
    slots = np.arange(num_slots)
    until, since = (trees if kind == "trees" else documents)(num_slots, rng), slots
    if kind == "hidden":
        until = np.where(rng.random(num_slots) < 0.05, slots + 1, until)
    if kind == "both ways":
        starts = np.searchsorted(until, until)
        since = np.where(slots < (starts + until) // 2, starts, slots)
    if kind == "no pattern":
        until = rng.integers(slots + 1, num_slots + 1)
    return until, since


def milliseconds(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    print(f"2 x {args.slots}, torch {torch.__version__}, {args.threads} threads; medians, ms\n")
    print("| rows | sdpa | flex | torch: create_block_mask | dense T x T |\n|---|---|---|---|---|")
    for kind in ("documents", "hidden", "trees", "both ways", "no pattern"):
        pairs = [rows(kind, args.slots, rng) for _ in range(2)]
        until, since = (torch.from_numpy(np.stack(x)) for x in zip(*pairs))
        both = since if kind == "both ways" else None

        def ours(backend, until=until, both=both):
            return build_attention_mask(until, until, backend=backend, visible_from=both)

        def torchs(until=until, since=since):
            size = until.shape[1]
            seen = lambda b, h, q, k: (since[b, k] <= q) & (q < until[b, k])  # noqa: E731
            return create_block_mask(seen, 2, None, size, size, device="cpu")

        times = [milliseconds(lambda name=name: ours(name), 30) for name in ("sdpa", "flex")]
        times += [milliseconds(torchs, 2), milliseconds(lambda u=until, s=both: may_attend(u, s), 2)]
        print(f"| {kind} |", " | ".join(f"{t:.2f}" for t in times), "|", flush=True)


if __name__ == "__main__":
    main()
