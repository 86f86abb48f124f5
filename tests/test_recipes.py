"""The recipes as users run them: copied to a folder, one process or two, stopped, resumed, given bad input."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchmask.cli.main import main
from torchmask.data import PackedDataset, chat_dataset, collate
from torchmask.models import from_config, from_pretrained, save_pretrained
from torchmask.tokenizers import from_pretrained as load_tokenizer

REPO = Path(__file__).parent.parent
NUM_STEPS = 8
ONE_STEP = ("epochs=1", "max_steps_per_epoch=1", "lr_scheduler.num_warmup_steps=0")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A user's folder: a copy of the recipe, a random tiny model with a tokenizer, rows of his own, a config."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copy(REPO / "recipes/finetune.py", folder / "my_finetune.py")
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
        rows = [_conversation(generator) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.yaml").write_text(
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
    turns = [("user", " ".join(words)), ("assistant", " ".join(reversed(words)))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _command(workplace, output, *overrides, nproc=1, recipe="my_finetune.py"):
    launch = ["--nproc-per-node", str(nproc)] if nproc > 1 else []
    command = [sys.executable, "-m", "torchmask", "run", *launch, str(workplace / recipe)]
    return [*command, "--config", str(workplace / "my.yaml"), f"output_dir={output}", *overrides]


def _start(*args, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same arithmetic whatever the machine is busy with
    return subprocess.Popen(
        _command(*args, **kwargs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _run(*args, expect=0, **kwargs):
    process = _start(*args, **kwargs)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expect, f"exit code {process.returncode}:\n{output}"
    return output


def _losses(output):
    """The exact losses by step: equal strings are equal bits."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"].hex() for row in rows]


def _weights(output):
    return hashlib.sha256((output / "final/model.safetensors").read_bytes()).hexdigest()


def _wait_for_step(output, step, process):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        lines = (output / "metrics.jsonl").read_text().count("\n") if (output / "metrics.jsonl").exists() else 0
        if lines >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="session")
def unbroken(workplace, tmp_path_factory):
    """A run from beginning to end by one process."""
    output = tmp_path_factory.mktemp("one") / "out"
    text = _run(workplace, output, _dataset(workplace / "val.jsonl").replace("dataset", "dataset_val", 1))
    return output, text


@pytest.fixture(scope="session")
def unbroken_two(workplace, tmp_path_factory):
    """The same by two processes that share each step's rows."""
    output = tmp_path_factory.mktemp("two") / "out"
    _run(workplace, output, "gradient_accumulation_steps=1", nproc=2)
    return output


def test_a_run_leaves_what_the_docs_promise(unbroken):
    output, text = unbroken
    for name in ("config.yaml", "run.json", "metrics.jsonl", "logs", "final", "loss.png", "masks.html"):
        assert (output / name).exists(), name
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]
    assert "trained" in text and f"step {NUM_STEPS}/{NUM_STEPS}" in text
    assert not (output / ".lock").exists()
    assert len(_losses(output)) == NUM_STEPS
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
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
    logged = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    assert logged == pytest.approx(nll / count, rel=1e-5)


def test_two_processes_give_the_losses_of_one_to_rounding(unbroken, unbroken_two):
    one, two = (map(float.fromhex, _losses(output)) for output in (unbroken[0], unbroken_two))
    assert list(two) == pytest.approx(list(one), rel=1e-5)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(workplace, tmp_path, nproc, unbroken, unbroken_two):
    reference = unbroken[0] if nproc == 1 else unbroken_two
    accumulate = f"gradient_accumulation_steps={2 // nproc}"
    output = tmp_path / "out"
    process = _start(workplace, output, accumulate, nproc=nproc)
    _wait_for_step(output, random.Random().randint(1, NUM_STEPS - 2), process)
    for child in _children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.wait()
    _run(workplace, output, accumulate, "resume_from_checkpoint=true", nproc=nproc)
    assert _losses(output) == _losses(reference)
    assert _weights(output) == _weights(reference)


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_saves_exits_75_and_the_resumed_run_is_bit_for_bit_the_same(
    workplace, tmp_path, nproc, unbroken, unbroken_two
):
    reference = unbroken[0] if nproc == 1 else unbroken_two
    options = [f"gradient_accumulation_steps={2 // nproc}", "save_every_n_steps=null"]
    output = tmp_path / "out"
    process = _start(workplace, output, *options, nproc=nproc)
    _wait_for_step(output, 2, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "stopped by SIGTERM" in text and "resume_from_checkpoint=true" in text
    assert "Traceback" not in text
    _run(workplace, output, *options, "resume_from_checkpoint=true", nproc=nproc)
    assert _losses(output) == _losses(reference)
    assert _weights(output) == _weights(reference)


@pytest.mark.slow
def test_two_nodes_of_one_process_give_the_losses_of_two_processes(workplace, tmp_path, unbroken_two):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    output = tmp_path / "out"
    node = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "7"]
    plain = _command(workplace, output, "gradient_accumulation_steps=1")
    command = [*plain[:4], *node, "--rdzv-endpoint", f"localhost:{port}", *plain[4:]]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    ours, wanted = (list(map(float.fromhex, _losses(o))) for o in (output, unbroken_two))
    assert ours == pytest.approx(wanted, rel=1e-5)


def test_a_run_of_two_processes_goes_on_with_one(workplace, tmp_path, unbroken, unbroken_two):
    output = tmp_path / "out"
    shutil.copytree(unbroken_two, output)
    shutil.rmtree(output / "checkpoints/step-00000008")
    shutil.rmtree(output / "final")
    text = _run(workplace, output, "gradient_accumulation_steps=1", "resume_from_checkpoint=true")
    assert "going on after step 7" in text
    assert float.fromhex(_losses(output)[-1]) == pytest.approx(float.fromhex(_losses(unbroken_two)[-1]), rel=1e-6)


def test_the_second_ctrl_c_ends_the_run_at_once(workplace, tmp_path):
    output = tmp_path / "out"
    process = _start(workplace, output, "epochs=2000", "save_every_n_steps=null")
    _wait_for_step(output, 2, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode in (75, 130), text  # 75 where the first was honoured before the second came
    assert "Traceback" not in text


def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(workplace, tmp_path):
    output = tmp_path / "out"
    # A schedule that does not know the end of the run, so that one epoch is the beginning of two.
    options = ["save_every_n_steps=null", "lr_scheduler=torchmask.training.constant_schedule"]
    assert _in_process(workplace, output, "epochs=1", *options) == 0
    shutil.rmtree(output / "final")

    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = _command(workplace, output, "resume_from_checkpoint=true", *options)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files_only, timeout=120)
    assert done.returncode == 7, done.stderr
    assert "could not be written" in done.stderr and "step-00000004 is whole" in done.stderr
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000004"]
    assert _in_process(workplace, output, "resume_from_checkpoint=true", *options) == 0
    assert _in_process(workplace, tmp_path / "unbroken", *options) == 0
    assert _losses(output) == _losses(tmp_path / "unbroken")


def _in_process(workplace, output, *overrides):
    return main(["run", *_command(workplace, output, *overrides)[4:]])


def test_micro_batches_do_not_change_the_losses(workplace, tmp_path):
    losses = []
    for batch_size in (4, 1):
        output = tmp_path / f"b{batch_size}"
        options = [f"batch_size={batch_size}", f"gradient_accumulation_steps={4 // batch_size}", "epochs=1"]
        assert _in_process(workplace, output, *options) == 0
        losses.append(list(map(float.fromhex, _losses(output))))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_packing_does_not_change_what_is_learned(workplace, tmp_path):
    """One document a row or packed rows: the first step over all rows has the same loss and the same gradient."""
    rows = {}
    for strategy, batch_size in (("none", 61), ("best_fit", 40)):
        output = tmp_path / strategy
        options = [f"packing.strategy={strategy}", f"batch_size={batch_size}", "gradient_accumulation_steps=1"]
        assert _in_process(workplace, output, *options, *ONE_STEP) == 0
        rows[strategy] = json.loads((output / "metrics.jsonl").read_text())
    assert rows["best_fit"]["num_targets"] == rows["none"]["num_targets"]
    assert rows["best_fit"]["loss"] == pytest.approx(rows["none"]["loss"], rel=1e-6)
    assert rows["best_fit"]["grad_norm"] == pytest.approx(rows["none"]["grad_norm"], rel=1e-4)


def test_activation_checkpointing_changes_no_bit(workplace, tmp_path):
    outputs = [tmp_path / name for name in ("off", "on")]
    for output, enabled in zip(outputs, ("false", "true")):
        assert _in_process(workplace, output, "epochs=1", f"enable_activation_checkpointing={enabled}") == 0
    assert _losses(outputs[0]) == _losses(outputs[1])


@pytest.mark.slow  # compiles
def test_an_8_bit_optimizer_is_saved_and_resumes_bit_for_bit(workplace, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    wide = {**json.loads((workplace / "base/config.json").read_text()), "intermediate_size": 512}  # states of > 4096
    (tmp_path / "config.json").write_text(json.dumps(wide))
    model = f"model={{_component_: torchmask.models.from_config, config: {tmp_path}/config.json}}"
    options = [
        model,
        f"tokenizer.folder={workplace}/base",
        "optimizer={_component_: torchao.optim.AdamW8bit, lr: 1.0e-3}",
    ]
    _run(workplace, whole, *options)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints/step-00000008")
    shutil.rmtree(broken / "final")
    names = {name for file in (whole / "checkpoints/step-00000008/optim").iterdir() for name in load_file(file)}
    assert any(name.endswith("exp_avg.codes") for name in names)
    _run(workplace, broken, *options, "resume_from_checkpoint=true")
    assert _losses(broken) == _losses(whole) and _weights(broken) == _weights(whole)


@pytest.mark.slow  # compiles
def test_compiled_layers_learn_the_same(workplace, tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    outputs = [tmp_path / name for name in ("eager", "compiled")]
    for output, enabled in zip(outputs, ("false", "true")):
        _run(workplace, output, "epochs=1", f"compile={enabled}", "enable_activation_checkpointing=true")
    eager, compiled = (list(map(float.fromhex, _losses(output))) for output in outputs)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert _weights(outputs[1]) and from_pretrained(outputs[1] / "final")  # names are not those of compiled modules


@pytest.mark.parametrize("updates", ["master_weights", "stochastic_rounding"])
def test_bf16_training_learns_and_exports_bf16(workplace, tmp_path, updates):
    output = tmp_path / "out"
    assert _in_process(workplace, output, "dtype=bf16", f"bf16_updates={updates}", "optimizer.lr=3e-3") == 0
    losses = list(map(float.fromhex, _losses(output)))
    assert losses[-1] < losses[0]
    assert json.loads((output / "final/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_another_seed_takes_other_rows(workplace, tmp_path, unbroken):
    output = tmp_path / "out"
    assert _in_process(workplace, output, "seed=1", "epochs=1") == 0
    assert _losses(output)[0] != _losses(unbroken[0])[0]


def test_random_weights_are_used_where_no_folder_is_named(workplace, tmp_path, capfd):
    output = tmp_path / "out"
    model = f"model={{_component_: torchmask.models.from_config, config: {workplace}/base/config.json}}"
    folder = f"tokenizer.folder={workplace}/base"
    assert _in_process(workplace, output, model, folder, *ONE_STEP) == 0
    assert "random weights" in capfd.readouterr().out


def test_continued_pretraining_on_plain_text(workplace, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog. " * (10 + i))
    dataset = f"dataset={{_component_: torchmask.data.text_completion_dataset, source: {text}/*.txt}}"
    output = tmp_path / "out"
    assert _in_process(workplace, output, dataset, "packing.strategy=split", *ONE_STEP) == 0
    assert len(_losses(output)) >= 1


# Bad input: an exit code of its class, a message that names the place, nothing trained


def _fails(workplace, tmp_path, capfd, *overrides, code, match):
    import re

    output = tmp_path / "out"
    assert _in_process(workplace, output, *overrides) == code
    text = capfd.readouterr().err
    assert re.search(match, text, re.DOTALL), text
    assert "error[" in text and "Traceback" not in text
    assert not (output / "checkpoints").exists() or not any((output / "checkpoints").iterdir())
    return text


def _dataset(path, builder="chat_dataset"):
    return f"dataset={{_component_: torchmask.data.{builder}, source: {path}}}"


def test_an_empty_dataset(workplace, tmp_path, capfd):
    (tmp_path / "empty.jsonl").write_text("")
    _fails(workplace, tmp_path, capfd, _dataset(tmp_path / "empty.jsonl"), code=3, match=r"D05.*empty\.jsonl")


def test_a_row_without_the_columns_lists_those_found(workplace, tmp_path, capfd):
    (tmp_path / "odd.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    match = r"D04.*odd\.jsonl:1.*question.*reply"
    _fails(workplace, tmp_path, capfd, _dataset(tmp_path / "odd.jsonl", "instruct_dataset"), code=3, match=match)


def test_a_row_longer_than_max_seq_len(workplace, tmp_path, capfd):
    match = r"D09.*row \d+ of .*train\.jsonl has \d+ tokens, max_seq_len is 40.*truncate, split or drop"
    _fails(workplace, tmp_path, capfd, "packing.max_seq_len=40", code=3, match=match)


def test_no_trained_token_at_all_stops_before_training(workplace, tmp_path, capfd):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[0]) + "\n")
    _fails(workplace, tmp_path, capfd, _dataset(tmp_path / "none.jsonl"), code=3, match="D11")


def test_an_unknown_key_is_named_with_the_nearest(workplace, tmp_path, capfd):
    _fails(workplace, tmp_path, capfd, "bach_size=4", code=2, match=r"C0[12].*bach_size.*batch_size")


def test_choices_are_checked_before_anything_is_read(workplace, tmp_path, capfd):
    wrong = ["packing.strategy=bestfit", "dtype=bf61", "bf16_updates=none", "packing.over_length=cut"]
    text = _fails(workplace, tmp_path, capfd, *wrong, code=2, match=r"C03.*did you mean best_fit")
    assert text.count("error[C03]") == 4 and not (tmp_path / "out").exists()


def test_another_runs_output_folder(workplace, tmp_path, capfd, unbroken):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[0], copy)
    assert _in_process(workplace, copy) == 2
    assert "already holds a run" in capfd.readouterr().err


def test_a_truncated_weight_file_is_named(workplace, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    _fails(workplace, tmp_path, capfd, f"model.folder={base}", code=4, match=r"W01.*model\.safetensors")


def test_a_missing_weight_file(workplace, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    (base / "model.safetensors").unlink()
    _fails(workplace, tmp_path, capfd, f"model.folder={base}", code=4, match=r"W03.*model\.safetensors")


def test_weights_of_another_shape_name_the_tensor(workplace, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    match = r"W05.*mlp\.gate_proj\.weight: the file has \[64, 32\], the model \[48, 32\]"
    _fails(workplace, tmp_path, capfd, f"model.folder={base}", code=4, match=match)


def test_an_unknown_family_lists_the_known(workplace, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    (base / "config.json").write_text('{"model_type": "rwkv"}')
    _fails(workplace, tmp_path, capfd, f"model.folder={base}", code=4, match=r"'rwkv'.*known: .*llama")


def test_the_tokenizer_of_another_model(workplace, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    config = {**json.loads((base / "config.json").read_text()), "vocab_size": 100}
    save_pretrained(from_config(config), base)
    _fails(workplace, tmp_path, capfd, f"model.folder={base}", code=4, match=r"D15.*100 embeddings")


def test_the_validation_rows_are_checked_against_the_vocabulary_too(workplace, tmp_path, capfd):
    config = {**json.loads((workplace / "base/config.json").read_text()), "vocab_size": 200}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = f"model={{_component_: torchmask.models.from_config, config: {tmp_path}/config.json}}"
    folder = f"tokenizer.folder={workplace}/base"
    for name, text in (("low", "aaaa"), ("high", "a a a")):  # the blank is the byte-level token 220
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text * 5}) + "\n")
    train, val = (
        _dataset(tmp_path / f"{name}.jsonl", "text_completion_dataset").replace("}", ", add_eos: false}")
        for name in ("low", "high")
    )
    val = val.replace("dataset", "dataset_val", 1)
    _fails(workplace, tmp_path, capfd, model, folder, train, val, *ONE_STEP, code=4, match="D15.*200 embeddings")


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_a_clip_norm_that_would_not_clip_is_refused(workplace, tmp_path, capfd, value):
    _fails(workplace, tmp_path, capfd, f"clip_grad_norm={value}", code=2, match="C13.*clip_grad_norm")


def test_a_missing_question_file_is_found_before_anything_is_tokenised(workplace, tmp_path, capfd):
    source = f"evaluate={{source: {tmp_path}/none.json}}"
    _fails(workplace, tmp_path, capfd, source, code=3, match=r"D05.*none\.json")


def test_a_configuration_cannot_name_what_writes_files(workplace, tmp_path, capfd):
    target = tmp_path / "canary"
    writers = ("models.weights.save_weights", "models.save_pretrained", "training.loss_png", "training.write_record")
    for name in writers:
        component = f"metric_logger={{_component_: torchmask.{name}, folder: {target}}}"
        _fails(workplace, tmp_path, capfd, component, code=2, match="C07.*refused")
    assert not target.exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(workplace, tmp_path, capfd):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    model = from_pretrained(base)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)  # finite, as files must be, and too large for a product
    save_pretrained(model, base)
    _fails(workplace, tmp_path, capfd, f"model.folder={base}", code=5, match=r"R01.*step 1.*not updated")


def test_resuming_with_another_optimizer_shows_the_difference(workplace, tmp_path, capfd, unbroken):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[0], copy)
    assert _in_process(workplace, copy, "resume_from_checkpoint=true", "optimizer.lr=0.5") == 2
    assert "0.5" in capfd.readouterr().err


def test_resuming_a_finished_run_trains_nothing_more(workplace, tmp_path, unbroken, capfd):
    copy = tmp_path / "copy"
    shutil.copytree(unbroken[0], copy)
    assert _in_process(workplace, copy, "resume_from_checkpoint=true") == 0
    assert "already finished" in capfd.readouterr().out
    assert _losses(copy) == _losses(unbroken[0]) and _weights(copy) == _weights(unbroken[0])


def _children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_children(child)]
    return found
