"""Chat templates of many families by the folder path: every answer located in context, or the error that says why not.

The templates are the published ones in short: what they do about turns, without their long texts.
"""

import json

import pytest

from torchmask import Message
from torchmask.errors import DataError
from torchmask.messages import TokenKind
from torchmask.tokenizers import from_pretrained

SMOLLM3 = """{%- set mode = "/think" -%}
{%- if messages[0].role == "system" and "/no_think" in messages[0].content -%}
    {%- set mode = "/no_think" -%}
{%- endif -%}
<|im_start|>system
Today Date: {{ strftime_now("%d %B %Y") }}
Reasoning Mode: {{ mode }}

{% if messages[0].role == "system" %}{{ messages[0].content.replace("/no_think", "").replace("/think", "").rstrip() }}
{% endif %}<|im_end|>
{% for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {{ "<|im_start|>assistant\\n" + ("" if mode == "/think" else "<think>\\n\\n</think>\\n") + content.lstrip("\\n")
           + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\\n" + ("" if mode == "/think" else "<think>\\n\\n</think>\\n") }}
{%- endif -%}"""

HARMONY = """{{- "<|start|>system<|message|>Current date: " + strftime_now("%Y-%m-%d") + "<|end|>" }}
{%- for message in messages -%}
    {%- if message.role == "user" -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "assistant" -%}
        {%- if "tool_calls" in message -%}
            {%- set call = message.tool_calls[0].function -%}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>"
                + (call.arguments | tojson) + "<|call|>" }}
        {%- elif loop.last and not add_generation_prompt -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif -%}
    {%- elif message.role == "tool" -%}
        {{- "<|start|>functions.f to=assistant<|channel|>commentary<|message|>" + (message.content | tojson) }}
        {{- "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" }}{%- endif -%}"""

GRANITE = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = "Today's Date: " + strftime_now('%B %d, %Y') + "." %}{%- set rest = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>
' }}
{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>
' }}{%- endif %}
{%- for message in rest %}
    {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>
' }}
    {%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}
{%- endfor %}"""

FALCON = """{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}
{%- if message.role == 'system' %}{{ 'System: ' }}{% elif message.role == 'user' %}{{ 'User: ' }}
{%- elif message.role == 'assistant' %}{{ 'Falcon: ' }}{% endif %}{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '\\n' + 'Falcon:' }}{% endif %}"""

DEEPSEEK = """{{- bos_token }}{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' and message.tool_calls -%}
        {%- for call in message.tool_calls -%}
            {{- '<|Assistant|><|tool_call_begin|>' + call.function.name + '\\n' + call.function.arguments }}
        {%- endfor -%}{{- '<|tool_call_end|>' + eos_token }}
    {%- elif message.role == 'assistant' -%}{{- '<|Assistant|>' + message.content + eos_token }}
    {%- elif message.role == 'tool' -%}{{- '<|tool_output|>' + message.content }}
    {%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|Assistant|>' }}{%- endif -%}"""

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
HARMONY_TOKENS = ("<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|channel|>")
DEEPSEEK_TOKENS = ("<|User|>", "<|Assistant|>", "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_output|>")
FAMILIES = {
    "smollm3": (SMOLLM3, "<|im_end|>", CHATML_TOKENS),
    "gpt_oss": (HARMONY, "<|return|>", HARMONY_TOKENS),
    "granite": (GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>")),
    "falcon": (FALCON, "<|endoftext|>", ()),
    "deepseek": (DEEPSEEK, "<|eos|>", DEEPSEEK_TOKENS),
}  # fmt: skip
TALK = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
CALLS = [
    Message("user", "q"),
    Message("assistant", "", tool_calls=[CALL]),
    Message("tool", "r"),
    Message("assistant", "a"),
]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory, make_tiny_tokenizer):
    """A small tokenizer with a family's template and control tokens."""

    def make(name, template=None):
        source, eos, tokens = FAMILIES[name]
        folder = tmp_path_factory.mktemp(name)
        make_tiny_tokenizer(folder, chat_template=template or source, eos_token=eos, bos_token="<|endoftext|>")
        file = json.loads((folder / "tokenizer.json").read_text())
        size = 1 + max(token["id"] for token in file["added_tokens"])
        known = {token["content"] for token in file["added_tokens"]}
        flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        new = [text for text in dict.fromkeys((eos, *tokens)) if text not in known]
        file["added_tokens"] += [{"id": size + i, "content": text, **flags} for i, text in enumerate(new)]
        (folder / "tokenizer.json").write_text(json.dumps(file))
        return from_pretrained(folder)

    return make


def trained(tokenizer, messages, **options):
    """The text of all that is learnt."""
    tokens, mask = tokenizer.tokenize_messages(messages, **options)
    return tokenizer.decode([token for token, flag in zip(tokens, mask, strict=True) if flag == 0], skip_special=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm3", "a1<|im_end|>a2<|im_end|>"),
        ("granite", "a1<|end_of_text|>a2<|end_of_text|>"),
        ("deepseek", "a1<|eos|>a2<|eos|>"),
        ("falcon", " a1 a2"),
        ("gpt_oss", "<|channel|>final<|message|>a1<|end|><|channel|>final<|message|>a2<|return|>"),
    ],
)
def test_every_answer_is_located_with_its_end_of_turn(tokenizer_of, name, expected):
    assert trained(tokenizer_of(name), TALK) == expected


def test_an_empty_think_block_of_the_prompt_is_not_learnt(tokenizer_of):
    messages = [Message("system", "Be brief. /no_think"), *TALK]
    assert trained(tokenizer_of("smollm3"), messages) == "a1<|im_end|>a2<|im_end|>"
    assert (
        trained(tokenizer_of("smollm3"), [messages[0], TALK[0], Message("assistant", "\n\na1\n")]) == "a1\n<|im_end|>"
    )


def test_a_call_with_an_end_of_its_own_is_located_and_stops_generation(tokenizer_of):
    tokenizer = tokenizer_of("gpt_oss")
    assert trained(tokenizer, CALLS) == (
        ' to=functions.f<|channel|>commentary json<|message|>{"a": "x"}<|call|><|channel|>final<|message|>a<|return|>'
    )
    stops = {tokenizer.control_tokens[text] for text in ("<|return|>", "<|call|>")}
    assert set(tokenizer.stop_ids) == stops  # <|end|> ends a channel too, after which the model goes on


def test_a_templates_next_header_is_no_end_of_turn(tokenizer_of):
    template = (
        "{% for m in messages %}<|User|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|User|>{% else %}{{ eos_token }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"turn 2 of 4 .* no end-of-turn token \(<\|eos\|>\) follows it"):
        tokenizer_of("deepseek", template).render(TALK)


def test_arguments_are_text_for_templates_that_fail_on_an_object(tokenizer_of):
    assert (
        trained(tokenizer_of("deepseek"), CALLS) == '<|tool_call_begin|>f\n{"a": "x"}<|tool_call_end|><|eos|>a<|eos|>'
    )


@pytest.mark.parametrize("name", ["smollm3", "granite", "falcon"])
def test_calls_that_a_template_drops_are_an_error_rather_than_an_empty_answer(tokenizer_of, name):
    with pytest.raises(DataError, match="turn 2 has tool_calls, which the chat template does not write") as raised:
        tokenizer_of(name).render(CALLS)
    assert raised.value.id == "D07"


def test_the_end_of_a_document_that_is_no_end_of_turn_is_eos(tokenizer_of):
    template = SMOLLM3 + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    rendered = tokenizer_of("smollm3", template).render(TALK)
    assert rendered.kinds[-1] == TokenKind.STRUCTURE  # not this tokenizer's EOS
    assert trained(tokenizer_of("smollm3", template), TALK) == "a1<|im_end|>a2<|im_end|>"


# answers in several parts

HARMONY_PARTS = HARMONY.replace(
    "{%- set call = message.tool_calls[0].function -%}",
    """{%- set call = message.tool_calls[0].function -%}
            {%- if message.content and message.thinking -%}{{- raise_exception("both") }}{%- endif -%}
            {%- set thought = message.thinking or message.content -%}
            {%- if thought -%}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + thought + "<|end|>" }}
            {%- endif -%}
""",
).replace(
    '{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}',
    """{%- if message.thinking -%}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif -%}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}""",
)
CALL_PART = '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a": "x"}<|call|>'


@pytest.mark.parametrize("thought", [{"content": "hm"}, {"content": "", "reasoning": "hm"}])
@pytest.mark.parametrize("num_before", [0, 1])
def test_a_call_behind_its_thinking_is_trained_up_to_its_own_end(tokenizer_of, thought, num_before):
    before = [Message("user", "q0"), Message("assistant", "a0")] * num_before
    tokenizer = tokenizer_of("gpt_oss", HARMONY_PARTS)
    messages = [*before, Message("user", "q"), Message("assistant", tool_calls=[CALL], **thought)]
    expected = "<|channel|>final<|message|>a0<|end|>" * num_before
    expected += f"<|channel|>analysis<|message|>hm<|end|>{CALL_PART}"
    assert trained(tokenizer, messages) == expected
    after = [Message("tool", "r<|call|>f"), Message("assistant", "", tool_calls=[CALL])]
    assert trained(tokenizer, [*messages, *after]) == expected + CALL_PART.removeprefix("<|start|>assistant")
    rendered = tokenizer.render(messages)
    own = rendered.kinds[rendered.turns == len(messages) - 1]
    assert own[-1] == TokenKind.END_OF_TURN and (own == TokenKind.END_OF_TURN).sum() == 1


TWO_TURNS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% if m.content %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% for call in m.tool_calls %}<|im_start|>assistant\n{{ CALL }}<|im_end|>\n{% endfor %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("call.function | tojson", '{"name": "f", "arguments": {"a": "x"}}'),
        ("call.function.name", "f"),
        ("call.function.arguments | tojson", '{"a": "x"}'),
        ("call.id", "id"),
        ("call.function.name if call.function.arguments == {'a': 'x'} else raise_exception('unknown')", "f"),
    ],
)
def test_every_call_of_a_message_is_trained_whatever_of_it_the_template_writes(tokenizer_of, written, shown):
    tokenizer = tokenizer_of("smollm3", TWO_TURNS.replace("CALL", written))
    call = {"id": "id", **CALL}
    messages = [Message("user", "q"), Message("assistant", "hm", tool_calls=[call, call]), *CALLS[2:]]
    part = f"<|im_start|>assistant\n{shown}<|im_end|>"
    assert trained(tokenizer, messages) == f"hm<|im_end|>\n{part}\n{part}a<|im_end|>"


def test_calls_that_no_mark_can_be_put_into_are_refused(tokenizer_of):
    known = (
        "'f!' if call.function.name == 'f' and call.function.arguments == {'a': 'x'} else raise_exception('unknown')"
    )
    tokenizer = tokenizer_of("smollm3", TWO_TURNS.replace("CALL", known))
    with pytest.raises(DataError, match=r"turn 2 of 4 .* the template looks into its calls") as raised:
        tokenizer.render(CALLS)
    assert raised.value.id == "D14"
    masked = Message("assistant", "", tool_calls=[CALL], masked=True)
    assert trained(tokenizer, [CALLS[0], masked, *CALLS[2:]]) == "a<|im_end|>"


def test_a_template_that_writes_one_of_two_calls_is_an_error(tokenizer_of):
    messages = [Message("user", "q"), Message("assistant", "", tool_calls=[CALL, CALL])]
    with pytest.raises(DataError, match="turn 2 has 2 tool_calls, of which the chat template writes 1") as raised:
        tokenizer_of("gpt_oss").render(messages)
    assert raised.value.id == "D07"


def test_an_answer_that_goes_on_in_a_part_which_is_not_found_is_refused(tokenizer_of):
    parts = "{% for part in m.content.split('--') %}<|im_start|>assistant\n{{ part }}<|im_end|>\n{% endfor %}"
    template = TWO_TURNS.replace("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", parts, 1)
    tokenizer = tokenizer_of("smollm3", template)
    with pytest.raises(DataError, match=r"turn 2 of 2 .* begins an answer once more") as raised:
        tokenizer.render([Message("user", "q"), Message("assistant", "a--b")])
    assert raised.value.id == "D14"
    assert trained(tokenizer, [Message("user", "q"), Message("assistant", "ab")]) == "ab<|im_end|>"
