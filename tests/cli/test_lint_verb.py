"""Every code of `torchmask lint`: data that triggers it, and the same data put right."""

import json
import re
import shutil
from pathlib import Path

import pytest

from torchmask.cli.main import main
from torchmask.data.lint import CODES

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def talk(*turns):
    """Turns of user and assistant by turns, or (role, content) each."""
    roles = ("user", "assistant")
    pairs = [turn if isinstance(turn, tuple) else (roles[i % 2], turn) for i, turn in enumerate(turns)]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


PLAIN = [talk("Who are you and where?", "Ada of Rome"), talk("When was that?", "in the spring, I think")]


@pytest.fixture
def lint(data_config, capsys):
    """Lints rows; returns the exit code and the findings by code."""

    def run(rows, *words, **options):
        code = main(["lint", "--json", "--config", data_config(rows, **options), *words])
        said = capsys.readouterr()
        assert said.out, said.err
        findings = json.loads(said.out)["findings"]
        return code, {finding["code"]: finding for finding in findings}

    return run


@pytest.fixture
def tokenizer_with(tmp_path, chatml_folder):
    """The tiny tokenizer with another chat template or other settings."""

    def make(template=None, **settings):
        folder = tmp_path / "tokenizer"
        shutil.copytree(chatml_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= settings | ({} if template is None else {"chat_template": template})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


def test_clean_data_has_no_findings_and_exit_code_zero(data_config, capsys):
    assert main(["lint", "--config", data_config(PLAIN)]) == 0
    assert capsys.readouterr().out.endswith("look.yaml: nothing suspicious found\n")


def test_tm001_no_trained_stop_token(lint):
    code, found = lint(PLAIN, dataset={"spans": [{"regex": "Ada|spring", "train": True}], "roles_to_train": ["user"]})
    assert code == 1 and found["TM001"]["level"] == "error"
    assert found["TM001"]["count"] == 2 and found["TM001"]["share"] == 1.0
    assert [place.rpartition(":")[2] for place in found["TM001"]["places"]] == ["1", "2"]
    assert "TM001" not in lint(PLAIN)[1]


def test_tm001_is_only_information_where_the_policy_asks_for_it(lint):
    code, found = lint(PLAIN, dataset={"eos_policy": "none"})
    assert code == 0 and found["TM001"]["level"] == "info"


def test_tm001_a_stop_token_that_generation_does_not_know(lint, monkeypatch):
    monkeypatch.setattr("torchmask.tokenizers.tokenizer.Tokenizer.stop_ids", (0,))
    _, found = lint(PLAIN)
    assert found["TM001"]["level"] == "warning" and "at which generation does not stop" in found["TM001"]["message"]


def test_tm002_bos_twice(lint, tokenizer_with):
    doubled = tokenizer_with("<|im_start|><|im_start|>" + CHATML + PROMPT, bos_token="<|im_start|>")
    code, found = lint(PLAIN, tokenizer=doubled)
    assert code == 1 and found["TM002"]["count"] == 2
    once = tokenizer_with(CHATML + PROMPT, bos_token="<|im_start|>")
    assert "TM002" not in lint(PLAIN, tokenizer=once)[1]


def test_tm003_rows_without_targets(lint):
    untrained = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    _, found = lint([*PLAIN, untrained])
    assert found["TM003"]["level"] == "warning" and found["TM003"]["count"] == 1
    assert found["TM003"]["places"][0].endswith(":3")
    code, found = lint([PLAIN[0], untrained, untrained])
    assert code == 1 and found["TM003"]["level"] == "error"
    assert "TM003" not in lint([*PLAIN, untrained], "--threshold", "TM003=0.5")[1]
    assert "TM003" not in lint(PLAIN)[1]


def test_tm003_counts_targets_that_truncation_took(lint):
    long = talk("a question that goes on and on " * 12, "yes")
    packing = {"max_seq_len": 48, "over_length": "truncate", "no_targets": "keep"}
    assert lint([*PLAIN, long], packing=packing)[1].get("TM003") is None  # kept without targets: not truncated away
    many = [*PLAIN] * 15 + [long]
    _, found = lint(many, "--threshold", "TM003=0.01", packing=packing | {"no_targets": "drop"})
    assert found["TM003"]["count"] == 1


def test_tm004_a_span_rule_that_matches_nothing_or_several_places(lint):
    code, found = lint(PLAIN, dataset={"spans": [{"name": "wrong", "regex": "Berlin", "weight": 2.0}]})
    assert code == 1 and found["TM004"]["level"] == "error" and "'wrong'" in found["TM004"]["message"]
    code, found = lint(PLAIN, dataset={"spans": [{"regex": "Ada", "weight": 2.0}]})
    assert code == 0 and found["TM004"]["level"] == "warning" and found["TM004"]["places"][0].endswith(":2")
    _, found = lint([PLAIN[0]], dataset={"spans": [{"regex": "[aeiou]", "weight": 2.0}]})
    assert found["TM004"]["level"] == "info" and "more than one place" in found["TM004"]["message"]
    assert "TM004" not in lint([PLAIN[0]], dataset={"spans": [{"regex": "Ada", "weight": 2.0}]})[1]


def test_tm005_tokens_across_an_edge(lint):
    rows = [talk("Say it.", 'Well: so {"answer": "Ada"}')]
    _, found = lint(rows, dataset={"spans": [{"regex": '"answer', "weight": 0.5}]})
    assert found["TM005"]["level"] == "warning" and found["TM005"]["count"] >= 1
    rule = [{"regex": '"answer', "weight": 0.5}]
    assert "TM005" not in lint(rows, dataset={"spans": rule, "straddle": "split"})[1]
    assert "TM005" not in lint(rows)[1]


FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
    "('' if m.role == 'system' and messages|length > 3 else m.content) + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
THREE = [talk(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]


def test_tm006_a_template_that_rewrites_history(lint, tokenizer_with):
    code, found = lint(THREE, tokenizer=tokenizer_with(FORGETFUL))
    assert code == 1 and found["TM006"]["level"] == "error"
    found = lint(THREE, tokenizer=tokenizer_with(FORGETFUL), dataset={"unstable_template": "expand"})[1]
    assert "TM006" not in found and "TM010" not in found
    assert "TM006" not in lint(THREE, tokenizer=tokenizer_with(CHATML + PROMPT))[1]


def test_tm007_tool_output_or_headers_trained(lint):
    rows = [talk("Add.", ("assistant", "calling"), ("tool", "4"), ("assistant", "It is 4"))]
    _, found = lint(rows, dataset={"masking_strategy": "train_on_all"})
    assert found["TM007"]["level"] == "warning" and "tool" in found["TM007"]["message"]
    _, found = lint(PLAIN, dataset={"train_on_header": True})
    assert "headers" in found["TM007"]["message"]
    assert "TM007" not in lint(rows)[1]


def test_tm008_special_token_text_in_user_content(lint):
    _, found = lint([*PLAIN, talk("What does <|im_end|> mean?", "It ends a turn")])
    assert found["TM008"]["level"] == "info" and found["TM008"]["places"][0].endswith(":3")
    assert "TM008" not in lint([*PLAIN, talk("What does it mean?", "It is written <|im_end|>")])[1]


def test_tm008_in_text_without_a_chat_format(lint):
    rows = [{"prompt": "What is <|im_end|>? ", "completion": "an end"}]
    _, found = lint(rows, component="instruct_dataset", dataset={"chat": False})
    assert found["TM008"]["count"] == 1


def test_tm009_cut_but_trained(lint):
    long = talk("Tell it all.", "a long story that goes on and on " * 12)
    _, found = lint([*PLAIN, long], packing={"max_seq_len": 64, "over_length": "truncate"})
    assert found["TM009"]["level"] == "warning" and found["TM009"]["count"] == 1
    assert "TM009" not in lint([*PLAIN, long], packing={"max_seq_len": 512})[1]


OTHER_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"


def test_tm010_the_trained_prompt_is_not_the_one_of_inference(lint, tokenizer_with):
    code, found = lint(PLAIN, tokenizer=tokenizer_with(CHATML + OTHER_PROMPT))
    assert code == 1 and found["TM010"]["level"] == "error" and "at inference" in found["TM010"]["message"]
    assert "TM010" not in lint(PLAIN, tokenizer=tokenizer_with(CHATML + PROMPT))[1]


def test_tm011_a_trained_token_outside_the_output_vocabulary(lint, tmp_path, chatml_folder):
    folder = tmp_path / "model"
    shutil.copytree(chatml_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    code, found = lint(PLAIN, f"model.folder={folder}")
    assert code == 1 and found["TM011"]["level"] == "error" and found["TM011"]["count"] > 2
    assert "TM011" not in lint(PLAIN)[1]


def test_tm012_rows_that_are_not_full(lint):
    rows = [talk("Who?", "Ada " * 12)] * 3
    _, found = lint(rows, packing={"max_seq_len": 120})
    assert found["TM012"]["level"] == "warning" and found["TM012"]["share"] < 0.7
    assert "TM012" not in lint(rows, "--threshold", "TM012=0.1", packing={"max_seq_len": 120})[1]
    assert "TM012" not in lint(rows, packing={"max_seq_len": 120, "strategy": "none"})[1]


def test_a_code_can_be_left_out(lint):
    rule = {"spans": [{"name": "wrong", "regex": "Berlin", "weight": 2.0}]}
    assert lint(PLAIN, "--ignore", "TM004", dataset=rule) == (0, {})


@pytest.mark.parametrize("words", [["--ignore", "TM404"], ["--threshold", "TM002=0.1"], ["--threshold", "TM003=many"]])
def test_unknown_codes_and_thresholds_are_refused(data_config, words, capsys):
    assert main(["lint", "--config", data_config(PLAIN), *words]) == 2
    assert "error[C16]" in capsys.readouterr().err


def test_a_finding_says_what_where_and_what_to_do(data_config, capsys):
    rule = {"spans": [{"name": "wrong", "regex": "Berlin", "weight": 2.0}]}
    assert main(["lint", "--config", data_config(PLAIN, dataset=rule)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("error[TM004] ") and "any of 2 rows" in lines[0]
    assert lines[1:4] == [
        "  rows: look.yaml.jsonl:1, look.yaml.jsonl:2",
        f"  fix: {CODES['TM004'].cure}",
        "  more: docs/lint.md#tm004",
    ]
    assert lines[-1].endswith("look.yaml: 1 findings, 1 errors")


def test_the_json_has_the_same_keys_whatever_is_found(data_config, capsys):
    main(["lint", "--json", "--config", data_config(PLAIN, dataset={"train_on_header": True})])
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {"config", "errors", "warnings", "thresholds", "findings"}
    assert said["findings"][0].keys() == {"code", "level", "message", "count", "share", "places", "title", "cure"}


def test_every_code_has_an_entry_in_the_docs():
    page = Path(__file__).resolve().parents[2] / "docs" / "lint.md"
    assert re.findall(r"^### (TM\d{3})$", page.read_text(encoding="utf-8"), flags=re.MULTILINE) == list(CODES)
