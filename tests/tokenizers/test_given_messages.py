"""Messages that are none, or not as they should be: named by turn, with the way out."""

import re

import pytest

from torchmask import Message
from torchmask.errors import DataError
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.formats import NATIVE_FORMATS

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
USER = Message("user", "q")
TEXT_FIX = "give the message a text"
PART_FIX = '{"type": "text", "text": ...}'
CALLS_FIX = 'write calls as [{"type": "function"'


@pytest.mark.parametrize("chat_format", ["qwen3", "qwen2_5", "qwen3_instruct", None])
def test_no_content_beside_calls_is_empty_text(load, chat_format):
    def tokens(content):
        messages = [USER, Message("assistant", content, tool_calls=[CALL]), Message("tool", "r")]
        return load("qwen3", chat_format).tokenize_messages([*messages, Message("assistant", "a")])

    assert tokens(None) == tokens("")


@pytest.mark.parametrize("chat_format", ["qwen3", None], ids=["native", "template"])
@pytest.mark.parametrize(
    ("messages", "says", "fix"),
    [
        ([USER, Message("user", 5)], "the content of turn 2 of 2 (user) is '5' (int)", TEXT_FIX),
        ([Message("user", None)], "the content of turn 1 of 1 (user) is 'None' (NoneType)", TEXT_FIX),
        ([Message("user", [{"type": "image"}])], "part 1 of the content of turn 1 of 1 (user) has no text", PART_FIX),
        ([Message("user", [{"text": 5}])], "part 1 of the content of turn 1 of 1 (user) has 5 as its text", PART_FIX),
        ([Message("user", ["q"])], "part 1 of the content of turn 1 of 1 (user) is 'q' (str)", PART_FIX),
        ([{"role": "user", "content": "q"}], "turn 1 of 1 is \"{'role': 'user', 'content'", "Message(**row)"),
        (USER, "the conversation is", "put the message into a list"),
        ([Message(None, "q")], "the role of turn 1 of 1 is 'None'", "name the role: system, user"),
        ([Message("assistant", "a", reasoning=5)], "the reasoning of turn 1 of 1 is '5' (int)", PART_FIX),
        ([Message("assistant", "a", reasoning={})], "the reasoning of turn 1 of 1 has no text", PART_FIX),
        ([Message("assistant", "", tool_calls=[5])], "call 1 of turn 1 of 1 (assistant) is '5' (int)", CALLS_FIX),
        ([Message("assistant", "", tool_calls=[{"function": {}}])], "call 1 of turn 1 of 1 (assistant) is", CALLS_FIX),
        ([Message("assistant", "", tool_calls=None)], "tool_calls of turn 1 of 1 (assistant) is 'None'", CALLS_FIX),
    ],
)
def test_what_is_no_message_names_its_turn_and_the_way_out(load, chat_format, messages, says, fix):
    with pytest.raises(DataError, match=re.escape(says)) as raised:
        load("qwen3", chat_format).tokenize_messages(messages)
    assert raised.value.id == "D08" and fix in raised.value.fix


@pytest.mark.parametrize("name", [name for name in NATIVE_FORMATS if name != "chatml"])
@pytest.mark.parametrize("role", ["function", "narrator"])
def test_a_role_that_the_models_templates_know_nothing_of_is_refused(name, role):
    messages = [USER, Message("assistant", "a"), Message(role, "x")]
    with pytest.raises(DataError, match=f"turn 3 of 3 is from '{role}'|has 3 turns") as raised:
        NATIVE_FORMATS[name].write(messages, None, False)
    assert raised.value.id == "D07"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("llama3", "system, user, assistant, tool, ipython"),
        ("llama3_1", "system, user, assistant, tool, ipython"),
        ("qwen2_5", "system, user, assistant, tool"),
        ("qwen3", "system, user, assistant, tool"),
        ("phi4_mini", "system, user, assistant, tool"),
        ("phi3", "system, user, assistant"),
    ],
)
def test_a_refused_role_is_told_with_those_that_are_known(name, known):
    with pytest.raises(DataError, match=re.escape(f"the chat format '{name}' does not write; it writes {known}")) as e:
        NATIVE_FORMATS[name].write([Message("function", "x")], None, False)
    assert ("did you mean 'tool'?" in e.value.fix) == ("tool" in known)


def test_a_role_is_refused_on_the_fast_way_too(load):
    with pytest.raises(DataError, match="turn 2 of 2 is from 'function'"):
        load("qwen3", "qwen2_5").sketch([USER, Message("function", "x")])


def test_chatml_writes_any_role_as_its_template_does(load, folder_with):
    template = (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    )
    folder = folder_with("qwen3", ["tokenizer.json"], chat_template=template, eos_token="<|im_end|>")
    messages = [Message("narrator", "Once"), USER, Message("assistant", "a")]
    by_template = from_pretrained(folder).tokenize_messages(messages)
    assert load("qwen3", "chatml").tokenize_messages(messages) == by_template
