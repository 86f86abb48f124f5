"""Recipes run as users run them: a folder to work in, one process or several, and what a run leaves.

Shared by the tests of the recipes. A workplace is a user's folder: his copy of a recipe, a random tiny model with a
tokenizer, rows of his own and a configuration. `start_recipe` and `run_recipe` take processes of their own, as a
command line does; `run_here` takes none, which saves seconds where no signal is sent.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from torchmask.cli.main import main
from torchmask.models import from_config, save_pretrained

REPO = Path(__file__).resolve().parent.parent
RECIPE, CONFIG = "my_recipe.py", "my.yaml"  # of every workplace
NUM_STEPS = 8  # optimizer steps of a run in the workplace of finetune
ONE_STEP = ("epochs=1", "max_steps_per_epoch=1", "lr_scheduler.num_warmup_steps=0")
RESUME = "resume_from_checkpoint=true"


def make_finetune_workplace(folder):
    """Conversations of a few words, a byte-level tokenizer in ChatML, a checkpoint each step."""
    shutil.copy(REPO / "recipes/finetune.py", folder / RECIPE)
    _write_tokenizer(folder / "base")
    config = {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    save_pretrained(from_config(config), folder / "base")
    generator = random.Random(0)
    for name, count in (("train", 61), ("val", 9)):
        write_rows(folder / f"{name}.jsonl", [_conversation(generator) for _ in range(count)])
    (folder / CONFIG).write_text(
        f"""# finetune: a test
output_dir: {folder}/out
model: {{_component_: torchmask.models.from_pretrained, folder: {folder}/base}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: "${{model.folder}}", chat_format: chatml}}
dataset: {{_component_: torchmask.data.chat_dataset, source: {folder}/train.jsonl}}
packing: {{max_seq_len: 128}}
batch_size: 2
gradient_accumulation_steps: 2
epochs: 2
max_steps_per_epoch: {NUM_STEPS // 2}
optimizer: {{_component_: torch.optim.AdamW, lr: 1.0e-3}}
lr_scheduler: {{_component_: torchmask.training.cosine_schedule, num_warmup_steps: 2}}
save_every_n_steps: 1
device: cpu
"""
    )
    return folder


def _write_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def _conversation(generator):
    words = [generator.choice(["red", "blue", "up", "down", "yes", "no"]) for _ in range(generator.randint(1, 8))]
    return conversation(" ".join(words), " ".join(reversed(words)))


def make_pretrain_workplace(folder, *, num_steps):
    """Two sources, one of plain texts and one of conversations, mixed 3 to 1; a checkpoint each step."""
    shutil.copy(REPO / "recipes/pretrain.py", folder / RECIPE)
    base = folder / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "configs/tiny/base" / name, base)
    config = json.loads((REPO / "configs/tiny/base/config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    save_pretrained(from_config(config), base)
    generator = random.Random(0)
    words = ("Geros", "Nanim", "works", "lives", "for", "in", "the", "Pokil", "sails", "on")
    texts = [generator.choices(words, k=generator.randint(4, 20)) for _ in range(400)]
    write_rows(folder / "text.jsonl", [{"text": " ".join(text)} for text in texts])
    write_rows(folder / "chat.jsonl", [conversation(first, " ".join(rest)) for first, *rest in texts[:150]])
    (folder / CONFIG).write_text(
        f"""# pretrain: a test
output_dir: {folder}/out
model: {{_component_: torchmask.models.from_pretrained, folder: {base}}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: "${{model.folder}}"}}
sources:
  - {{dataset: {{_component_: torchmask.data.text_completion_dataset, source: {folder}/text.jsonl}}, weight: 3}}
  - {{dataset: {{_component_: torchmask.data.chat_dataset, source: {folder}/chat.jsonl}}, weight: 1}}
window: 24
repeat: true
packing: {{max_seq_len: 128}}
num_steps: {num_steps}
batch_size: 2
optimizer: {{_component_: torch.optim.AdamW, lr: 3.0e-3}}
lr_scheduler: {{_component_: torchmask.training.cosine_schedule, num_warmup_steps: 1}}
save_every_n_steps: 1
device: cpu
"""
    )
    return folder


def write_rows(path, rows):
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversation(question, answer):
    """A row of one question and its answer."""
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def dataset_of(source, builder="chat_dataset", key="dataset"):
    """The override that makes a file the data set."""
    return f"{key}={{_component_: torchmask.data.{builder}, source: {source}}}"


# Running


def recipe_command(workplace, output, *overrides, nproc=1):
    """The words of a command line that runs the workplace's recipe."""
    launch = ["--nproc-per-node", str(nproc)] if nproc > 1 else []
    command = [sys.executable, "-m", "torchmask", "run", *launch, str(workplace / RECIPE)]
    return [*command, "--config", str(workplace / CONFIG), f"output_dir={output}", *overrides]


def start_recipe(*args, **kwargs):
    """A process that runs `recipe_command` of the same arguments; what it says comes through its stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same arithmetic whatever the machine is busy with
    return subprocess.Popen(
        recipe_command(*args, **kwargs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def run_recipe(*args, expect=0, **kwargs):
    """Runs to the end in processes of its own; returns what was said."""
    process = start_recipe(*args, **kwargs)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit code {process.returncode}:\n{text}"
    return text


def run_here(workplace, output, *overrides):
    """Runs to the end in this process, on one thread as the others do; returns the exit code."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(["run", *recipe_command(workplace, output, *overrides)[4:]])
    finally:
        torch.set_num_threads(num_threads)


def wait_for_step(output, step, process):
    """Returns when the run has logged an optimizer step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        file = output / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def kill_after_step(output, step, process):
    """SIGKILL to the process and all that it started, once the run has logged a step."""
    print(f"killed after step {step}")
    wait_for_step(output, step, process)
    for child in _descendants(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()


def _descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


# What a run leaves


def metrics_of(output):
    """The lines of metrics.jsonl, which are of the steps 1, 2, ..."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return rows


def losses_of(output):
    """The losses by step."""
    return [row["loss"] for row in metrics_of(output)]


def bits_of(output):
    """The exact losses by step and a hash of each exported file of weights: equal ones are equal bits."""
    files = sorted(path for folder in ("final", "adapter") for path in (output / folder).glob("*.safetensors"))
    assert files, "nothing was exported"
    hashes = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return [loss.hex() for loss in losses_of(output)], hashes


def without_last_step(whole, output):
    """Copies a finished run as it was when its last step was not taken; the output folder."""
    shutil.copytree(whole, output)
    shutil.rmtree(sorted((output / "checkpoints").iterdir())[-1])
    for name in ("final", "adapter"):
        shutil.rmtree(output / name, ignore_errors=True)
    return output


def assert_fails(workplace, output, capfd, *overrides, code, match):
    """Runs and sees an error of its class with a pattern in it, and nothing trained; returns what was said."""
    assert run_here(workplace, output, *overrides) == code
    text = capfd.readouterr().err
    assert re.search(match, text, re.DOTALL), text
    assert "error[" in text and "Traceback" not in text
    assert not any(output.glob("checkpoints/*"))
    return text
