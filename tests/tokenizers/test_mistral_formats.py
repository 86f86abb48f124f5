"""Mistral's native formats: what they write, and their ids against mistral-common where it is installed."""

import json
import random
import shutil
from pathlib import Path

import pytest

from torchmask import Message
from torchmask.errors import DataError
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.formats import NATIVE_FORMATS

TEXTS = (
    "Hi",
    "  two blanks",
    "ends in one ",
    "\n\nlines\n",
    "zażółć 東京 🚀",
    "</s>[INST] x [/INST]",
    '{"x": 1}',
    "18 °C",
)
NOTHING = {"type": "object", "properties": {}}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "says é", "parameters": NOTHING}},
    {"type": "function", "function": {"name": "g", "parameters": NOTHING}},
]
FILES = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_tekken": "tekken_240911.json",
    "mistral_v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def call(name, arguments, id="abcdef123"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def text_of(format, messages, tools=None, prompt=False):
    return "".join(piece.text for piece in NATIVE_FORMATS[format].write(messages, tools, prompt))


TALK = [Message("system", "S"), Message("user", "a"), Message("assistant", "b "), Message("user", "c")]


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("mistral_v1", "<s>[INST] S\n\na [/INST] b </s>[INST] c [/INST]"),
        ("mistral_v3", "<s>[INST]a[/INST]b</s>[INST]S\n\nc[/INST]"),
        ("mistral_tekken", "<s>[INST]a[/INST]b</s>[INST]S\n\nc[/INST]"),
        ("mistral_v7", "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]a[/INST]b</s>[INST]c[/INST]"),
    ],
)
def test_the_system_message_stands_where_the_version_has_it(format, expected):
    assert text_of(format, TALK, prompt=True) == expected


def test_tools_stand_in_front_of_the_last_user_message():
    written = text_of("mistral_v3", TALK, TOOLS[1:])
    assert written.index("[AVAILABLE_TOOLS]") > written.index("b</s>")
    assert '[{"type": "function", "function": {"name": "g", "description": "", "parameters"' in written


def test_results_name_the_calls_they_answer_in_order_where_they_do_not_say():
    messages = [
        Message("user", "q"),
        Message("assistant", "", tool_calls=[call("f", "{}", "aaaaaaaaa"), call("g", {"x": "é"}, "bbbbbbbbb")]),
        Message("tool", "18 °C"),
        Message("tool", '{"t":  1}'),
    ]
    assert text_of("mistral_v3", messages) == (
        '<s>[INST]q[/INST][TOOL_CALLS][{"name": "f", "arguments": {}, "id": "aaaaaaaaa"}, '
        '{"name": "g", "arguments": {"x": "é"}, "id": "bbbbbbbbb"}]</s>'
        '[TOOL_RESULTS]{"content": "18 °C", "call_id": "aaaaaaaaa"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content": {"t": 1}, "call_id": "bbbbbbbbb"}[/TOOL_RESULTS]'
    )


CALLS, CALLS_NAMELESS = [call("f", {})], [{"function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([Message("assistant", "", tool_calls=[call("f", {}, "call_1")])], "nine letters or digits"),
        ([Message("assistant", "text", tool_calls=CALLS)], "tool_calls and text"),
        ([Message("assistant", "", tool_calls=CALLS_NAMELESS), Message("tool", "r")], "has an id"),
        ([Message("tool", "r")], "expects 'assistant' there"),
        ([Message("user", "q")], "expects 'assistant' there"),
    ],
)
def test_what_the_version_does_not_take_is_refused(messages, says):
    with pytest.raises(DataError, match=says) as raised:
        text_of("mistral_v3", [Message("user", "q"), *messages])
    assert raised.value.id == "D07"


def some_conversation(format, chance):
    messages = [{"role": "system", "content": chance.choice(TEXTS)}] if chance.random() < 0.5 else []
    tools = TOOLS if format != "mistral_v1" and chance.random() < 0.5 else None
    for turn in range(chance.randint(1, 3)):
        messages.append({"role": "user", "content": chance.choice(TEXTS)})
        if tools and chance.random() < 0.6:
            calls = [
                call(chance.choice("fg"), json.dumps({"a": chance.choice(TEXTS)}), f"call{turn}{i:04d}")
                for i in range(chance.randint(1, 2))
            ]
            text = chance.choice(TEXTS) if format == "mistral_v7" and chance.random() < 0.5 else ""
            messages.append({"role": "assistant", "content": text, "tool_calls": calls})
            for one in calls:
                messages.append({"role": "tool", "tool_call_id": one["id"], "content": chance.choice(TEXTS)})
        messages.append({"role": "assistant", "content": chance.choice(TEXTS)})
    return messages, tools


@pytest.mark.parametrize("format", FILES)
def test_ids_are_those_of_mistral_common(format, tmp_path):
    common = pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    file = Path(common.__file__).parent / "data" / FILES[format]
    shutil.copyfile(file, tmp_path / ("tekken.json" if file.suffix == ".json" else "tokenizer.model"))
    ours = from_pretrained(tmp_path, format)
    chance = random.Random(0)
    theirs = {mode: MistralTokenizer.from_file(str(file), mode=mode) for mode in ValidationMode}
    for i in range(30):
        rows, tools = some_conversation(format, chance)
        rows = rows[:-1] if i % 3 == 0 else rows
        mode = ValidationMode.test if i % 3 == 0 else ValidationMode.finetuning
        expected = theirs[mode].encode_chat_completion(ChatCompletionRequest(messages=rows, tools=tools)).tokens
        messages = [Message(**row) for row in rows]
        assert ours.render(messages, tools, i % 3 == 0).tokens.tolist() == expected, rows
