"""Templates whose prompt opens the thinking, and which drop thinking from answers: what is located, and what is told.

The templates are the published ones in short: DeepSeek-R1's distills and QwQ never write thinking, Qwen 3's thinking
models of 2507 write it in answers to the last question, Qwen 3.5 writes a think block there, an empty one too.
"""

import json

import pytest

from torchmask import Message
from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of
from torchmask.errors import DataError
from torchmask.tokenizers import from_pretrained

R1 = """{{- bos_token }}{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- '<|User|>' + message.content }}{%- endif -%}
    {%- if message.role == 'assistant' and message.content is none -%}
        {%- for call in message.tool_calls -%}
            {{- '<|Assistant|><|call|>' + call.function.name + '\\n' + call.function.arguments + '<|end_of_call|>' }}
        {%- endfor -%}{{- '<|eos|>' }}
    {%- endif -%}
    {%- if message.role == 'assistant' and message.content is not none -%}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] + '<|eos|>' }}
    {%- endif -%}
    {%- if message.role == 'tool' -%}{{- '<|output|>' + message.content }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' }}{%- endif -%}"""
QWQ = """{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].lstrip('\\n') }}
    {%- for call in message.tool_calls or [] -%}
        {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
    {%- endfor -%}
    {{- '<|im_end|>\\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""
QWEN = """{%- set last = namespace(question=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set last.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set thought = (message.reasoning_content or '') -%}{%- set content = message.content -%}
    {%- if message.role == 'assistant' and '</think>' in content -%}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.question and (WHEN) -%}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif -%}
    {{- content }}
    {%- for call in message.tool_calls or [] -%}
        {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
    {%- endfor -%}
    {{- '<|im_end|>\\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""
TEMPLATES = {
    "r1": R1,
    "qwq": QWQ,
    "qwen3_2507": QWEN.replace("WHEN", "loop.last or thought"),
    "qwen3_5": QWEN.replace("WHEN", "true"),
}
THINKING = "<think>\nso\n</think>\n\n"
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
MORE = (
    "<|User|>",
    "<|Assistant|>",
    "<|call|>",
    "<|end_of_call|>",
    "<|output|>",
    "<|eos|>",
    "<tool_call>",
    "</tool_call>",
)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory, make_tiny_tokenizer):
    """A small tokenizer with one of the templates and its control tokens."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        eos = "<|eos|>" if name == "r1" else "<|im_end|>"
        make_tiny_tokenizer(folder, chat_template=TEMPLATES[name], eos_token=eos, bos_token="<|endoftext|>")
        file = json.loads((folder / "tokenizer.json").read_text())
        size = 1 + max(token["id"] for token in file["added_tokens"])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        file["added_tokens"] += [
            {"id": size + i, "content": text, "special": "tool" not in text, **flags} for i, text in enumerate(MORE)
        ]
        (folder / "tokenizer.json").write_text(json.dumps(file))
        return from_pretrained(folder)

    return make


def talk(*answers):
    return [m for i, a in enumerate(answers) for m in (Message("user", f"q{i}"), Message("assistant", a))]


def trained(tokenizer, messages):
    tokens, mask = tokenizer.tokenize_messages(messages)
    return tokenizer.decode([token for token, flag in zip(tokens, mask, strict=True) if flag == 0], skip_special=False)


def documents(tokenizer, messages, unstable_template):
    found = documents_of(tokenizer, Conversation(messages), MaskPolicy(unstable_template=unstable_template), chat=True)
    return [tokenizer.decode(d.rendered.tokens[d.decision.mask == 0], skip_special=False) for d in found]


@pytest.mark.parametrize("name", ["r1", "qwq"])
@pytest.mark.parametrize("texts", [("a0",), ("a0", "a1"), ("a0", "", " a2 "), ("a<think>b", "a1")])
def test_answers_without_thinking_are_learnt_over_any_number_of_turns(tokenizer_of, name, texts):
    tokenizer = tokenizer_of(name)
    end = "<|eos|>" if name == "r1" else "<|im_end|>"
    expected = "".join(text + end for text in texts)
    assert trained(tokenizer, talk(*texts)) == expected
    assert documents(tokenizer, talk(*texts), "error") == [expected]


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_answers_in_history_all_is_located_that_the_template_writes_of_them(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    messages = [*talk(THINKING + "a0", THINKING + "a1", "a2"), Message("user", "q")]
    rendered = tokenizer.render(messages)
    shown = trained(tokenizer, messages)
    expected = {"r1": "\n\na0<|eos|>\n\na1<|eos|>a2<|eos|>"}.get(name, "a0<|im_end|>a1<|im_end|>a2<|im_end|>")
    assert shown == expected
    assert "".join(p.text for p in rendered.pieces).count("so") == 0


def test_the_text_that_thinking_leaves_is_not_taken_for_what_was_given(tokenizer_of):
    rendered = tokenizer_of("qwq").render(talk(THINKING + "a0", "a1"))
    own = [piece for piece in rendered.pieces if piece.kind == 1 and piece.text in ("a0", "a1")]
    assert [(piece.text, piece.offset, piece.served) for piece in own] == [("a0", -1, False), ("a1", 0, False)]


@pytest.mark.parametrize("name", ["r1", "qwq"])
@pytest.mark.parametrize("unstable_template", ["error", "expand"])
def test_thinking_that_a_template_never_writes_is_an_error_in_a_data_set(tokenizer_of, name, unstable_template):
    for messages in (talk(THINKING + "a0"), talk("a0", THINKING + "a1"), talk(THINKING + "a0", "a1")):
        with pytest.raises(DataError, match="thinks before it answers, which the chat template drops") as raised:
            documents(tokenizer_of(name), messages, unstable_template)
        assert raised.value.id == "D07"
        assert "a chat_template.jinja that keeps it" in raised.value.fix
    messages[1].masked = True
    assert len(documents(tokenizer_of(name), messages, unstable_template)) == 1


@pytest.mark.parametrize("name", ["qwen3_2507", "qwen3_5"])
@pytest.mark.parametrize("texts", [("a0", "a1"), (THINKING + "a0", THINKING + "a1"), (THINKING + "a0", "a1")])
def test_answers_that_history_shows_without_their_think_block_are_refused_or_expanded(tokenizer_of, name, texts):
    tokenizer = tokenizer_of(name)
    with pytest.raises(DataError, match=r"'<think>' .* at inference") as raised:
        documents(tokenizer, talk(*texts), "error")
    assert raised.value.id == "D14"
    assert "unstable_template to expand" in raised.value.fix
    expected = [text.removeprefix("<think>\n") if "so" in text else f"\n</think>\n\n{text}" for text in texts]
    found = documents(tokenizer, talk(*texts), "expand")
    assert [text.lstrip("\n") for text in found] == [f"{text}<|im_end|>".lstrip("\n") for text in expected]


@pytest.mark.parametrize("name", ["qwq", "qwen3_2507", "qwen3_5"])
def test_calls_in_history_are_located_behind_their_header(tokenizer_of, name):
    call = Message("assistant", "", tool_calls=[CALL])
    messages = [Message("user", "q"), call, Message("tool", "r"), Message("assistant", "a"), *talk(THINKING + "z")]
    written = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
    shown = trained(tokenizer_of(name), messages)
    last = "z" if name == "qwq" else "so\n</think>\n\nz"
    assert shown.replace(f"\n{written}", written) == f"{written}<|im_end|>a<|im_end|>{last}<|im_end|>"


def test_an_answer_to_a_tool_whose_prompt_shows_thinking_is_told_apart_from_other_headers(tokenizer_of):
    """Qwen 3.5 writes think blocks behind the last question, so the prompt differs from before the answer's header."""
    call = Message("assistant", "", tool_calls=[CALL])
    row = [Message("user", "q"), call, Message("tool", "r"), Message("assistant", "a")]
    tokenizer = tokenizer_of("qwen3_5")
    expected = [trained(tokenizer, row[:2]), trained(tokenizer, row)[len(trained(tokenizer, row[:2])) :]]
    found = documents(tokenizer, [*row, *talk(THINKING + "z")], "expand")
    assert found == [*expected, "so\n</think>\n\nz<|im_end|>"]


def test_calls_are_given_without_content_to_templates_that_ask_for_that(tokenizer_of):
    messages = [Message("user", "q"), Message("assistant", "", tool_calls=[CALL]), Message("tool", "r")]
    assert trained(tokenizer_of("r1"), messages) == '<|call|>f\n{"a": "x"}<|end_of_call|><|eos|>'
    with pytest.raises(DataError, match="turn 2 has tool_calls, which the chat template does not write"):
        tokenizer_of("r1").render([messages[0], Message("assistant", "t", tool_calls=[CALL])])


def test_what_follows_a_typed_header_is_no_answer(tokenizer_of):
    messages = [Message("user", "q<|im_start|>assistant\nx</think>"), *talk("a0", "a1")[1:]]
    assert trained(tokenizer_of("qwq"), messages) == "a0<|im_end|>a1<|im_end|>"
