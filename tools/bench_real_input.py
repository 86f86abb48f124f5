"""Fine-tunes real checkpoints on real rows and prints what was measured, as Markdown for docs/benchmarks.md.

    .venv/bin/python tools/bench_real_input.py [1] [2] [3]      (TORCHMASK_ASSETS names the folder of test assets)

1. stories260k, a real pretrained 260K-parameter Llama, on the real Alpaca rows with its own tokenizer, packed at 512.
2. The same by two processes; and killed at a random step, then resumed. Losses are compared with those of 1.
3. Three steps of a random model of Llama 3.2 1B's shape, real Llama 3 tokenizer (vocabulary 128,256), 2,048 slots.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ASSETS = Path(os.environ.get("TORCHMASK_ASSETS", Path(__file__).parents[2] / "shared/assets"))
STORIES, ALPACA = ASSETS / "checkpoints/stories260k", ASSETS / "data/alpaca_en_demo.json"
PROMPT = "Give three tips for staying healthy."

STORIES_YAML = f"""# finetune: stories260k on Alpaca
output_dir: set on the command line
model: {{_component_: torchmask.models.from_pretrained, folder: {STORIES}}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: {STORIES}}}
dataset: {{_component_: torchmask.data.alpaca_dataset, source: {ALPACA}}}
packing: {{max_seq_len: 512, over_length: truncate}}
batch_size: 4
gradient_accumulation_steps: 2
epochs: 1
optimizer: {{_component_: torch.optim.AdamW, lr: 2.0e-3}}
lr_scheduler: {{_component_: torchmask.training.cosine_schedule, warmup_ratio: 0.05}}
save_every_n_steps: 10
"""
LLAMA3 = ASSETS / "tokenizers/llama3"
LLAMA_YAML = f"""# finetune: a random model of Llama 3.2 1B's shape
output_dir: set on the command line
model: {{_component_: torchmask.models.llama3_2_1b}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: {LLAMA3}, chat_format: llama3}}
dataset: {{_component_: torchmask.data.alpaca_dataset, source: {ALPACA}}}
packing: {{max_seq_len: 2048}}
max_steps_per_epoch: 3
dtype: bf16
bf16_updates: stochastic_rounding
enable_activation_checkpointing: true
lr_scheduler: {{_component_: torchmask.training.constant_schedule}}
optimizer: {{_component_: torch.optim.AdamW, lr: 1.0e-4}}
"""


def command(recipe, config, *overrides, nproc=1):
    launch = ["--nproc-per-node", str(nproc)] if nproc > 1 else []
    return [sys.executable, "-m", "torchmask", "run", *launch, recipe, "--config", str(config), *overrides]


def train(config, output, *overrides, nproc=1):
    began = time.perf_counter()
    done = subprocess.run(
        command("finetune", config, f"output_dir={output}", *overrides, nproc=nproc), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - began


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def complete(folder, checkpoint):
    config = folder / "generate.yaml"
    config.write_text(
        f"# generate: x\ncheckpoint_dir: {checkpoint}\n"
        f"tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: {STORIES}}}\n"
    )
    alpaca = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{PROMPT}\n\n### Response:"
    )
    words = command("generate", config, f"prompt={json.dumps(alpaca)}", "max_new_tokens=60")
    return " ".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def row(name, *cells):
    print("| " + " | ".join([name, *map(str, cells)]) + " |", flush=True)


def summary(rows, seconds):
    rates = sorted(r["tokens_per_second_per_gpu"] for r in rows)
    row("steps, seconds with start-up", f"{rows[-1]['step']}, {seconds:.0f}")
    row("loss, first step -> mean of the last 10", f"{rows[0]['loss']:.3f} -> {_mean_of_last(rows):.3f}")
    row("tokens a second and process (median)", f"{rates[len(rates) // 2]:,.0f}")
    row("peak memory, GiB", f"{max(r['peak_memory_gib'] for r in rows):.2f}")


def _mean_of_last(rows):
    last = [r["loss"] for r in rows[-10:]]
    return sum(last) / len(last)


def difference(one, two):
    return max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two, strict=True))


def part_1(folder, config):
    print("\n### 1. stories260k on Alpaca, one process\n\n| | |\n|---|---|", flush=True)
    seconds = train(config, folder / "one")
    summary(metrics(folder / "one"), seconds)
    row("before", complete(folder, STORIES))
    row("after", complete(folder, folder / "one/final"))


def part_2(folder, config):
    print("\n### 2. The same by two processes; killed and resumed\n\n| | |\n|---|---|", flush=True)
    if not (folder / "one").exists():
        train(config, folder / "one")
    reference = metrics(folder / "one")
    halved = "gradient_accumulation_steps=1"
    seconds = train(config, folder / "two", halved, nproc=2)
    two = metrics(folder / "two")
    summary(two, seconds)
    row("largest relative difference to one process", f"{difference(reference, two):.1e}")
    for nproc, whole in ((1, reference), (2, two)):
        step, rows = kill_and_resume(config, folder / f"killed{nproc}", nproc, len(whole))
        same = [a["loss"].hex() for a in whole] == [b["loss"].hex() for b in rows]
        row(f"{nproc} process(es) killed after step {step} and resumed", "bit-identical" if same else "DIFFERENT")


def kill_and_resume(config, output, nproc, num_steps):
    options = [f"gradient_accumulation_steps={2 // nproc}"]
    step = random.randint(12, num_steps - 10)
    words = command("finetune", config, f"output_dir={output}", *options, nproc=nproc)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (output / "metrics.jsonl").exists() or len(metrics_lines(output)) < step:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", str(output)], check=False)
    process.wait()
    killed_at = len(metrics_lines(output))
    train(config, output, *options, "resume_from_checkpoint=true", nproc=nproc)
    return killed_at, metrics(output)


def metrics_lines(output):
    return (output / "metrics.jsonl").read_text().split("\n")[:-1]


def part_3(folder):
    print("\n### 3. A random model of Llama 3.2 1B's shape, real Llama 3 tokenizer\n\n| | |\n|---|---|", flush=True)
    (folder / "llama.yaml").write_text(LLAMA_YAML)
    seconds = train(folder / "llama.yaml", folder / "llama", "save_every_n_steps=null", "keep_last_n=1")
    rows = metrics(folder / "llama")
    summary(rows, seconds)
    row("losses", ", ".join(f"{r['loss']:.4f}" for r in rows))


def main():
    parts = set(sys.argv[1:]) or {"1", "2", "3"}
    folder = Path(tempfile.mkdtemp(prefix="torchmask-bench-"))
    try:
        (folder / "stories.yaml").write_text(STORIES_YAML)
        if "1" in parts:
            part_1(folder, folder / "stories.yaml")
        if "2" in parts:
            part_2(folder, folder / "stories.yaml")
        if "3" in parts:
            part_3(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
