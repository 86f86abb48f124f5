"""The verbs that need no recipe, and what every error looks like."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchmask.cli import catalog
from torchmask.cli.main import main

HEAVY = ("torch", "omegaconf", "yaml", "numpy", "rich", "huggingface_hub", "datasets", "jinja2")


@pytest.fixture
def built_in(tmp_path, monkeypatch):
    """A recipe and two configurations in place of the built-in ones."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    (tmp_path / "recipes" / "finetune.py").write_text('"""Fine-tune a model.\n\nMore.\n"""\n')
    (tmp_path / "configs" / "tiny" / "qa.yaml").write_text("# finetune: answers in JSON\nbase: ${here:base}\n")
    (tmp_path / "configs" / "tiny" / "free.yaml").write_text("# of no recipe\n")
    monkeypatch.setattr(catalog, "built_in_folder", lambda kind: tmp_path / kind)
    monkeypatch.setattr("torchmask.cli.copy.built_in_folder", lambda kind: tmp_path / kind)
    return tmp_path


@pytest.mark.parametrize("words", [["ls"], ["--help"], ["run", "--help"], ["cp", "--help"]])
def test_what_must_answer_at_once_imports_nothing_heavy(words):
    code = (
        "import sys; from torchmask.cli.main import main\n"
        f"assert main({words!r}) == 0\n"
        f"print('heavy:', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_ls_groups_configurations_under_their_recipe(built_in, capsys):
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["finetune", "Fine-tune", "a", "model."]
    assert lines[2].split() == ["tiny/qa", "answers", "in", "JSON"]
    assert lines[3].split() == ["-", "tiny/free", "of", "no", "recipe"]
    assert len({line.index(word) for line, word in zip(lines, ["WHAT", "Fine", "answers", "of no"])}) == 1  # aligned


def test_cat_prints_the_file(built_in, capsys):
    assert main(["cat", "finetune"]) == 0
    assert capsys.readouterr().out == (built_in / "recipes" / "finetune.py").read_text()


def test_cp_adds_the_suffix_and_keeps_meaning_of_files_beside_the_original(built_in, tmp_path, capsys):
    assert main(["cp", "tiny/qa", str(tmp_path / "mine")]) == 0
    assert "base: ${torchmask.configs:tiny/base}" in (tmp_path / "mine.yaml").read_text()


def test_cp_into_a_folder_keeps_the_name_and_no_clobber_keeps_the_file(built_in, tmp_path, capsys):
    folder = tmp_path / "new" / "deep"
    assert main(["cp", "finetune", str(folder / "r.py")]) == 2
    assert "--make-parents" in capsys.readouterr().err
    assert main(["cp", "finetune", str(folder / "r.py"), "--make-parents"]) == 0
    (folder / "finetune.py").write_text("mine")
    assert main(["cp", "finetune", str(folder), "-n"]) == 0
    assert (folder / "finetune.py").read_text() == "mine"


def test_unknown_names_are_answered_with_near_ones(built_in, capsys):
    assert main(["cat", "tiny/qq"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error[C11] there is no recipe or configuration 'tiny/qq'\n  fix: did you mean tiny/qa")
    assert error.rstrip().endswith("more: docs/errors.md#c11      (exit 2)")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("full_finetune_single_device", "`torchmask run finetune --config NAME`"),
        ("full_finetune_distributed", "`torchmask run --nproc-per-node N finetune --config NAME`"),
        ("lora_finetune_distributed", "LoRA is not there yet"),
        ("lora_dpo_single_device", "preference training (DPO) is not there yet"),
        ("quantize", "is not there yet"),
        ("eleuther_eval", "is not there yet"),
    ],
)
def test_torchtune_names_are_answered_with_what_to_type_here(built_in, capsys, name, answer):
    assert main(["run", name, "--config", "tiny/qa"]) == 2
    error = capsys.readouterr().err
    assert "torchtune's name" in error and answer in error


def test_unknown_recipes_and_configurations_have_no_traceback(built_in, capsys):
    assert main(["run", "finetun", "--config", "tiny/qa"]) == 2
    assert "did you mean finetune?" in capsys.readouterr().err
    assert main(["run", "finetune", "--config", "Tiny/QA"]) == 2
    assert "did you mean tiny/qa" in capsys.readouterr().err
    assert main(["run", "finetune", "--config", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert "there is no configuration file" in error and str(Path("nowhere.yaml").absolute()) in error


def test_a_wrong_verb_is_a_usage_error(capsys):
    assert main(["trian"]) == 2
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["run --help", "inspect --config tiny/qa", "inspect --config tiny/qa --json"])
def test_a_reader_that_leaves_is_no_error(words):
    command = f"set -o pipefail; {sys.executable} -m torchmask {words} | head -1"
    head = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert head.returncode == 0 and len(head.stdout.splitlines()) == 1 and head.stderr == ""


def test_validate_takes_overrides_after_its_options(capsys):
    assert main(["validate", "finetune", "--config", "tiny/qa", "epochs=2"]) == 0
    assert main(["validate", "finetune", "--config", "tiny/qa", "epochs=0"]) == 2
    assert "epochs" in capsys.readouterr().err
