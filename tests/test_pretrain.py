"""The streaming recipe as users run it: one process or two, killed, stopped, resumed, to the end of its sources."""

import json
import random
import shutil
import signal

import pytest
from recipe_runs import (
    CONFIG,
    RECIPE,
    RESUME,
    bits_of,
    conversation,
    kill_after_step,
    losses_of,
    make_pretrain_workplace,
    metrics_of,
    run_here,
    run_recipe,
    start_recipe,
    wait_for_step,
    write_rows,
)

from torchmask.cli.main import main
from torchmask.config import load_recipe

NUM_STEPS = 10


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A user's folder for the recipe pretrain."""
    return make_pretrain_workplace(tmp_path_factory.mktemp("workplace"), num_steps=NUM_STEPS)


@pytest.fixture(scope="session")
def unbroken(workplace, tmp_path_factory):
    """Runs from beginning to end, by number of processes."""
    outputs = {}
    for nproc in (1, 2):
        outputs[nproc] = tmp_path_factory.mktemp(f"whole{nproc}") / "out"
        run_recipe(workplace, outputs[nproc], nproc=nproc)
    return outputs


def test_a_run_leaves_what_the_docs_promise_and_its_loss_falls(unbroken):
    output = unbroken[1]
    ledger = json.loads((output / "ledger.json").read_text())
    assert ledger["documents"] == sum(part["documents"] for part in ledger["parts"]) > 0
    for name in ("config.yaml", "run.json", "metrics.jsonl", "logs", "final", "loss.png", "masks.html"):
        assert (output / name).exists(), name
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
    rows = metrics_of(output)
    assert len(rows) == NUM_STEPS
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert "loss/eos" in rows[-1] and "loss/text" in rows[-1]


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_resumes_bit_for_bit(workplace, tmp_path, nproc, unbroken):
    output = tmp_path / "out"
    process = start_recipe(workplace, output, nproc=nproc)
    step = random.Random(f"kill {nproc}").randint(2, NUM_STEPS - 2)
    kill_after_step(output, step, process)
    run_recipe(workplace, output, RESUME, nproc=nproc)
    assert bits_of(output) == bits_of(unbroken[nproc])


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_exits_75_and_the_resumed_run_is_bit_for_bit_the_same(workplace, tmp_path, nproc, unbroken):
    output = tmp_path / "out"
    process = start_recipe(workplace, output, "save_every_n_steps=null", nproc=nproc)
    wait_for_step(output, 3, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "stopped by SIGTERM" in text and "Traceback" not in text
    run_recipe(workplace, output, "save_every_n_steps=null", RESUME, nproc=nproc)
    assert bits_of(output) == bits_of(unbroken[nproc])


def test_another_number_of_processes_is_refused_with_the_way_out(workplace, tmp_path, capfd, unbroken):
    output = tmp_path / "out"
    shutil.copytree(unbroken[2], output)
    assert run_here(workplace, output, RESUME, "num_steps=12") == 2
    text = capfd.readouterr().err
    assert "error[K08]" in text and "--nproc-per-node 2" in text and "Traceback" not in text


@pytest.mark.parametrize("change", ["window=25", "sources.0.weight=2", "repeat=false", "seed=1", "batch_size=1"])
def test_what_decides_the_data_cannot_change_on_the_way(workplace, tmp_path, capfd, unbroken, change):
    output = tmp_path / "out"
    shutil.copytree(unbroken[1], output)
    assert run_here(workplace, output, RESUME, change) == 2
    assert "error[K09]" in capfd.readouterr().err


def test_a_source_that_changed_on_the_way_is_refused(workplace, tmp_path, capfd, unbroken):
    output, source = tmp_path / "out", tmp_path / "text.jsonl"
    shutil.copytree(unbroken[1], output)
    source.write_text((workplace / "text.jsonl").read_text() + '{"text": "one more"}\n')
    assert run_here(workplace, output, RESUME, f"sources.0.dataset.source={source}") == 4
    assert "error[D18]" in capfd.readouterr().err


def test_more_steps_go_on_from_a_finished_run(workplace, tmp_path, unbroken, capfd):
    output = tmp_path / "out"
    shutil.copytree(unbroken[1], output)
    assert run_here(workplace, output, RESUME, f"num_steps={NUM_STEPS + 2}") == 0
    assert f"going on after step {NUM_STEPS}" in capfd.readouterr().out
    assert losses_of(output)[:NUM_STEPS] == losses_of(unbroken[1]) and len(metrics_of(output)) == NUM_STEPS + 2


def test_the_weights_of_the_mixture_are_those_of_what_was_trained(workplace, tmp_path, monkeypatch):
    recipe = load_recipe(workplace / RECIPE)
    seen = []
    collate = recipe.collate

    def watching(rows, pad_to=None):
        seen.extend(rows)
        return collate(rows, pad_to)

    monkeypatch.setattr(recipe, "collate", watching)
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"input_ids": [0, ord(name), 2]} for _ in range(30)])
    parts = ", ".join(
        f"{{dataset: {{_component_: torchmask.data.tokenized_dataset, source: {tmp_path}/{name}.jsonl}}, weight: {w}}}"
        for name, w in (("a", 0.75), ("b", 0.25))
    )
    options = [f"sources=[{parts}]", "window=40", "packing.max_seq_len=12", "num_steps=20", "save_every_n_steps=null"]
    assert run_here(workplace, tmp_path / "out", *options) == 0
    tokens = [token for pack in seen for token in pack.tokens.tolist()]
    counts = {name: tokens.count(ord(name)) for name in ("a", "b")}
    assert sum(counts.values()) == 20 * 2 * 4
    assert counts["a"] / sum(counts.values()) == pytest.approx(0.75, abs=0.02)


def test_validation_rows_are_measured_at_the_end_and_when_asked_for(workplace, tmp_path):
    val = f"dataset_val={{_component_: torchmask.data.chat_dataset, source: {workplace}/chat.jsonl}}"
    assert run_here(workplace, tmp_path / "out", val, "num_steps=5", "run_val_every_n_steps=2") == 0
    rows = metrics_of(tmp_path / "out")
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 5]
    assert rows[4]["val_loss"] < rows[1]["val_loss"]


TO_THE_END = ("repeat=false", "num_steps=null", "schedule_steps=30", "save_every_n_steps=null")


def trained_documents(monkeypatch, recipe):
    """Rows that are collated while the recipe runs, fillers left out."""
    seen, collate = [], recipe.collate

    def watching(rows, pad_to=None):
        seen.extend(row for row in rows if len(row) > 1)
        return collate(rows, pad_to)

    monkeypatch.setattr(recipe, "collate", watching)
    return seen


def test_sources_are_trained_to_their_last_row(workplace, tmp_path, capfd, monkeypatch):
    seen = trained_documents(monkeypatch, load_recipe(workplace / RECIPE))
    assert run_here(workplace, tmp_path / "out", *TO_THE_END, "batch_size=3") == 0
    out = capfd.readouterr().out
    rows, ledger = metrics_of(tmp_path / "out"), json.loads((tmp_path / "out/ledger.json").read_text())
    assert sum((row.positions == 0).sum() for row in seen) == 550 and len(seen) == ledger["rows"]
    assert len(rows) == -(-len(seen) // 3)
    assert "text.jsonl: 400 documents packed of 400 rows" in out and "chat.jsonl: 150 documents packed of 150" in out
    assert "step 10  loss" in out and "/30  " not in out
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == [f"step-{len(rows):08d}"]
    assert run_here(workplace, tmp_path / "out", *TO_THE_END, "batch_size=3", RESUME) == 0
    assert len(metrics_of(tmp_path / "out")) == len(rows)
    assert json.loads((tmp_path / "out/ledger.json").read_text()) == ledger


def test_no_rank_ends_before_the_last_row_of_all_is_trained(workplace, tmp_path):
    """Six windows of 100 rows of which rank 1 has the last, which is half empty: it goes on with fillers."""
    options = (*TO_THE_END, "window=100", "batch_size=4")
    run_recipe(workplace, tmp_path / "out", *options, nproc=2)
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    trained = sum(row["num_targets"] for row in metrics_of(tmp_path / "out"))
    assert ledger["documents"] == 550 and trained == ledger["trained"]
    assert sum(part["rows"] for part in ledger["parts"]) == 550


def test_less_than_a_step_is_a_step_and_a_process_may_have_no_window_at_all(workplace, tmp_path):
    run_recipe(workplace, tmp_path / "out", *TO_THE_END, "window=1000", "batch_size=200", nproc=2)
    rows, ledger = metrics_of(tmp_path / "out"), json.loads((tmp_path / "out/ledger.json").read_text())
    assert len(rows) == 1 and rows[0]["num_targets"] == ledger["trained"] and ledger["documents"] == 550


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_of_late_data_saves_the_place_and_another_policy_gets_over_it(workplace, tmp_path, nproc):
    source, output = tmp_path / "text.jsonl", tmp_path / "out"
    long = json.dumps({"text": "Geros works " * 200}) + "\n"
    source.write_text((workplace / "text.jsonl").read_text() + long)
    options = (*TO_THE_END, f"sources.0.dataset.source={source}")
    text = run_recipe(workplace, output, *options, nproc=nproc, expect=3)
    assert "error[D09]" in text and "text.jsonl:401" in text and "Traceback" not in text
    (saved,) = (output / "checkpoints").iterdir()
    assert f"step {int(saved.name[5:]):,} is saved" in text and int(saved.name[5:]) == len(metrics_of(output)) > 3
    dropping = (*options, "packing.over_length=drop")
    run_recipe(workplace, output, *dropping, RESUME, nproc=nproc)
    run_recipe(workplace, tmp_path / "whole", *dropping, nproc=nproc)
    assert bits_of(output) == bits_of(tmp_path / "whole")
    ledgers = [json.loads((folder / "ledger.json").read_text()) for folder in (output, tmp_path / "whole")]
    assert ledgers[0] == ledgers[1] and ledgers[0]["dropped_documents"]["over_length"]["count"] == 1


def test_a_source_whose_filter_keeps_nothing_is_told_at_once_and_in_the_ledger(workplace, tmp_path, capfd):
    row = {"messages": conversation("a", "b")["messages"], "lang": "fr"}
    write_rows(tmp_path / "fr.jsonl", [row] * 100)
    part = f"{{_component_: torchmask.data.chat_dataset, source: {tmp_path}/fr.jsonl, filter_fn: {{lang: en}}}}"
    assert run_here(workplace, tmp_path / "out", f"sources.1.dataset={part}", "num_steps=3") == 0
    out = capfd.readouterr().out
    assert "WARNING fr.jsonl gave no document to train on" in out
    assert "fr.jsonl: 0 documents packed of 0 rows, 0 % of all; its weight is 25 % of the rows" in out
    assert "rows skipped" in out and "of these rows were not trained: num_steps came first" in out


# Bad input: found before weights are loaded


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("sources.0.wieght=1", "did you mean 'sources.0.weight'"),
        ("sources.1.dataset.colum=x", "did you mean 'column_map'"),
        ("sources.1.weight=0", "sources.1.weight"),
        ("sources.1.weight=many", "'sources.1.weight'"),
        ("sources=[]", "there are none"),
        ("sources={a: 1}", "wants a list of dataset, weight"),
        ("sources.0.dataset._component_=os.system", "is refused"),
        ("num_steps=null", "repeated sources have no end"),
        ("window=0", "window is 0"),
        ("packing.strategy=bestfit", "did you mean best_fit"),
    ],
)
def test_wrong_keys_are_named_before_anything_is_read(fails, tmp_path, override, match):
    fails(override, code=2, match=match)
    assert not (tmp_path / "out").exists()


def test_an_open_end_needs_a_number_of_steps_for_the_schedule(fails):
    fails("num_steps=null", "repeat=false", code=2, match="schedule_steps")


def test_a_missing_source_is_found_by_the_run_and_by_validate(fails, workplace, tmp_path, capfd):
    override = f"sources.1.dataset.source={tmp_path}/none.jsonl"
    fails(override, code=3, match="none.jsonl")
    assert main(["validate", "--config", str(workplace / CONFIG), override]) == 2
    assert "sources.1.dataset.source" in capfd.readouterr().err


@pytest.mark.parametrize("argument", ["cache: true", "max_rows: 5"])
def test_arguments_that_need_all_rows_are_refused(fails, workplace, capfd, argument):
    dataset = f"{{_component_: torchmask.data.chat_dataset, source: {workplace}/chat.jsonl, {argument}}}"
    match = f"sources.1.dataset.{argument.split(':')[0]}"
    fails(f"sources.1.dataset={dataset}", code=2, match=match)
    assert main(["validate", "--config", str(workplace / CONFIG), f"sources.1.dataset={dataset}"]) == 2
    assert match in capfd.readouterr().err


def test_two_policies_for_what_happens_between_documents_are_found_by_validate(workplace, capfd):
    policy = "sources.1.dataset.eos_policy=boundary"
    assert main(["validate", "--config", str(workplace / CONFIG), policy]) == 2
    text = capfd.readouterr().err
    assert "error[C09]" in text and "sources.1.dataset.eos" in text and "eos.boundary_loss" in text


@pytest.mark.slow
def test_a_bad_row_far_into_a_source_ends_the_run_and_names_its_place(workplace, tmp_path):
    source = tmp_path / "text.jsonl"
    source.write_text((workplace / "text.jsonl").read_text() + "{\n")
    text = run_recipe(workplace, tmp_path / "out", *TO_THE_END, f"sources.0.dataset.source={source}", nproc=2, expect=3)
    assert "text.jsonl:401" in text and "not valid JSON" in text and "Traceback" not in text


def test_the_tokenizer_of_another_model_is_found_before_its_weights_are_read(fails, workplace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workplace / "base", base)
    config = {**json.loads((base / "config.json").read_text()), "vocab_size": 100}
    (base / "config.json").write_text(json.dumps(config))
    fails(f"model.folder={base}", code=4, match="100 embeddings")
