"""LLaMA-Factory's rows (its data/README.md): `history`, `system` and `tools` beside Alpaca and ShareGPT columns."""

import json

import numpy as np
import pytest

from torchmask.data import alpaca_dataset, chat_dataset
from torchmask.data.chat_formats import chat_format, openai_format, sharegpt_format
from torchmask.data.formats import ALPACA_PROMPT, ALPACA_PROMPT_NO_INPUT, alpaca_format
from torchmask.data.rows import Row, RowError
from torchmask.errors import ConfigError

HISTORY = [["first?", "one"], ["second?", "two"]]
ALPACA = {"instruction": "third?", "input": "", "output": "three", "system": "Be brief.", "history": HISTORY}
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}


def row(**values):
    return Row("train.json", 3, values)


def turns(conversation):
    return [(message.role, message.text) for message in conversation.messages]


def trained(tokenizer, samples, i=0):
    return tokenizer.text(samples[i].tokens[samples[i].trained])


def test_a_history_comes_in_front_as_turns_and_a_system_text_before_it():
    asked = ("first?", "second?", "third?")
    first, second, third = (ALPACA_PROMPT_NO_INPUT.replace("{instruction}", question) for question in asked)
    assert turns(alpaca_format(row(**ALPACA))) == [
        ("system", "Be brief."),
        ("user", first), ("assistant", "one"), ("user", second), ("assistant", "two"), ("user", third),
        ("assistant", "three"),
    ]  # fmt: skip


def test_earlier_questions_have_no_input_and_take_the_template_of_ones_own():
    values = {**ALPACA, "input": "more"}
    assert ALPACA_PROMPT.split("{")[0] in turns(alpaca_format(row(**values)))[-2][1]
    own = turns(alpaca_format(row(**values), prompt_template="{instruction}|{input}"))
    assert [text for role, text in own if role == "user"] == ["first?|", "second?|", "third?|more"]


@pytest.mark.parametrize("empty", [{}, {"history": [], "system": ""}, {"history": None, "system": None}])
def test_rows_without_history_and_system_are_as_before(empty):
    plain = {key: ALPACA[key] for key in ("instruction", "input", "output")}
    assert turns(alpaca_format(row(**plain, **empty))) == turns(alpaca_format(row(**plain)))


def test_the_columns_can_have_other_names():
    values = {"ask": "c?", "reply": "c", "before": [["a?", "b"]], "sys": "S"}
    names = {"instruction": "ask", "output": "reply", "history": "before", "system": "sys"}
    found = turns(alpaca_format(row(**values), column_map=names, prompt_template="{instruction}"))
    assert found == [("system", "S"), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "c")]


def test_answers_of_the_history_are_learned_and_mask_history_leaves_the_last(char_tokenizer, write):
    tokenizer = char_tokenizer()
    path = write("a.json", [ALPACA])
    assert trained(tokenizer, alpaca_dataset(tokenizer, source=path)) == "one|two|three|"
    assert trained(tokenizer, alpaca_dataset(tokenizer, source=path, mask_history=True)) == "three|"
    with pytest.raises(ConfigError, match="contradicts"):
        alpaca_dataset(tokenizer, source=path, mask_history=True, masking_strategy="train_on_all")


def test_a_new_system_prompt_replaces_the_rows_own(char_tokenizer, write):
    tokenizer = char_tokenizer()
    samples = alpaca_dataset(tokenizer, source=write("a.json", [ALPACA]), new_system_prompt="New.")
    text = tokenizer.text(samples.tokens)
    assert text.startswith("^#New.|#") and "Be brief" not in text


@pytest.mark.parametrize("key", ["history", "system", "tools"])
def test_what_needs_a_chat_format_is_refused_in_raw_rows(char_tokenizer, write, key):
    values = {"instruction": "a", "output": "b", key: {**ALPACA, "tools": json.dumps([TOOL])}[key]}
    with pytest.raises(RowError, match=f"the row has {key}, and rows are written raw") as caught:
        alpaca_dataset(char_tokenizer(chat=False), source=write("a.json", [values]))
    assert caught.value.id == "D08" and caught.value.where.endswith("a.json:1")


@pytest.mark.parametrize(
    ("history", "id", "text"),
    [
        ("q: a", "D08", "history is the text"),
        ([["q", "a", "b"]], "D08", r"history\[0\] is .*expected \[question, answer\]"),
        ([["q", "a"], "q"], "D08", r"history\[1\] is the text"),
        ([["q", None]], "D08", r"history\[0\]\[1\] is"),
        ([["q", " "]], "D06", r"history\[0\]\[1\] is empty"),
    ],
)
def test_a_history_that_is_none_is_refused_with_its_path(history, id, text):
    with pytest.raises(RowError, match=text) as caught:
        alpaca_format(row(**{**ALPACA, "history": history}))
    assert caught.value.id == id and caught.value.where == "train.json:3"


@pytest.mark.parametrize("read", [sharegpt_format, chat_format])
def test_a_system_column_comes_before_the_turns_of_sharegpt_rows(read):
    found = read(row(conversations=TURNS, system="S", tools=json.dumps([TOOL])))
    assert turns(found) == [("system", "S"), ("user", "q"), ("assistant", "a")]
    assert found.tools == [{"type": "function", "function": TOOL}]
    assert turns(read(row(conversations=TURNS, system="", tools=""))) == [("user", "q"), ("assistant", "a")]


def test_a_system_turn_wins_over_the_system_column():
    found = sharegpt_format(row(conversations=[{"from": "system", "value": "turn"}, *TURNS], system="column"))
    assert turns(found)[0] == ("system", "turn") and len(found.messages) == 3


@pytest.mark.parametrize("read", [openai_format, chat_format])
def test_a_system_column_works_beside_openai_messages_under_any_name(read):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = read(row(messages=talk, sys="S"), column_map={"system": "sys"})
    assert turns(found)[0] == ("system", "S")


def test_a_system_column_that_is_no_text_is_refused():
    with pytest.raises(RowError, match="system is the number 3"):
        sharegpt_format(row(conversations=TURNS, system=3))


def test_sharegpt_columns_reach_the_template_and_are_not_learned(assets, write):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/qwen3")
    call = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {}})}
    talk = [TURNS[0], call, {"from": "observation", "value": "seven"}, TURNS[1]]
    path = write("a.json", [{"conversations": talk, "system": "Be brief.", "tools": json.dumps([TOOL])}])
    for options, learned in (({}, 2), ({"mask_history": True}, 1)):
        [sample] = chat_dataset(tokenizer, source=path, **options)
        whole = tokenizer.decode(sample.tokens, skip_special=False)
        mine = tokenizer.decode(sample.tokens[sample.trained], skip_special=False)
        assert "Be brief." in whole and '"description": "adds"' in whole and "seven" in whole
        assert "Be brief." not in mine and "adds" not in mine and "seven" not in mine
        assert mine.count("<|im_end|>") == learned and ("<tool_call>" in mine) == (learned == 2)


def test_workers_read_histories_too(char_tokenizer, write):
    tokenizer = char_tokenizer()
    path = write("a.json", [ALPACA] * 40)
    one, two = (alpaca_dataset(tokenizer, source=path, num_workers=n) for n in (0, 2))
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.mask, two.mask)
