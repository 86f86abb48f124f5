"""Times the whole data path and prints ratios: tokens, rows, cache, packing, streaming; each beside its target.

    .venv/bin/python tools/bench_data.py [--torchtune PYTHON] [--only tokens cache packing stream] [--rows 20000]

PYTHON is that of a venv with torchtune 0.6.1 and torchao 0.10; without it its part is left out. Alpaca rows and the
Llama-3 tokenizer come from the test assets (TORCHMASK_ASSETS). Ways of tokenising take turns, several rounds, and the
best of each counts, since somebody else may be computing on the machine: read ratios, not seconds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from bench_packing import bench as bench_packing
from bench_packing import bench_rows, line, own_time, store, timed

from torchmask.data import PackedDataset, PackedStream, StreamPart, alpaca_dataset, open_source
from torchmask.data.cache import cached_samples
from torchmask.data.formats import alpaca_format
from torchmask.tokenizers import from_pretrained

TORCHTUNE = """
import json, sys, time
from torchtune.data import AlpacaToMessages
from torchtune.models.llama3 import llama3_tokenizer
tokenizer = llama3_tokenizer(sys.argv[1])
transform = AlpacaToMessages(train_on_input=False)
rows = [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")][: int(sys.argv[3])]
start, used = time.perf_counter(), time.process_time()
for row in rows:
    tokenizer(transform(row))
print(len(rows) / (time.perf_counter() - start), 1e6 * (time.process_time() - used) / len(rows))
"""

REOPEN = """
import sys, time
from pathlib import Path
import torchmask.data.packing, torchmask.data.cache
start = time.perf_counter()
samples = torchmask.data.cache.cached_samples(lambda: sys.exit("built again"), {"bench": 1}, root=Path(sys.argv[1]))
rows = torchmask.data.packing.PackedDataset(samples, max_seq_len=4096)
samples.fingerprint, rows.report["rows"]
ready = time.perf_counter() - start
rows[len(rows) // 2]
print(ready, len(samples), len(rows))
"""


def bench_tokens(assets, num_rows, torchtune, rounds):
    """Rows a second of our builder, the library alone, and torchtune."""
    rows = [row for row in json.loads((assets / "data/alpaca_en_demo.json").read_text()) if row["output"].strip()]
    rows = (rows * (num_rows // len(rows) + 1))[:num_rows]
    folder = Path(tempfile.mkdtemp())
    source = folder / "alpaca.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    tokenizer = from_pretrained(assets / "tokenizers/llama3", "llama3")
    messages = [alpaca_format(row).messages for row in open_source(str(source))]
    texts = ["\n\n" + message.text.strip() for both in messages for message in both]

    best: dict[str, float] = {}  # rows a second
    cost: dict[str, float] = {}  # microseconds of all cores a row
    for _ in range(rounds):
        for name, run in _ways(tokenizer, texts, str(source)).items():
            before = _cpu_seconds()
            _, seconds = timed(run)
            best[name] = max(best.get(name, 0), num_rows / seconds)
            cost[name] = min(cost.get(name, 1e9), 1e6 * (_cpu_seconds() - before) / num_rows)
        if torchtune:
            model = str(assets / "tokenizers/llama3/tokenizer.model")
            command = [torchtune, "-c", TORCHTUNE, model, str(source), str(num_rows // 4)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            speed, microseconds = map(float, done.stdout.split())
            best["torchtune"] = max(best.get("torchtune", 0), speed)
            cost["torchtune"] = min(cost.get("torchtune", 1e9), microseconds)
    library = max(speed for name, speed in best.items() if name.startswith("library"))
    ours = max(speed for name, speed in best.items() if name.startswith("torchmask"))
    base = "torchtune" if torchtune else "library, one thread"
    print(f"tokenisation, {num_rows:,} Alpaca rows, Llama-3 (best of {rounds} rounds, taken in turn)")
    print(f"  {'':<36} {'rows/s':>9} {'us of cores a row':>18}   beside {base}: speed, cost")
    for name, speed in sorted(best.items(), key=lambda item: -item[1]):
        ratios = f"{speed / best[base]:>6.2f}x {cost[base] / cost[name]:>6.2f}x"
        print(f"  {name:<36} {speed:>9,.0f} {cost[name]:>18.0f}   {ratios}")
    line("rows/s beside the library's fastest way", library / ours, 1.5, "x")
    if torchtune:
        cores = len(os.sched_getaffinity(0))
        line("rows/s beside torchtune's", ours / best["torchtune"], 3.0, "x", ">=")
        workers = cost[f"torchmask, num_workers={cores}"]
        line(f"the same by cost, for {cores} idle cores", cores * cost["torchtune"] / workers, 3.0, "x", ">=")


def _cpu_seconds():
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _ways(tokenizer, texts, source):
    """Ways to tokenise the same rows: ours from the file to masks, the library's on ready texts."""
    backend = tokenizer._backend
    encoding = getattr(backend, "_inner", backend)._encoding  # below tokens that the folder adds, if it does
    chunks = [texts[i : i + 2000] for i in range(0, len(texts), 2000)]
    cores = len(os.sched_getaffinity(0))

    def threads():
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda chunk: [encoding.encode_ordinary(text) for text in chunk], chunks))

    return {
        "torchmask, num_workers=0": partial(alpaca_dataset, tokenizer, source=source),
        f"torchmask, num_workers={cores}": partial(alpaca_dataset, tokenizer, source=source, num_workers=cores),
        "library, one thread": lambda: [encoding.encode_ordinary(text) for text in texts],
        f"library, {cores} threads in chunks": threads,
        "library, its own batch": lambda: encoding.encode_ordinary_batch(texts, num_threads=cores),
    }


def bench_cache(documents):
    """Rows from memory; writing an entry, a second start, and one that plans other rows."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4, 1, documents), 8, 4096).astype(np.int64)
    samples = store(lengths, rng, prompt=0.6)
    bench_rows(samples, 4096)
    samples.__dict__.setdefault("fingerprint", "0")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        mapped, writing = timed(lambda: cached_samples(lambda: samples, {"bench": 1}, root=root))
        _, planning = timed(lambda: PackedDataset(mapped, max_seq_len=4096))
        size = sum(path.stat().st_size for path in root.rglob("*.bin"))
        own = sum(path.stat().st_size for path in mapped.home.glob("*.bin"))
        print(f"cache of {documents:,} documents, {len(samples.tokens):,} tokens: written in {writing:.1f} s, "
              f"rows planned and written in {planning:.1f} s")  # fmt: skip
        per_token = own / len(samples.tokens)
        print(f"  {per_token:.2f} bytes a token without rules (one more with), {size / 2**20:,.0f} MiB with the rows")
        runs = [
            subprocess.run([sys.executable, "-c", REOPEN, folder], capture_output=True, text=True, check=True).stdout
            for _ in range(3)
        ]
        again, opening = timed(lambda: cached_samples(lambda: sys.exit("built again"), {"bench": 1}, root=root))
        _, replanning = timed(lambda: PackedDataset(again, max_seq_len=8192), clock=own_time)
    line("second start with other rows, planned and kept", opening + replanning, 3.0)
    line("second start: samples and rows ready", min(float(run.split()[0]) for run in runs), 0.5)


def bench_stream(assets, num_rows):
    """Rows a second through a stream's windows, and the cost of resuming."""
    rows = json.loads((assets / "data/alpaca_en_demo.json").read_text())
    rows = [row for row in rows if row["output"].strip()] * (num_rows // len(rows) + 1)
    tokenizer = from_pretrained(assets / "tokenizers/llama3", "llama3")
    build = partial(alpaca_dataset, tokenizer)

    def stream():
        return PackedStream([StreamPart(build, rows[:num_rows])], max_seq_len=4096, window=4096)

    packs, seconds = timed(lambda: list(stream()))
    fill = sum(map(len, packs)) / (4096 * len(packs))
    print(f"stream of {num_rows:,} rows: {num_rows / seconds:,.0f} rows/s, {len(packs)} packs, fill {fill:.2%}")
    late, first = stream(), stream()
    state = {**late.state_dict(), "window": num_rows // 4096}
    late.load_state_dict(state)
    _, start = timed(lambda: next(first))
    _, resumed = timed(lambda: next(late))
    print(f"  first pack {start:.2f} s; first pack after resuming near the end {resumed:.2f} s; "
          f"state {len(json.dumps(state))} bytes")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torchtune", metavar="PYTHON", help="python of a venv with torchtune 0.6.1 and torchao 0.10")
    parser.add_argument("--only", nargs="+", choices=["tokens", "cache", "packing", "stream"])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
    assets = Path(os.environ.get("TORCHMASK_ASSETS", default))
    wanted = args.only or ["tokens", "cache", "packing", "stream"]
    began = time.perf_counter()
    if "tokens" in wanted:
        bench_tokens(assets, args.rows, args.torchtune, args.rounds)
    if "cache" in wanted:
        bench_cache(args.documents)
    if "packing" in wanted:
        bench_packing(args.documents, 4096, 100_000)
    if "stream" in wanted:
        bench_stream(assets, args.rows)
    load = os.getloadavg()[0]
    print(f"{time.perf_counter() - began:.0f} s; {len(os.sched_getaffinity(0))} cores, load {load:.1f}")


if __name__ == "__main__":
    main()
