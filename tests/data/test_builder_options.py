"""What all builders share: exact signatures, options that contradict each other, jobs that can be sent away."""

import inspect
import json
import pickle
from dataclasses import fields

import pytest

from torchmask.data import (
    alpaca_dataset,
    builder_options,
    chat_dataset,
    instruct_dataset,
    segments_dataset,
    squad_dataset,
    squad_rows,
    text_completion_dataset,
    tokenized_dataset,
    workers,
)
from torchmask.data.builder_options import ConversationOptions, RowOptions, TextOptions
from torchmask.errors import ConfigError
from torchmask.tokenizers import from_pretrained

PAIR = {"input": "q", "output": "a"}
TALK = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
QUESTION = {"context": "Ann has a dog.", "question": "Who?", "answers": ["Ann"]}
ROWS = {
    instruct_dataset: (ConversationOptions, PAIR, {"new_system_prompt": "s"}),
    alpaca_dataset: (ConversationOptions, {"instruction": "q", "output": "a"}, {}),
    chat_dataset: (ConversationOptions, TALK, {"spans": [{"regex": "a", "train": "only"}]}),
    squad_dataset: (ConversationOptions, QUESTION, {}),
    text_completion_dataset: (TextOptions, {"text": "q: a"}, {"response_template": "q:"}),
    segments_dataset: (TextOptions, {"segments": [{"text": "a", "label": True}]}, {}),
    tokenized_dataset: (RowOptions, {"input_ids": [1, 5, 2]}, {}),
}
every_builder = pytest.mark.parametrize("builder", ROWS, ids=lambda builder: builder.__name__)


@every_builder
def test_a_builder_takes_the_shared_options_by_name_with_their_defaults(builder):
    parameters = inspect.signature(builder).parameters
    shared = {field.name: field.default for field in fields(ROWS[builder][0])}
    assert {name: parameters[name].default for name in shared} == shared
    assert "options" not in parameters and next(iter(parameters)) == "tokenizer"
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[1:])


@every_builder
def test_an_argument_that_a_builder_does_not_take_is_named(builder, char_tokenizer):
    with pytest.raises(TypeError, match=f"{builder.__name__}.*'max_row'"):
        builder(char_tokenizer(), source=[ROWS[builder][1]], max_row=3)


@every_builder
def test_a_number_of_rows_is_not_negative(builder, char_tokenizer):
    with pytest.raises(ConfigError, match="max_rows is -1") as raised:
        builder(char_tokenizer(), source=[ROWS[builder][1]], max_rows=-1)
    assert raised.value.id == "C13" and raised.value.fix


def test_questions_of_an_evaluation_are_counted_the_same():
    with pytest.raises(ConfigError, match="max_rows is -1"):
        squad_rows([QUESTION], max_rows=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"train_on_input": True, "roles_to_train": ["user"]},
        {"train_on_input": True, "masking_strategy": "train_on_last"},
        {"mask_history": True, "roles_to_train": ["user"]},
        {"mask_history": True, "masking_strategy": "train_on_all"},
        {"mask_history": True, "train_on_input": True},
    ],
)
def test_two_names_for_different_things_are_refused(char_tokenizer, options):
    with pytest.raises(ConfigError, match="=true contradicts") as raised:
        chat_dataset(char_tokenizer(), source=[TALK], **options)
    assert raised.value.id == "C09"


@pytest.mark.parametrize("weight", [1e40, 1e-40, float("nan"), True, "1"])
@pytest.mark.parametrize("key", ["weight", "boundary_weight"])
def test_a_stop_tokens_weight_fits_the_loss(char_tokenizer, key, weight):
    with pytest.raises(ConfigError, match=f"eos.{key} is"):
        chat_dataset(char_tokenizer(), source=[TALK], eos={key: weight})


def test_the_largest_weights_may_meet(char_tokenizer):
    turn = {"role": "assistant", "content": "a", "weight": 1e15}
    samples = chat_dataset(
        char_tokenizer(), source=[{"messages": [TALK["messages"][0], turn]}], eos={"weight": 1e15}
    )  # fmt: skip
    assert samples.weights[-1] == pytest.approx(1e30)


@every_builder
def test_what_a_builder_does_can_be_sent_to_a_spawned_worker(builder, assets, monkeypatch):
    chat_format = "chatml" if builder is chat_dataset else None
    tokenizer = from_pretrained(assets / "tokenizers" / ("qwen3" if chat_format else "stories260k"), chat_format)
    more = ROWS[builder][2] if tokenizer.has_chat_format or builder is not instruct_dataset else {}
    collect = builder_options.collect

    def sent(rows, parse, render, **options):
        return collect(rows, *pickle.loads(pickle.dumps((parse, render))), **options)

    here = builder(tokenizer, source=[ROWS[builder][1]], **more)
    monkeypatch.setattr(builder_options, "collect", sent)
    there = builder(tokenizer, source=[ROWS[builder][1]], **more)
    assert there.fingerprint == here.fingerprint


def test_spawned_workers_make_the_same_samples(assets, monkeypatch, tmp_path):
    tokenizer = from_pretrained(assets / "tokenizers/stories260k")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**QUESTION, "id": str(i)}) + "\n" for i in range(40)))
    options = {"source": str(tmp_path / "a.jsonl"), "prompt_template": "{context} {question}"}
    here = squad_dataset(tokenizer, **options)
    monkeypatch.setattr(workers, "START_METHOD", "spawn")
    assert squad_dataset(tokenizer, num_workers=1, **options).fingerprint == here.fingerprint


def test_a_field_holds_the_articles_of_a_data_set(char_tokenizer, tmp_path):
    articles = [{"paragraphs": [{"context": "Ann has a dog.", "qas": [{"question": "Who?", "answers": ["Ann"]}]}]}]
    (tmp_path / "a.json").write_text(json.dumps({"data": articles}))
    found = [squad_dataset(char_tokenizer(), source=str(tmp_path / "a.json"), field=f) for f in (None, "data")]
    assert found[0].fingerprint == found[1].fingerprint
