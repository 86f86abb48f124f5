import hashlib
import json

import numpy as np
import pytest

from torchmask.cli.main import main
from torchmask.cli.open_config import DataConfig, open_config
from torchmask.cli.prove import lay_out, leak_tests, target_keys


@pytest.fixture
def branching():
    """Rows of which several share a passage, and one is on its own."""
    passage = "The harbour of Lisbon was paved with pale stone, and ships came from many lands. "
    rows = [(passage + end, answer) for end, answer in (("Who?", "Ada"), ("When?", "in 1755"), ("Why?", "it burned"))]
    rows.append(("Something else altogether?", "yes, that too"))
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]


def prove(config, tmp_path, *words):
    file = tmp_path / "certificate.json"
    code = main(["prove", "--config", config, "-o", str(file), *words])
    return code, json.loads(file.read_text(encoding="utf-8"))


def test_packs_of_all_kinds_change_nothing_and_the_certificate_says_so(data_config, branching, tmp_path, capsys):
    spans = [{"name": "filler", "regex": "in", "visible": False}, {"regex": "burned", "weight": 0.3}]
    config = data_config(branching, dataset={"spans": spans})
    code, certificate = prove(config, tmp_path)
    assert code == 0 and certificate["holds"]
    kinds = {(result["layout"], result["attention"]) for result in certificate["results"]}
    assert kinds == {(l, a) for l in ("one a row", "flat", "shared") for a in ("dense", "sdpa")}
    assert len({result["targets"] for result in certificate["results"]}) == 1
    for result in certificate["results"]:
        assert result["max_nll_difference"] <= 1e-12 and result["max_gradient_difference"] <= 1e-10
        assert result["leaks"] == result["targets_missing"] == 0
    by_kind = {(r["layout"], r["attention"]): r for r in certificate["results"]}
    assert by_kind["shared", "dense"]["slots"] < by_kind["flat", "dense"]["slots"]
    assert by_kind["flat", "dense"]["leak_tests"] == 4 and by_kind["shared", "dense"]["leak_tests"] >= 4
    assert "all bounds hold" in capsys.readouterr().out


def test_shared_rows_with_a_bound_are_compared_with_flat_ones(data_config, branching, tmp_path):
    config = data_config(branching, packing={"share_prefixes": True, "max_share": 2})
    code, certificate = prove(config, tmp_path)
    assert code == 0 and len({result["layout"] for result in certificate["results"]}) == 3


def test_documents_that_see_each_other_miss_the_bounds(data_config, branching, tmp_path, capsys, monkeypatch):
    seeing = property(lambda data: {**data.values["packing"], "attention": "causal"})
    monkeypatch.setattr(DataConfig, "packing", seeing)
    code, certificate = prove(data_config(branching, packing={"strategy": "in_order"}), tmp_path)
    assert code == 1 and not certificate["holds"]
    [flat] = [r for r in certificate["results"] if (r["layout"], r["attention"]) == ("flat", "dense")]
    assert flat["max_nll_difference"] > 1e-6 and flat["leaks"] == 3  # the last has nobody behind it
    out = capsys.readouterr().out
    assert "A BOUND IS MISSED" in out and "shared rows were not measured: share_prefixes is true while" in out


def test_the_certificate_names_what_was_measured_by_hash(data_config, branching, tmp_path):
    config = data_config(branching)
    _, one = prove(config, tmp_path)
    source = tmp_path / "look.yaml.jsonl"
    assert one["data"]["sources"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    assert "tokenizer.json" in one["tokenizer"]["files"] and len(one["template"]["sha256"]) == 64
    assert {"torchmask", "torch", "python"} <= one["versions"].keys()
    _, again = prove(config, tmp_path)
    assert again == one
    _, other = prove(config, tmp_path, "dataset.masking_strategy=train_on_all")
    assert other["config"]["sha256"] != one["config"]["sha256"]
    assert other["data"]["fingerprint"] != one["data"]["fingerprint"]
    assert other["template"] == one["template"]


def test_so_many_documents_are_drawn_by_seed(data_config, branching, tmp_path):
    config = data_config(branching)
    drawn = [prove(config, tmp_path, "-n", "2", "--seed", seed)[1] for seed in ("0", "0", "1", "2", "3")]
    assert {certificate["documents"]["count"] for certificate in drawn} == {2}
    assert drawn[0] == drawn[1]
    assert len({certificate["data"]["measured"] for certificate in drawn}) > 1


@pytest.mark.parametrize(
    "words",
    [
        ["dataset.eos_policy=boundary"],
        ["dataset.eos_policy=virtual"],
        ["packing.strategy=split", "packing.max_seq_len=24"],
        ["packing.over_length=truncate", "packing.max_seq_len=48", "packing.no_targets=keep"],
    ],
)
def test_every_policy_can_be_proved(data_config, branching, tmp_path, words):
    code, certificate = prove(data_config(branching), tmp_path, *words)
    assert code == 0, certificate["results"]
    assert certificate["results"][0]["targets"] > 5


def test_ids_are_renumbered_where_the_vocabulary_costs_too_much(data_config, branching, tmp_path, monkeypatch):
    monkeypatch.setattr("torchmask.cli.prove.MAX_LOGITS", 1000)
    code, certificate = prove(data_config(branching), tmp_path)
    assert code == 0 and certificate["model"]["ids"] == "in use, renumbered"
    assert certificate["model"]["vocab_size"] < 150


def test_predictions_between_documents_are_not_compared(data_config, branching):
    data = open_config(data_config(branching, dataset={"eos_policy": "boundary"}))
    rows = lay_out(data, data.samples)[1].rows
    pack, keys = rows[0], target_keys(rows, 0)
    between = [p.slot + p.stop - p.start - 1 for p in rows.documents(0)]
    assert pack.labels[between[0]] >= 0 and (keys[between] == -1).all()
    assert len(np.unique(keys[keys >= 0])) == (keys >= 0).sum()


def test_a_shared_stretch_is_tested_against_everybody_else_only(data_config, branching):
    data = open_config(data_config(branching))
    rows = lay_out(data, data.samples)[2].rows
    tests = leak_tests(rows.documents(0), len(rows[0]))
    for changed, watched in tests:
        until = rows[0].visible_until[changed].max()
        assert not set(watched.tolist()) & set(range(int(changed[0]), int(until)))
