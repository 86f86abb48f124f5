"""`torchmask validate`: what a configuration says of its tokenizer is held against the formats and the folder."""

import json
import shutil

import pytest

from torchmask.cli.main import main
from torchmask.config.built_in import built_in_folder

TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def problems(capsys):
    """Runs a command line that is to end with exit code 2, and gives what it said."""

    def run(*words):
        assert main(list(words)) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def bare_folder(tmp_path):
    """The tiny base without its chat template."""
    folder = tmp_path / "bare"
    shutil.copytree(built_in_folder("configs") / "tiny" / "base", folder)
    for file in folder.glob("*.jinja"):
        file.unlink()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("words", [["validate"], ["run", "finetune"]], ids=["validate", "run"])
def test_an_unknown_chat_format_is_found_before_anything_is_opened(problems, words):
    error = problems(*words, "--config", "tiny/qa", "tokenizer.chat_format=zephir", "model.folder=nowhere")
    assert "error[C06] command line: tokenizer.chat_format: unknown chat_format 'zephir'" in error
    assert "llama2, llama3" in error and "did you mean 'zephyr'?" in error


def test_an_unknown_chat_format_is_reported_beside_other_problems(problems):
    error = problems("validate", "--config", "tiny/qa", "tokenizer.chat_format=zephir", "seed=x", "bach=4")
    assert all(f"error[{id}]" in error for id in ("C01", "C03", "C06")) and "3 problems" in error


def test_an_unknown_chat_format_is_reported_beside_missing_files(problems):
    error = problems("validate", "--config", "tiny/qa", "tokenizer.chat_format=zephir", "dataset.source=./nowhere.json")
    assert "error[C06]" in error and "error[C15]" in error


def test_a_chat_format_that_is_referred_to_is_checked_where_it_leads(problems):
    error = problems("validate", "--config", "tiny/qa", "tokenizer.chat_format=${device}", "device=cpu")
    assert "unknown chat_format 'cpu'" in error


def test_a_format_whose_control_tokens_the_folder_lacks_is_found_with_those_that_fit(problems):
    error = problems("validate", "--config", "tiny/qa", "tokenizer.chat_format=llama3")
    assert "error[C06]" in error and "needs the control tokens <|begin_of_text|>" in error
    assert "those whose tokens this tokenizer has: zephyr, alpaca" in error


def test_a_chat_data_set_on_a_folder_without_a_template_is_found_with_formats_that_fit(
    problems, data_config, bare_folder, capsys
):
    config = data_config([TALK], tokenizer=bare_folder)
    error = problems("validate", "--config", config)
    assert "error[C09]" in error and "dataset: chat_dataset needs a tokenizer with a chat format" in error
    assert "(zephyr, alpaca fit this vocabulary)" in error
    assert "(zephyr, alpaca fit this vocabulary)" in problems("inspect", "--config", config)
    assert main(["validate", "--config", config, "tokenizer.chat_format=zephyr"]) == 0


def test_chat_asked_of_a_folder_without_a_template_is_found(problems, data_config, bare_folder):
    config = data_config([], component="instruct_dataset", tokenizer=bare_folder, dataset={"chat": True})
    assert "dataset.chat: chat=true, but the tokenizer has no chat format" in problems("validate", "--config", config)


def test_chat_asked_of_generation_is_found(problems, bare_folder):
    """The recipe's own key."""
    error = problems("validate", "--config", "generate", f"checkpoint_dir={bare_folder}", "prompt=Hi", "chat=true")
    assert "error[C09] command line: chat: chat=true, but the tokenizer has no chat format" in error
    assert "(zephyr, alpaca fit this vocabulary), or leave chat=true out" in error


def test_a_raw_data_set_needs_no_chat_format(data_config, bare_folder):
    config = data_config([], component="instruct_dataset", tokenizer=bare_folder)
    assert main(["validate", "--config", config]) == 0


def test_a_damaged_tokenizer_is_found(problems, data_config, bare_folder):
    (bare_folder / "tokenizer.json").write_text("")
    assert "error[C11]" in problems("validate", "--config", data_config([TALK], tokenizer=bare_folder))
