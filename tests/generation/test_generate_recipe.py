"""The recipe from checkpoint folder to terminal and output file, in this process."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from torchmask.errors import ConfigError, DataError, EnvironmentFault, WeightsError
from torchmask.generation import generate
from torchmask.models import from_config, from_pretrained, save_pretrained

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "generate.py"
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("generate_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(assets, tmp_path_factory):
    """A random model of 64 slots with the tokenizer of stories260k."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    save_pretrained(from_config(config, seed=1), folder)
    shutil.copyfile(assets / "tokenizers" / "stories260k" / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def chat_checkpoint(checkpoint, tmp_path_factory):
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML})
    )
    return folder


@pytest.fixture
def run(recipe, tmp_path, capsys):
    """Runs the recipe and returns what it printed and the records it wrote."""

    def run(folder, **options):
        output = tmp_path / "out" / "answers.jsonl"
        tokenizer = {"_component_": "torchmask.tokenizers.from_pretrained", "folder": str(folder)}
        options = {"max_new_tokens": 8, "output_file": str(output), "device": "cpu", **options}
        recipe.main(recipe.Config(str(folder), tokenizer, **options))
        return capsys.readouterr().out, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    return run


def _tokenizer(folder):
    from torchmask.tokenizers import from_pretrained as tokenizer_from

    return tokenizer_from(folder)


def test_a_prompt_is_continued_and_printed(run, checkpoint):
    printed, (record,) = run(checkpoint, prompt="Once upon a time")
    tokenizer = _tokenizer(checkpoint)
    prompt = tokenizer.encode("Once upon a time", add_bos=True)
    (expected,) = generate(from_pretrained(checkpoint), [prompt], max_new_tokens=8)
    assert "Once upon a time" + record["completion"] == tokenizer.decode(prompt + expected)
    assert record == {
        "prompt": "Once upon a time",
        "completion": record["completion"],
        "num_tokens": 8,
        "finish_reason": "length",
    }
    assert printed == record["completion"] + "\n"


def test_a_text_file_holds_a_prompt_a_line_and_batches_change_nothing(run, checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("One day\n\nThe red ball and the dog\nTim\n")
    options = {"prompts_file": str(file), "temperature": 1.0, "seed": 5}
    printed, records = run(checkpoint, **options, batch_size=3)
    assert [record["prompt"] for record in records] == ["One day", "The red ball and the dog", "Tim"]
    assert "[2/3] The red ball and the dog\n" + records[1]["completion"] in printed
    assert run(checkpoint, **options, batch_size=2)[1] == records


def test_rows_of_prompts_and_of_messages_are_chats_where_there_is_a_format(run, chat_checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": "Hi"}, {"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "No."}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, records = run(chat_checkpoint, prompts_file=str(file))
    assert [record["prompt"] for record in records] == ["Hi", turns, turns]  # an answer in the row is left out
    assert records[1]["completion"] == records[2]["completion"] != records[0]["completion"]

    tokenizer = _tokenizer(chat_checkpoint)
    from torchmask.messages import Message

    prompt = tokenizer.render([Message("user", "Hi")], add_generation_prompt=True).tokens.tolist()
    (expected,) = generate(from_pretrained(chat_checkpoint), [prompt], max_new_tokens=8, stop_ids=tokenizer.stop_ids)
    assert records[0]["completion"] == tokenizer.decode(expected)


def test_a_system_prompt_stands_before_prompts_and_in_place_of_the_rows_own(run, chat_checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    file.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"messages": turns}) + "\n")
    _, records = run(chat_checkpoint, prompts_file=str(file), system_prompt="Be brief.")
    assert records[0]["completion"] == records[1]["completion"]


def test_chat_false_takes_a_chat_model_for_plain_text(run, checkpoint, chat_checkpoint):
    _, (plain,) = run(checkpoint, prompt="Hi")
    _, (raw,) = run(chat_checkpoint, prompt="Hi", chat=False)
    _, (chat,) = run(chat_checkpoint, prompt="Hi")
    assert raw == plain != chat


def test_a_stop_text_is_not_part_of_the_completion(run, checkpoint):
    _, (free,) = run(checkpoint, prompt="Once", max_new_tokens=30)
    stop = free["completion"][10:12]
    _, (record,) = run(checkpoint, prompt="Once", max_new_tokens=30, stop=[stop])
    assert record["completion"] == free["completion"][: free["completion"].index(stop)]
    assert record["finish_reason"] == "stop" and record["num_tokens"] < 30


def test_completions_end_with_the_context(run, checkpoint):
    _, (record,) = run(checkpoint, prompt="Once", max_new_tokens=1000)
    prompt = _tokenizer(checkpoint).encode("Once", add_bos=True)
    assert (record["num_tokens"], record["finish_reason"]) == (64 - len(prompt), "length")


def test_one_prompt_is_streamed_to_a_terminal(run, checkpoint, monkeypatch):
    whole, _ = run(checkpoint, prompt="Once")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    pieces = []
    write = sys.stdout.write
    monkeypatch.setattr("sys.stdout.write", lambda text: pieces.append(text) or write(text), raising=False)
    streamed, _ = run(checkpoint, prompt="Once")
    assert streamed == whole == "".join(pieces)
    assert len([piece for piece in pieces if piece.strip()]) > 4


def test_a_stop_text_ends_a_streamed_completion_and_is_never_shown(run, checkpoint, monkeypatch):
    _, (free,) = run(checkpoint, prompt="Once", max_new_tokens=30)
    stop = free["completion"][10:14]
    whole, (record,) = run(checkpoint, prompt="Once", max_new_tokens=30, stop=[stop])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    streamed, (again,) = run(checkpoint, prompt="Once", max_new_tokens=30, stop=[stop])
    assert streamed == whole and again == record and stop not in streamed and record["num_tokens"] < 30


def test_a_stop_text_that_begins_with_a_blank_ends_completions_of_a_batch_at_their_first_token(
    run, recipe, checkpoint, tmp_path, monkeypatch
):
    (tmp_path / "prompts.txt").write_text("Once\nOne day\n")
    options = {"prompts_file": str(tmp_path / "prompts.txt"), "max_new_tokens": 30, "stop": [" n"]}
    lengths = []

    def saying_n(model, prompts, *, on_token, max_new_tokens, **_):
        """Completions of ▁n alone, until each is ended."""
        lengths.extend(next(n for n in range(1, 31) if on_token(i, 297) or n == 30) for i in range(len(prompts)))
        return [[297] * n for n in lengths]

    monkeypatch.setattr(recipe, "generate", saying_n)
    _, records = run(checkpoint, **options)
    assert lengths == [1, 1]
    assert [record["completion"] for record in records] == ["", ""]


def test_every_option_reaches_the_generation(run, recipe, checkpoint, monkeypatch):
    seen = {}
    monkeypatch.setattr(recipe, "generate", lambda model, prompts, **options: seen.update(options) or [[5]])
    options = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "seed": 11, "max_new_tokens": 8, "prefix": "bidirectional"}
    run(checkpoint, prompt="Once", **options)
    assert {name: seen[name] for name in options} == options
    assert tuple(seen["stop_ids"]) == _tokenizer(checkpoint).stop_ids and seen["max_seq_len"] == 64


def test_a_stop_token_of_the_folder_ends_a_completion(run, checkpoint, tmp_path):
    _, (free,) = run(checkpoint, prompt="Once")
    prompt = _tokenizer(checkpoint).encode("Once", add_bos=True)
    (ids,) = generate(from_pretrained(checkpoint), [prompt], max_new_tokens=8)
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, ids[4]]}))
    _, (record,) = run(folder, prompt="Once")
    assert record["num_tokens"] == ids.index(ids[4]) < free["num_tokens"] and record["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("content", "id", "where", "message"),
    [
        ("", "D05", "prompts.jsonl", "empty"),
        ('{"prompt": "Hi"}\n{"question": "Hi", "id": 3}\n', "D04", "prompts.jsonl:2", "question, id"),
        ('{"prompt": "Hi"}\n{"prompt": 3}\n', "D04", "prompts.jsonl:2", "prompt"),
        ('{"prompt": "Hi"}\n\n{"prompt": "Hi\n', "D01", "prompts.jsonl:3", "not valid JSON"),
        ('{"messages": "Hi"}\n', "D08", "prompts.jsonl:1", "messages"),
        ('{"messages": []}\n', "D06", "prompts.jsonl:1", "empty conversation"),
        (
            '{"messages": [{"role": "system", "content": "Be kind."}]}\n',
            "D06",
            "prompts.jsonl:1",
            "no message to answer",
        ),
        ('{"prompt": "Hi"}\n{"prompt": ""}\n', "D06", "prompts.jsonl:2", "prompt is empty"),
        ('{"messages": [{"role": "bot", "content": "Hi"}]}\n', "D07", "prompts.jsonl:1", "'bot'"),
        (
            '{"prompt": "Hi"}\n' + json.dumps({"prompt": "word " * 100}) + "\n",
            "D09",
            "prompts.jsonl:2",
            "max_seq_len is 64",
        ),
    ],
)
def test_a_bad_prompts_file_is_refused_with_its_row(run, chat_checkpoint, tmp_path, content, id, where, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        run(chat_checkpoint, prompts_file=str(file))
    assert caught.value.id == id and caught.value.where.endswith(where)


def test_a_prompts_file_that_is_not_there_is_named_with_its_whole_path(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file") as caught:
        run(checkpoint, prompts_file="some/prompts.jsonl")
    assert caught.value.id == "D05" and caught.value.where == str(tmp_path / "some" / "prompts.jsonl")


@pytest.mark.parametrize(
    ("options", "id", "message"),
    [
        ({}, "C05", "prompt or prompts_file"),
        ({"prompt": "Hi", "system_prompt": "Be kind."}, "C09", "system_prompt"),
        ({"prompt": "Hi", "chat": True}, "C06", "chat_format"),
        ({"prompt": "Hi", "temperature": -1.0}, "C13", "temperature"),
        ({"prompt": "Hi", "batch_size": 0}, "C13", "batch_size"),
        ({"prompt": "Hi", "stop": ["", "x"]}, "C13", "empty text"),
        ({"prompt": "Hi", "prompts_file": "a.txt"}, "C09", "both set"),
    ],
)
def test_options_that_do_not_go_together_are_refused(run, checkpoint, options, id, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(checkpoint, **options)
    assert caught.value.id == id


def test_an_output_file_that_cannot_be_written_is_named(run, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="the output file cannot be written") as caught:
        run(checkpoint, prompt="Hi", output_file=str(tmp_path / "file" / "answers.jsonl"))
    assert caught.value.id == "K05"


def test_the_prompts_are_not_overwritten_by_the_answers(run, checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hi\n")
    with pytest.raises(ConfigError, match="would be lost") as caught:
        run(checkpoint, prompts_file=str(prompts), output_file=str(tmp_path / "." / "prompts.txt"))
    assert caught.value.id == "C09"
    assert prompts.read_text() == "Hi\n"


def test_a_checkpoint_folder_that_is_not_there_is_named(run, tmp_path):
    with pytest.raises(WeightsError, match="no such file") as caught:
        run(tmp_path / "nowhere", prompt="Hi")
    assert caught.value.id == "W03" and str(tmp_path / "nowhere") in caught.value.where


def test_the_built_in_configuration_fits_the_recipe(recipe):
    from torchmask.config import load_config

    config = RECIPE.parents[1] / "configs" / "generate.yaml"
    cfg = load_config(config, recipe=RECIPE, overrides=["prompt=Hi"]).as_config(recipe.Config)
    assert cfg == recipe.Config(
        cfg.checkpoint_dir, {**cfg.tokenizer, "folder": cfg.checkpoint_dir, "chat_format": None}, prompt="Hi"
    )  # the file repeats the defaults for its readers: they must not differ
