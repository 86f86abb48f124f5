"""The recipe finetune as users run it: copied to a folder, one process or two, stopped, resumed, distributed."""

import json
import random
import resource
import shutil
import signal
import socket
import subprocess

import pytest
import torch
from recipe_runs import (
    NUM_STEPS,
    ONE_STEP,
    RESUME,
    bits_of,
    kill_after_step,
    losses_of,
    metrics_of,
    recipe_command,
    run_here,
    run_recipe,
    start_recipe,
    wait_for_step,
    without_last_step,
)
from safetensors.torch import load_file

from torchmask.data import PackedDataset, chat_dataset, collate
from torchmask.models import from_pretrained
from torchmask.tokenizers import from_pretrained as load_tokenizer


def test_a_run_leaves_what_the_docs_promise(unbroken):
    output, text = unbroken
    for name in ("config.yaml", "run.json", "metrics.jsonl", "logs", "final", "loss.png", "masks.html"):
        assert (output / name).exists(), name
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]
    assert "trained" in text and f"step {NUM_STEPS}/{NUM_STEPS}" in text
    assert not (output / ".lock").exists()
    rows = metrics_of(output)
    assert len(rows) == NUM_STEPS
    assert [row["step"] for row in rows if "val_loss" in row] == [NUM_STEPS // 2, NUM_STEPS]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_transformers_loads_the_final_folder_and_agrees(unbroken):
    transformers = pytest.importorskip("transformers")
    final = unbroken[0] / "final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final)
    ours = from_pretrained(final)
    tokens = torch.arange(40).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(ours.lm_head(ours(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(final).chat_format == "chatml"  # as the run had it, so that generation prompts alike
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    assert tokenizer("hello")["input_ids"] and tokenizer.eos_token == "<|im_end|>"


def test_the_validation_loss_is_the_mean_over_all_trained_tokens_of_its_rows(unbroken, workplace):
    output = unbroken[0]
    model, tokenizer = from_pretrained(output / "final"), load_tokenizer(output / "final")
    rows = PackedDataset(chat_dataset(tokenizer, source=str(workplace / "val.jsonl")), max_seq_len=128)
    nll = count = 0.0
    with torch.no_grad():
        for pack in rows:
            batch = collate([pack])
            logits = model.lm_head(model(batch.tokens, batch.positions, batch.visible_until))
            nll += torch.nn.functional.cross_entropy(logits[0], batch.labels[0], reduction="sum").item()
            count += batch.num_targets
    logged = metrics_of(output)[-1]["val_loss"]
    assert logged == pytest.approx(nll / count, rel=1e-5)


def test_two_processes_give_the_losses_of_one_to_rounding(unbroken, unbroken_two):
    one, two = (losses_of(output) for output in (unbroken[0], unbroken_two))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(workplace, tmp_path, nproc, unbroken, unbroken_two):
    reference = unbroken[0] if nproc == 1 else unbroken_two
    accumulate = f"gradient_accumulation_steps={2 // nproc}"
    output = tmp_path / "out"
    process = start_recipe(workplace, output, accumulate, nproc=nproc)
    kill_after_step(output, random.Random().randint(1, NUM_STEPS - 2), process)
    run_recipe(workplace, output, accumulate, RESUME, nproc=nproc)
    assert bits_of(output) == bits_of(reference)


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_saves_exits_75_and_the_resumed_run_is_bit_for_bit_the_same(
    workplace, tmp_path, nproc, unbroken, unbroken_two
):
    reference = unbroken[0] if nproc == 1 else unbroken_two
    options = [f"gradient_accumulation_steps={2 // nproc}", "save_every_n_steps=null"]
    output = tmp_path / "out"
    process = start_recipe(workplace, output, *options, nproc=nproc)
    wait_for_step(output, 2, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "stopped by SIGTERM" in text and RESUME in text
    assert "Traceback" not in text
    run_recipe(workplace, output, *options, RESUME, nproc=nproc)
    assert bits_of(output) == bits_of(reference)


@pytest.mark.slow
def test_two_nodes_of_one_process_give_the_losses_of_two_processes(workplace, tmp_path, unbroken_two):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "out"
    node = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "7"]
    plain = recipe_command(workplace, output, "gradient_accumulation_steps=1")
    command = [*plain[:4], *node, "--rdzv-endpoint", f"localhost:{port}", *plain[4:]]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    ours, wanted = (losses_of(o) for o in (output, unbroken_two))
    assert ours == pytest.approx(wanted, rel=1e-5)


def test_a_run_of_two_processes_goes_on_with_one(workplace, tmp_path, unbroken, unbroken_two):
    output = without_last_step(unbroken_two, tmp_path / "out")
    text = run_recipe(workplace, output, "gradient_accumulation_steps=1", RESUME)
    assert "going on after step 7" in text
    assert losses_of(output)[-1] == pytest.approx(losses_of(unbroken_two)[-1], rel=1e-6)


def test_the_second_ctrl_c_ends_the_run_at_once(workplace, tmp_path):
    output = tmp_path / "out"
    process = start_recipe(workplace, output, "epochs=2000", "save_every_n_steps=null")
    wait_for_step(output, 2, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode in (75, 130), text  # 75 where the first was honoured before the second came
    assert "Traceback" not in text


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(workplace, tmp_path):
    output = tmp_path / "out"
    # A schedule that does not know the end of the run, so that one epoch is the beginning of two.
    options = ["save_every_n_steps=null", "lr_scheduler=torchmask.training.constant_schedule"]
    assert run_here(workplace, output, "epochs=1", *options) == 0
    shutil.rmtree(output / "final")

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = recipe_command(workplace, output, RESUME, *options)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files_only, timeout=120)
    assert done.returncode == 7, done.stderr
    assert "could not be written" in done.stderr and "step-00000004 is whole" in done.stderr
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000004"]
    assert run_here(workplace, output, RESUME, *options) == 0
    assert run_here(workplace, tmp_path / "unbroken", *options) == 0
    assert losses_of(output) == losses_of(tmp_path / "unbroken")


def test_micro_batches_do_not_change_the_losses(workplace, tmp_path):
    losses = []
    for batch_size in (4, 1):
        output = tmp_path / f"b{batch_size}"
        options = [f"batch_size={batch_size}", f"gradient_accumulation_steps={4 // batch_size}", "epochs=1"]
        assert run_here(workplace, output, *options) == 0
        losses.append(losses_of(output))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_packing_does_not_change_what_is_learned(workplace, tmp_path):
    """One document a row or packed rows: the first step over all rows has the same loss and the same gradient."""
    rows = {}
    for strategy, batch_size in (("none", 61), ("best_fit", 40)):
        output = tmp_path / strategy
        options = [f"packing.strategy={strategy}", f"batch_size={batch_size}", "gradient_accumulation_steps=1"]
        assert run_here(workplace, output, *options, *ONE_STEP) == 0
        [rows[strategy]] = metrics_of(output)
    assert rows["best_fit"]["num_targets"] == rows["none"]["num_targets"]
    assert rows["best_fit"]["loss"] == pytest.approx(rows["none"]["loss"], rel=1e-6)
    assert rows["best_fit"]["grad_norm"] == pytest.approx(rows["none"]["grad_norm"], rel=1e-4)


def test_activation_checkpointing_changes_no_bit(workplace, tmp_path):
    outputs = [tmp_path / name for name in ("off", "on")]
    for output, enabled in zip(outputs, ("false", "true")):
        assert run_here(workplace, output, "epochs=1", f"enable_activation_checkpointing={enabled}") == 0
    assert losses_of(outputs[0]) == losses_of(outputs[1])


@pytest.mark.slow  # compiles
def test_an_8_bit_optimizer_is_saved_and_resumes_bit_for_bit(workplace, tmp_path):
    whole = tmp_path / "whole"
    wide = {**json.loads((workplace / "base/config.json").read_text()), "intermediate_size": 512}  # states of > 4096
    (tmp_path / "config.json").write_text(json.dumps(wide))
    model = f"model={{_component_: torchmask.models.from_config, config: {tmp_path}/config.json}}"
    options = [
        model,
        f"tokenizer.folder={workplace}/base",
        "optimizer={_component_: torchao.optim.AdamW8bit, lr: 1.0e-3}",
    ]
    run_recipe(workplace, whole, *options)
    broken = without_last_step(whole, tmp_path / "broken")
    names = {name for file in (whole / "checkpoints/step-00000008/optim").iterdir() for name in load_file(file)}
    assert any(name.endswith("exp_avg.codes") for name in names)
    run_recipe(workplace, broken, *options, RESUME)
    assert bits_of(broken) == bits_of(whole)


@pytest.mark.slow  # compiles
def test_compiled_layers_learn_the_same(workplace, tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    outputs = [tmp_path / name for name in ("eager", "compiled")]
    for output, enabled in zip(outputs, ("false", "true")):
        run_recipe(workplace, output, "epochs=1", f"compile={enabled}", "enable_activation_checkpointing=true")
    eager, compiled = (losses_of(output) for output in outputs)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert from_pretrained(outputs[1] / "final")  # names are not those of compiled modules


@pytest.mark.parametrize("updates", ["master_weights", "stochastic_rounding"])
def test_bf16_training_learns_and_exports_bf16(workplace, tmp_path, updates):
    output = tmp_path / "out"
    assert run_here(workplace, output, "dtype=bf16", f"bf16_updates={updates}", "optimizer.lr=3e-3") == 0
    losses = losses_of(output)
    assert losses[-1] < losses[0]
    assert json.loads((output / "final/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_another_seed_takes_other_rows(workplace, tmp_path, unbroken):
    output = tmp_path / "out"
    assert run_here(workplace, output, "seed=1", "epochs=1") == 0
    assert losses_of(output)[0] != losses_of(unbroken[0])[0]


def test_random_weights_are_used_where_no_folder_is_named(workplace, tmp_path, capfd):
    output = tmp_path / "out"
    model = f"model={{_component_: torchmask.models.from_config, config: {workplace}/base/config.json}}"
    folder = f"tokenizer.folder={workplace}/base"
    assert run_here(workplace, output, model, folder, *ONE_STEP) == 0
    assert "random weights" in capfd.readouterr().out


def test_continued_pretraining_on_plain_text(workplace, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * (10 + i))
    dataset = f"dataset={{_component_: torchmask.data.text_completion_dataset, source: {text}/*.txt}}"
    output = tmp_path / "out"
    assert run_here(workplace, output, dataset, "packing.strategy=split", *ONE_STEP) == 0
    assert len(losses_of(output)) >= 1


def test_resuming_a_finished_run_trains_nothing_more(workplace, tmp_path, unbroken, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[0], copy)
    assert run_here(workplace, copy, RESUME) == 0
    assert "already finished" in capfd.readouterr().out
    assert bits_of(copy) == bits_of(unbroken[0])
