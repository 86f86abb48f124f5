"""Low-rank adapters in the recipes as users run them: exported, resumed, distributed, loaded, refused."""

import json
import random
import shutil
import signal

import pytest
import torch
from recipe_runs import (
    NUM_STEPS,
    REPO,
    RESUME,
    bits_of,
    conversation,
    dataset_of,
    kill_after_step,
    losses_of,
    make_pretrain_workplace,
    metrics_of,
    run_here,
    run_recipe,
    start_recipe,
    wait_for_step,
    without_last_step,
    write_rows,
)
from safetensors.torch import load_file

from torchmask.cli.main import main
from torchmask.models import from_config, from_pretrained, load_adapter, save_pretrained
from torchmask.tokenizers import from_pretrained as load_tokenizer

RANK, SCALE = 4, 32 / 4
LORA = (f"lora.rank={RANK}", "lora.dropout=0.1", "optimizer.lr=1e-2")
STILL = (*LORA, "lora.dropout=0")  # no random numbers: the same steps by other ways
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def trained(workplace, tmp_path_factory):
    """The output folder of a run from beginning to end by one process."""
    output = tmp_path_factory.mktemp("lora") / "out"
    assert run_here(workplace, output, *LORA) == 0
    return output


@pytest.fixture(scope="module")
def trained_two(workplace, tmp_path_factory):
    """The same by two processes."""
    output = tmp_path_factory.mktemp("lora_two") / "out"
    run_recipe(workplace, output, *LORA, "gradient_accumulation_steps=1", nproc=2)
    return output


def some_tokens(vocab_size=260):
    return torch.randint(0, vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model):
    tokens = some_tokens()
    return model.lm_head(model(tokens))


def hub_weights(folder):
    return load_file(folder / "model.safetensors")


def names_in_checkpoint(output):
    newest = max((output / "checkpoints").iterdir())
    return {part: {n for f in (newest / part).iterdir() for n in load_file(f)} for part in ("model", "optim")}


def products_of(adapter):
    """What an adapter in PEFT's layout adds to each weight of the Hub's, by its name; fp64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    assert scale == SCALE and config["r"] == RANK
    products = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = tensors[f"{stem}.lora_B.weight"]
            products[f"{stem.removeprefix('base_model.model.')}.weight"] = scale * b.double() @ a.double()
    return products


# What a run leaves


def test_training_learns(trained):
    losses = losses_of(trained)
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0] - 0.2


def test_final_is_the_base_with_the_adapter_merged(trained, workplace):
    base, merged = (from_pretrained(folder, dtype="fp64") for folder in (workplace / "base", trained / "final"))
    untouched = logits_of(base)
    assert load_adapter(base, trained / "adapter", base=workplace / "base") == 2 * len(LAYERS)
    assert (logits_of(base) - logits_of(merged)).abs().max() < 1e-5
    assert (untouched - logits_of(merged)).abs().max() > 0.1


def test_peft_and_transformers_load_both_and_agree(trained, workplace):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(load(workplace / "base"), trained / "adapter").eval()
    merged = load(trained / "final").eval()
    tokens = some_tokens()
    with torch.no_grad():
        expected = logits_of(from_pretrained(trained / "final"))
        assert (adapted(tokens).logits - expected).abs().max() < 1e-4
        assert (merged(tokens).logits - expected).abs().max() < 1e-4


def test_nothing_changes_but_by_the_adapters(trained, workplace):
    before, after = hub_weights(workplace / "base"), hub_weights(trained / "final")
    products = products_of(trained / "adapter")
    assert {name.split(".")[-2] for name in products} == set(LAYERS) and len(products) == 2 * len(LAYERS)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if name in products:
            assert (after[name] - weight).abs().max() > 1e-3, name
            assert (weight + products[name] - after[name]).abs().max() < 1e-6, name
        else:
            assert after[name].equal(weight), name


def test_a_checkpoint_holds_the_adapters_and_their_optimizer_and_no_base(trained):
    names = names_in_checkpoint(trained)
    assert {name.rpartition(".")[2] for name in names["model"]} == {"lora_a", "lora_b"}
    assert len(names["model"]) == 2 * 2 * len(LAYERS)
    assert names["optim"] and all("lora_" in name for name in names["optim"])


# Stopped, resumed, distributed


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(workplace, tmp_path, nproc, trained, trained_two):
    options = (*LORA, f"gradient_accumulation_steps={2 // nproc}")
    output = tmp_path / "out"
    process = start_recipe(workplace, output, *options, nproc=nproc)
    kill_after_step(output, random.Random().randint(1, NUM_STEPS - 2), process)
    if nproc == 1:
        assert run_here(workplace, output, *options, RESUME) == 0
    else:
        run_recipe(workplace, output, *options, RESUME, nproc=nproc)
    assert bits_of(output) == bits_of(trained if nproc == 1 else trained_two)


def test_sigterm_saves_exits_75_and_the_resumed_run_is_bit_for_bit_the_same(workplace, tmp_path, trained):
    output = tmp_path / "out"
    process = start_recipe(workplace, output, *LORA, "save_every_n_steps=null")
    wait_for_step(output, 2, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "stopped by SIGTERM" in text and "Traceback" not in text
    assert not (output / "adapter").exists()
    assert run_here(workplace, output, *LORA, "save_every_n_steps=null", RESUME) == 0
    assert bits_of(output) == bits_of(trained)


def test_two_processes_give_the_losses_of_one_to_rounding(workplace, tmp_path):
    assert run_here(workplace, tmp_path / "one", *STILL) == 0
    run_recipe(workplace, tmp_path / "two", *STILL, "gradient_accumulation_steps=1", nproc=2)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    one, two = (hub_weights(tmp_path / name / "final") for name in ("one", "two"))
    assert all((weight - two[name]).abs().max() < 1e-4 for name, weight in one.items())


def test_a_run_of_two_processes_goes_on_with_one(workplace, tmp_path, trained_two, capfd):
    output = without_last_step(trained_two, tmp_path / "out")
    assert run_here(workplace, output, *LORA, "gradient_accumulation_steps=1", RESUME) == 0
    assert f"going on after step {NUM_STEPS - 1}" in capfd.readouterr().out
    assert losses_of(output)[-1] == pytest.approx(losses_of(trained_two)[-1], rel=0.05)  # other elements drop out


def test_adapters_on_random_weights_resume_bit_for_bit(workplace, tmp_path):
    """There is no folder to read the weights below again: they are made again."""
    model = f"model={{_component_: torchmask.models.from_config, config: {workplace}/base/config.json}}"
    options = (*LORA, model, f"tokenizer.folder={workplace}/base")
    assert run_here(workplace, tmp_path / "whole", *options) == 0
    output = without_last_step(tmp_path / "whole", tmp_path / "out")
    assert run_here(workplace, output, *options, RESUME) == 0
    assert bits_of(output) == bits_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("lora.rank=8", "lora.rank: the checkpoint has 4, this run 8"),
        ("lora.targets=[q_proj]", "lora.targets: the checkpoint has None, this run ['q_proj']"),
        ("lora=null", "lora: the checkpoint has {"),
    ],
)
def test_other_adapters_are_refused_on_resume(workplace, tmp_path, capfd, trained, change, shown):
    output = without_last_step(trained, tmp_path / "out")
    assert run_here(workplace, output, *LORA, change, RESUME) == 2
    text = capfd.readouterr().err
    assert "error[K09]" in text and shown in text and "Traceback" not in text


def test_a_base_that_changed_underneath_is_refused_on_resume(workplace, tmp_path, capfd):
    base, output = tmp_path / "base", tmp_path / "out"
    shutil.copytree(workplace / "base", base)
    options = (*LORA, f"model.folder={base}")
    assert run_here(workplace, output, *options, "epochs=1") == 0
    model = from_pretrained(base)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight.add_(1e-3)
    save_pretrained(model, base)
    assert run_here(workplace, output, *options, "epochs=1", RESUME) == 2
    text = capfd.readouterr().err
    assert "error[K09]" in text and "base: the checkpoint has '" in text and "Traceback" not in text


# Together with other settings


def test_shared_prefixes_change_nothing_that_is_learned(workplace, tmp_path):
    rows = [conversation("Say the colour of the sky at " + "night" * (i % 3), f"{i} " * (1 + i % 4)) for i in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    everything = ("batch_size=40", "gradient_accumulation_steps=1", "epochs=5", "max_steps_per_epoch=1")
    for name in ("false", "true"):
        sharing = (f"packing.share_prefixes={name}", "lr_scheduler.num_warmup_steps=0")
        options = (*STILL, *everything, *sharing, dataset_of(tmp_path / "rows.jsonl"))
        assert run_here(workplace, tmp_path / name, *options) == 0
    plain, shared = (metrics_of(tmp_path / name) for name in ("false", "true"))
    assert len(plain) == 5 and plain[-1]["loss"] < plain[0]["loss"]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3), ("num_targets", 0)):
        assert [row[key] for row in shared] == pytest.approx([row[key] for row in plain], rel=tolerance), key


def test_activation_checkpointing_changes_no_bit_in_bf16_with_dropout(workplace, tmp_path):
    for enabled in ("false", "true"):
        switches = ("dtype=bf16", "compile=false", f"enable_activation_checkpointing={enabled}", "epochs=1")
        assert run_here(workplace, tmp_path / enabled, *LORA, *switches) == 0
    assert bits_of(tmp_path / "true") == bits_of(tmp_path / "false")
    adapter = load_file(tmp_path / "true/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}


ADDED = 'tokenizer.add_tokens=["<|think|>", "<|/think|>"]'


def test_new_tokens_are_learned_where_the_embedding_is_trained(workplace, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [conversation("a b c", f"<|think|> {i} <|/think|> yes") for i in range(40)])
    options = (*LORA, ADDED, "lora.also_train=[embed_tokens]", dataset_of(tmp_path / "rows.jsonl"))
    assert run_here(workplace, tmp_path / "whole", *options) == 0
    output = without_last_step(tmp_path / "whole", tmp_path / "out")
    assert run_here(workplace, output, *options, RESUME) == 0
    assert bits_of(output) == bits_of(tmp_path / "whole")

    final = output / "final"
    before, after = (hub_weights(f)["model.embed_tokens.weight"] for f in (workplace / "base", final))
    assert len(after) == load_tokenizer(final).vocab_size == len(before) + 1  # there was a row to spare
    assert (after[-2] - before[-1]).abs().max() > 1e-3 and (after[-1] - before.mean(0)).abs().max() > 1e-3
    assert "embed_tokens.weight" in names_in_checkpoint(output)["model"]
    base, merged = (from_pretrained(folder, dtype="fp64") for folder in (workplace / "base", final))
    load_adapter(base, output / "adapter", base=workplace / "base")
    assert base.embed_tokens.weight.equal(merged.embed_tokens.weight)
    assert (logits_of(base) - logits_of(merged)).abs().max() < 1e-5


@pytest.mark.parametrize("added", [ADDED, 'tokenizer.add_tokens=["<|think|>"]'])  # the second fits into a spare row
def test_new_tokens_that_nothing_would_train_are_refused_before_training(fails, added):
    fails(*LORA, added, code=2, match=r"C09.*lora\.also_train.*embed_tokens")


def test_pretrain_trains_adapters_and_resumes_bit_for_bit(tmp_path):
    place = make_pretrain_workplace(tmp_path, num_steps=6)
    assert run_here(place, tmp_path / "whole", *LORA) == 0
    losses = losses_of(tmp_path / "whole")
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert {n.rpartition(".")[2] for n in names_in_checkpoint(tmp_path / "whole")["model"]} == {"lora_a", "lora_b"}
    output = without_last_step(tmp_path / "whole", tmp_path / "broken")
    assert run_here(place, output, *LORA, RESUME) == 0
    assert bits_of(output) == bits_of(tmp_path / "whole")
    base, merged = (from_pretrained(folder, dtype="fp64") for folder in (place / "base", output / "final"))
    load_adapter(base, output / "adapter", base=place / "base")
    assert (logits_of(base) - logits_of(merged)).abs().max() < 1e-5


# Generating with adapters


def generate(checkpoint, asked, answers, *overrides):
    words = ["run", "generate", "--config", str(REPO / "configs/generate.yaml"), f"checkpoint_dir={checkpoint}"]
    options = ["tokenizer.chat_format=chatml", "max_new_tokens=12", "device=cpu", f"prompts_file={asked}"]
    return main([*words, *options, f"output_file={answers}", *overrides])


@pytest.fixture
def asked(tmp_path):
    write_rows(tmp_path / "asked.jsonl", [{"prompt": text} for text in ("red up", "no no yes", "down blue", "yes")])
    return tmp_path / "asked.jsonl"


def test_the_adapter_on_its_base_says_what_final_says(workplace, tmp_path, trained, asked):
    base, adapter = workplace / "base", f"adapter_dir={trained}/adapter"
    assert generate(trained / "final", asked, tmp_path / "merged.jsonl") == 0
    assert generate(base, asked, tmp_path / "adapted.jsonl", adapter) == 0
    assert generate(base, asked, tmp_path / "base.jsonl") == 0
    merged, adapted, plain = ((tmp_path / f"{name}.jsonl").read_text() for name in ("merged", "adapted", "base"))
    assert merged.count("\n") == 4 and adapted == merged != plain


def test_an_adapter_of_another_base_is_refused(workplace, tmp_path, trained, asked, capfd):
    other = tmp_path / "other"
    shutil.copytree(workplace / "base", other)
    save_pretrained(from_config(json.loads((other / "config.json").read_text()), seed=5), other)
    assert generate(other, asked, tmp_path / "answers.jsonl", f"adapter_dir={trained}/adapter") == 4
    text = capfd.readouterr().err
    assert "error[W09]" in text and str(trained / "adapter") in text and "Traceback" not in text


def test_a_folder_that_holds_no_adapter_is_refused(workplace, tmp_path, trained, asked, capfd):
    assert generate(workplace / "base", asked, tmp_path / "answers.jsonl", f"adapter_dir={trained}/final") == 4
    text = capfd.readouterr().err
    assert "error[W03]" in text and "adapter_config.json" in text and "Traceback" not in text


# Settings that make no adapter


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("lora.rank=0", r"C09.*lora\.rank.*rank is 0"),
        ("lora.dropout=1", r"C09.*lora\.dropout"),
        ("lora.alpha=0", r"C09.*lora\.alpha"),
        ("lora.rnak=8", r"C0[12].*lora\.rnak.*rank"),
        ("lora.rank=many", r"C03.*lora\.rank.*many"),
    ],
)
def test_values_that_make_no_adapter_are_refused_before_anything_is_read(fails, tmp_path, override, match):
    fails(override, code=2, match=match)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "known"), [("targets", LAYERS), ("also_train", ("embed_tokens", "lm_head", "attn_norm", "norm"))]
)
def test_an_unknown_name_lists_the_known(fails, key, known):
    text = fails(f"lora.{key}=[nope]", code=2, match=rf"C09.*lora\.{key}.*'nope'")
    assert all(name in text for name in known)
    assert ("embed_tokens" in text) == (key == "also_train")
