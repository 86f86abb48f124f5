import pytest

from torchmask.data.formats import (
    ALPACA_PROMPT,
    ALPACA_PROMPT_NO_INPUT,
    alpaca_format,
    check_template,
    fill,
    instruct_format,
    with_system_prompt,
)
from torchmask.data.rows import Row, RowError
from torchmask.errors import ConfigError


def row(**values):
    return Row("train.jsonl", 7, values)


def pairs(conversation):
    return [(message.role, message.text) for message in conversation.messages]


def fault(call, *args, **options):
    with pytest.raises(RowError) as caught:
        call(*args, **options)
    assert caught.value.where == "train.jsonl:7"
    return caught.value


def test_instruct_rows_are_a_prompt_and_its_answer():
    assert pairs(instruct_format(row(input="q", output="a"))) == [("user", "q"), ("assistant", "a")]


def test_prompt_and_completion_are_taken_where_the_row_has_these():
    assert pairs(instruct_format(row(prompt="q", completion="a"))) == [("user", "q"), ("assistant", "a")]


def test_columns_can_have_other_names():
    found = instruct_format(row(q="1", a="2", input="no"), column_map={"input": "q", "output": "a"})
    assert pairs(found) == [("user", "1"), ("assistant", "2")]


def test_alpaca_rows_use_the_two_published_prompts():
    with_input = alpaca_format(row(instruction="Add.", input="1 2", output="3"))
    assert with_input.messages[0].text == ALPACA_PROMPT.replace("{instruction}", "Add.").replace("{input}", "1 2")
    assert with_input.messages[0].text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    for empty in ({"input": ""}, {"input": None}, {}):
        without = alpaca_format(row(instruction="Sing.", output="La", **empty))
        assert without.messages[0].text == ALPACA_PROMPT_NO_INPUT.replace("{instruction}", "Sing.")


def test_braces_in_a_row_are_not_read_as_a_template():
    found = alpaca_format(row(instruction="{input} {instruction}", input="{x}", output="{y}"))
    assert "### Instruction:\n{input} {instruction}\n\n### Input:\n{x}\n" in found.messages[0].text


def test_a_template_of_ones_own_replaces_both_prompts():
    found = alpaca_format(row(instruction="a", input="b", output="c"), prompt_template="<{instruction}|{input}>")
    assert found.messages[0].text == "<a|b>"


def test_a_template_may_hold_other_braces():
    assert fill('{"answer": {question}}', {"question": "x"}) == '{"answer": x}'


def test_a_template_without_its_columns_is_refused():
    with pytest.raises(ConfigError, match=r"does not contain \{question\}"):
        check_template("{context}", ("context", "question"))


def test_a_missing_column_lists_those_found_the_layouts_tried_and_the_nearest():
    error = fault(instruct_format, row(instruction="a", output="b", id=1))
    assert error.id == "D04" and "missing column 'input'" in error.message
    assert "columns found: instruction, output, id" in error.message
    assert "messages, ShareGPT, Alpaca" in error.message and "prompt-completion" in error.message
    assert "use alpaca_dataset" in error.fix


def test_rows_one_level_down_are_found_out():
    error = fault(instruct_format, row(version=1, rows=[{"input": "a", "output": "b"}]))
    assert "set field: rows" in error.fix


def test_unknown_columns_show_how_to_map_them():
    assert fault(instruct_format, row(q="a", a="b")).fix == (
        "name your columns: column_map: {input: YOUR_COLUMN, output: YOUR_COLUMN}"
    )


@pytest.mark.parametrize(("value", "found"), [(None, "null"), (4, "the number 4"), ([], "a list of 0"), (True, "true")])
def test_a_column_that_is_no_text_says_what_it_is(value, found):
    error = fault(instruct_format, row(input="a", output=value))
    assert (error.id, error.message) == ("D08", f"output is {found}, expected a text")


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_a_bad_row(answer):
    error = fault(instruct_format, row(input="a", output=answer))
    assert (error.id, error.cause) == ("D06", "empty_answer")


def test_half_a_surrogate_pair_is_no_text():
    error = fault(instruct_format, row(input="a\ud83d", output="b"))
    assert error.id == "D02" and "character 1" in error.message


def test_a_new_system_prompt_replaces_every_system_message():
    conversation = instruct_format(row(input="q", output="a"))
    once = with_system_prompt(conversation, "Be brief.")
    assert pairs(with_system_prompt(once, "Be kind.")) == [("system", "Be kind."), ("user", "q"), ("assistant", "a")]
    assert with_system_prompt(conversation, None) is conversation
