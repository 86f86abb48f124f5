"""Conversations against stored ids and supervised positions, by native formats and by templates."""

from dataclasses import replace

import pytest

from torchmask import Message
from torchmask.errors import DataError
from torchmask.messages import TokenKind, default_mask
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.formats import NATIVE_FORMATS

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system is not false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
# mistral-common, version 3: tools and system message in the last user turn, answers without blanks at the end.
MISTRAL_V3_TEMPLATE = """{{- bos_token }}
{%- if messages[0].role == "system" %}{%- set system = messages[0].content ~ "\n\n" %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = "" %}{%- set rest = messages %}{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for message in rest %}{%- if message.role == "user" %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in rest %}
    {%- if message.role == "user" %}
        {%- if tools and loop.index0 == last.user %}
            {{- "[AVAILABLE_TOOLS]" + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST]" + (system if loop.index0 == last.user and system.strip() else "") + message.content + "[/INST]" }}
    {%- elif message.tool_calls %}
        {{- "[TOOL_CALLS][" }}
        {%- for call in message.tool_calls %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (", " if not loop.last else "") }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message.role == "assistant" %}{{- message.content.rstrip(" ") + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}' }}
        {{- "[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""


NATIVE = ("llama2", "llama3", "qwen3", "gemma", "mistral_v3")


def split_at_answers(pieces):
    """The pieces cut where each answer begins: header and content are encoded apart."""
    seen = set()
    result = []
    for piece in pieces:
        begins = piece.kind == TokenKind.CONTENT and piece.turn not in seen
        seen |= {piece.turn} if begins else set()
        result.append(piece._replace(apart=begins))
    return result


def supervised(rendered, messages):
    return [i for i, flag in enumerate(default_mask(rendered, messages)) if flag == 0]


def assert_equals_goldens(tokenizer, cases):
    assert cases
    for case in cases:
        asked = (case["messages"], case["tools"], case["add_generation_prompt"])
        rendered = tokenizer.render(*asked)
        assert rendered.tokens.tolist() == case["input_ids"], case["name"]
        assert supervised(rendered, case["messages"]) == case["supervised_positions"], case["name"]
        ends = [i for i, kind in enumerate(rendered.kinds) if kind == TokenKind.END_OF_TURN]
        assert [i for i in ends if i in case["supervised_positions"]] == [
            turn["end_of_turn_position"] for turn in case["assistant_turns"]
        ], case["name"]
        if case.get("boundary_straddling_positions"):
            assert rendered.num_straddlers >= len(case["boundary_straddling_positions"]), case["name"]
            apart = tokenizer.render(*asked, edit=split_at_answers)
            assert apart.tokens.tolist() == case["input_ids_split_at_assistant_start"], case["name"]
            assert supervised(apart, case["messages"]) == case["supervised_positions_split"], case["name"]
        if "hf_naive_ids" in case:
            assert rendered.tokens.tolist() != case["hf_naive_ids"], case["name"]


@pytest.mark.parametrize("name", NATIVE)
def test_native_formats_equal_the_published_ids_and_positions(load, golden_cases, name):
    assert_equals_goldens(load(name, name), golden_cases(name))


def test_qwen3_by_its_own_template_equals_the_published_ids_and_positions(load, golden_cases):
    assert_equals_goldens(load("qwen3"), golden_cases("qwen3"))


def test_every_golden_file_has_a_native_format(assets):
    found = {file.stem for file in (assets / "goldens").glob("*.json")}
    assert found <= set(NATIVE_FORMATS)
    assert found <= set(NATIVE)


def test_a_token_over_header_and_answer_is_counted_and_can_be_cut(load):
    tokenizer = load("qwen3", "qwen2_5")
    messages = [Message("user", "q"), Message("assistant", "\n\nanswer")]
    rendered, apart = tokenizer.render(messages), tokenizer.render(messages, edit=split_at_answers)
    straddler = tokenizer.encode("assistant\n\n\nanswer")[1]
    assert rendered.num_straddlers == 1
    assert apart.num_straddlers == 0
    assert rendered.tokens[supervised(rendered, messages)].tolist()[0] == straddler
    assert tokenizer.decode(apart.tokens[supervised(apart, messages)], skip_special=False) == "\n\nanswer<|im_end|>"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_both_llama2_files_make_the_same_conversations(folder_with, golden_cases, file):
    assert_equals_goldens(from_pretrained(folder_with("llama2", [file]), "llama2"), golden_cases("llama2"))


@pytest.mark.parametrize(
    ("name", "template", "config"),
    [
        ("llama2", LLAMA2_TEMPLATE, {}),
        ("llama3", LLAMA3_TEMPLATE, {}),
        ("llama3", LLAMA3_TEMPLATE, {"eos_token": "<|eot_id|>"}),
        ("gemma", GEMMA_TEMPLATE, {}),
    ],
)
def test_published_templates_equal_the_published_ids_and_positions(folder_with, golden_cases, name, template, config):
    folder = folder_with(name, ["tokenizer.model"], chat_template=template, **config)
    assert_equals_goldens(from_pretrained(folder), golden_cases(name))


def test_mistral_v3s_format_as_a_template_equals_the_published_ids_and_positions(folder_with, golden_cases):
    tokenizer = from_pretrained(folder_with("mistral_v3", ["tokenizer.model"], chat_template=MISTRAL_V3_TEMPLATE))
    moved = "system_multi_turn"  # its first answer was made for a prompt with the system message in it
    cases = golden_cases("mistral_v3")
    assert_equals_goldens(tokenizer, [case for case in cases if case["name"] != moved])
    (case,) = (case for case in cases if case["name"] == moved)
    with pytest.raises(DataError, match="turn 3 of 5") as raised:
        tokenizer.render(case["messages"])
    assert raised.value.id == "D14"
    shown = [replace(m, masked=True) if i == 2 else m for i, m in enumerate(case["messages"])]
    assert tokenizer.render(shown).tokens.tolist() == case["input_ids"]


@pytest.mark.parametrize(
    ("name", "template"),
    [("llama2", LLAMA2_TEMPLATE), ("llama3", LLAMA3_TEMPLATE), ("gemma", GEMMA_TEMPLATE)],
)
def test_template_and_native_format_agree_on_kinds_and_turns_of_every_message(
    folder_with, golden_cases, name, template
):
    folder = folder_with(name, ["tokenizer.model"], chat_template=template)
    by_template, native = from_pretrained(folder), from_pretrained(folder, name)
    for case in golden_cases(name):
        if case["add_generation_prompt"]:
            continue
        ours, theirs = native.render(case["messages"]), by_template.render(case["messages"])
        assert ours.kinds.tolist() == theirs.kinds.tolist(), case["name"]
        written = ours.kinds != TokenKind.STRUCTURE
        assert ours.turns[written].tolist() == theirs.turns[written].tolist(), case["name"]
        assert ours.content_starts[written].tolist() == theirs.content_starts[written].tolist(), case["name"]


def test_end_of_turn_of_a_template_is_a_stop_token(folder_with):
    tokenizer = from_pretrained(folder_with("gemma", ["tokenizer.model"], chat_template=GEMMA_TEMPLATE))
    assert tokenizer.stop_ids == (1, 107)
