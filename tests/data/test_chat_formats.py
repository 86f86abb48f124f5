import json

import pytest

from torchmask.data.chat_formats import chat_format, openai_format, sharegpt_format
from torchmask.data.rows import Row, RowError


def openai(*turns, **columns):
    messages = [{"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) else turn for turn in turns]
    return Row("train.jsonl", 7, {"messages": messages, **columns})


def sharegpt(*turns, **columns):
    return Row("train.jsonl", 7, {"conversations": [{"from": f, "value": v} for f, v in turns], **columns})


def pairs(conversation):
    return [(message.role, message.text) for message in conversation.messages]


def fault(call, *args, **options):
    with pytest.raises(RowError) as caught:
        call(*args, **options)
    assert caught.value.where == "train.jsonl:7"
    return caught.value


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TALK = (("user", "a"), ("assistant", "b"))


def test_openai_messages_keep_role_and_content():
    found = openai_format(openai(("system", "s"), *TALK, ("user", "c"), ("assistant", "d")))
    assert pairs(found) == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert found.tools is None and all(message.masked is None for message in found.messages)


def test_developer_function_and_ipython_are_other_names_for_known_roles():
    found = openai_format(
        openai(("developer", "s"), ("user", "a"), ("assistant", "b"), ("function", "c"), ("ipython", "d"))
    )
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "tool", "tool"]


def test_a_tool_call_may_have_no_content():
    turns = ({"role": "assistant", "content": None, "tool_calls": [CALL]}, ("tool", "2"), ("assistant", "two"))
    found = openai_format(openai(("user", "a"), *turns))
    assert found.messages[1].text == "" and found.messages[1].tool_calls == [CALL]


def test_tools_may_be_a_list_or_its_text_and_bare_functions_are_wrapped():
    bare, wrapped = {"name": "add"}, {"type": "function", "function": {"name": "add"}}
    for tools in ([bare], [wrapped], json.dumps([bare])):
        assert openai_format(openai(*TALK, tools=tools)).tools == [wrapped]
    for nothing in (None, [], "", "[]"):
        assert openai_format(openai(*TALK, tools=nothing)).tools is None


@pytest.mark.parametrize(
    ("flags", "masked"),
    [({"weight": 0}, True), ({"weight": 1}, False), ({"weight": None}, None), ({"train": False}, True),
     ({"train": True}, False), ({"masked": True}, True), ({"weight": 0.0}, True)],
)  # fmt: skip
def test_a_row_says_itself_which_answers_are_learned(flags, masked):
    found = openai_format(openai(("user", "a"), {"role": "assistant", "content": "b", **flags}))
    assert found.messages[1].masked is masked


@pytest.mark.parametrize(
    "flags", [{"weight": float("nan")}, {"weight": True}, {"weight": "0"}, {"train": 0}, {"masked": "no"}]
)
def test_flags_of_another_type_are_refused(flags):
    error = fault(openai_format, openai(("user", "a"), {"role": "assistant", "content": "b", **flags}))
    assert error.id == "D08" and error.message.startswith(f"messages[1].{next(iter(flags))} is")


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "content": "b"}]
    assert openai_format(openai(("user", parts), ("assistant", "c"))).messages[0].text == "ab"


def test_an_image_part_is_named():
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]
    error = fault(openai_format, openai(("user", parts), ("assistant", "c")))
    assert error.message.startswith("messages[0].content[1] is of type 'image_url'")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("oops", "messages is the text 'oops', expected a list of turns"),
        (None, "messages is null, expected a list of turns"),
        (["hi"], "messages[0] is the text 'hi', expected an object"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "messages[1].content is null"),
        ([{"role": "user", "content": 3}], "messages[0].content is the number 3"),
        ([{"role": 3, "content": "a"}], "messages[0].role is the number 3"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
         "messages[1].tool_calls[0] is an object, expected a call"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_reported_with_its_json_path(messages, message):
    error = fault(openai_format, Row("train.jsonl", 7, {"messages": messages}))
    assert error.id == "D08" and error.message.startswith(message)


def test_a_turn_without_content_lists_its_keys():
    error = fault(openai_format, openai(("user", "a"), {"role": "assistant", "text": "b"}))
    assert (error.id, error.message) == ("D04", "messages[1] has no 'content'; keys found: role, text")


def test_an_empty_conversation_is_a_bad_row():
    assert fault(openai_format, openai()).cause == "empty_conversation"


def test_a_conversation_without_an_answer_is_a_bad_row():
    error = fault(openai_format, openai(("system", "s"), ("user", "a")))
    assert (error.id, error.cause) == ("D06", "no_assistant_turn") and "system, user" in error.message


def test_an_empty_answer_names_its_turn():
    error = fault(openai_format, openai(*TALK, ("user", "c"), ("assistant", " ")))
    assert error.id == "D06" and error.message == "messages[3]: the assistant's answer is empty (turn 4 of 4)"


def test_an_empty_answer_that_is_not_learned_is_no_fault():
    openai_format(
        openai(("user", "a"), {"role": "assistant", "content": "", "weight": 0}, ("user", "b"), ("assistant", "c"))
    )


def test_an_unknown_role_lists_those_allowed():
    error = fault(openai_format, openai(("user", "a"), ("bot", "b")))
    assert (error.id, error.message) == ("D07", "messages[1].role is the unknown role 'bot'")
    assert "system, user, assistant, tool" in error.fix


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((("user", "a"), ("user", "b"), ("assistant", "c")), "messages[1]: two user turns in a row"),
        ((("assistant", "a"), ("user", "b")), "messages[0]: the assistant speaks first"),
        ((("system", "s"), ("tool", "t"), ("assistant", "b")), "messages[1]: the tool speaks first"),
        ((("user", "a"), ("tool", "t"), ("assistant", "b")), "messages[1]: a tool answers the user"),
    ],
)
def test_roles_out_of_order_are_reported_with_the_roles_seen(turns, message):
    error = fault(openai_format, openai(*turns))
    assert error.id == "D07" and error.message.startswith(message)
    assert f"roles seen: {', '.join(role for role, _ in turns)}" in error.message


def test_answers_in_parts_and_a_last_word_of_the_user_are_in_order():
    openai_format(
        openai(("user", "a"), ("assistant", "b"), ("assistant", "c"), ("tool", "d"), ("tool", "e"), ("user", "f"))
    )


def test_sharegpt_speakers_become_roles():
    found = sharegpt_format(sharegpt(("system", "s"), ("human", "a"), ("gpt", "b")))
    assert pairs(found) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_a_function_call_becomes_a_tool_call_and_its_observation_a_tool():
    call = {"name": "add", "arguments": {"a": 1}}
    found = sharegpt_format(
        sharegpt(("human", "a"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "two"))
    )
    assert [m.role for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1].tool_calls == [{"function": call}] and found.messages[1].text == ""


def test_several_function_calls_may_stand_in_one_turn():
    calls = json.dumps([{"name": "a", "arguments": {}}, {"name": "b", "arguments": {}}])
    found = sharegpt_format(sharegpt(("human", "x"), ("function_call", calls), ("observation", "y"), ("gpt", "z")))
    assert [call["function"]["name"] for call in found.messages[1].tool_calls] == ["a", "b"]


def test_a_function_call_that_is_no_json_is_a_bad_row():
    error = fault(sharegpt_format, sharegpt(("human", "a"), ("function_call", "add(1)"), ("gpt", "b")))
    assert error.id == "D08" and error.message.startswith("conversations[1].value is not valid JSON")


def test_auto_tells_the_style_by_the_keys_and_not_by_the_column():
    assert pairs(chat_format(openai(*TALK))) == pairs(chat_format(sharegpt(("human", "a"), ("gpt", "b"))))
    swapped = Row("train.jsonl", 7, {"conversations": [{"role": r, "content": c} for r, c in TALK]})
    assert pairs(chat_format(swapped)) == list(TALK)


def test_auto_finds_the_turns_under_another_name():
    row = Row(
        "train.jsonl", 7, {"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "fns": "[]"}
    )
    found = chat_format(row, column_map={"messages": "dialog", "conversations": "dialog", "tools": "fns"})
    assert pairs(found) == list(TALK)


def test_auto_without_turns_reports_the_layouts():
    error = fault(chat_format, Row("train.jsonl", 7, {"prompt": "a", "completion": "b"}))
    assert error.id == "D04" and "use instruct_dataset" in error.fix


def test_the_real_tool_call_rows_are_all_readable(assets):
    rows = json.loads((assets / "data/glaive_toolcall_en_demo_150.json").read_text())
    found = [sharegpt_format(Row("glaive", i, values)) for i, values in enumerate(rows, 1)]
    assert len(found) == 150 and sum(bool(m.tool_calls) for c in found for m in c.messages) > 50
