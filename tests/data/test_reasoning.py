"""Reasoning that a row holds apart from the answer: read, written where the format thinks, ruled as a part."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from torchmask import Message
from torchmask.data import Conversation, MaskPolicy, PackedDataset, chat_dataset
from torchmask.data.bulk import Bulk
from torchmask.data.rendering import documents_of, render_segments
from torchmask.data.row_flags import RowError
from torchmask.errors import DataError
from torchmask.messages import MaskFlag, TokenKind
from torchmask.tokenizers import from_pretrained

THOUGHT = Message("assistant", "a", reasoning="think hard")
TALK = [Message("user", "q"), THOUGHT]
WRITTEN = "<think>\nthink hard\n</think>\n\na<|im_end|>"
NAMES = [("qwen3", None), ("qwen3", "qwen3"), ("llama3", "llama3"), ("qwen3", "qwen3_instruct"), ("qwen3", "chatml")]


@pytest.fixture(scope="module")
def load(assets):
    made = {}

    def make(name, chat_format=None):
        if (name, chat_format) not in made:
            made[name, chat_format] = from_pretrained(assets / "tokenizers" / name, chat_format)
        return made[name, chat_format]

    return make


@pytest.fixture(params=[None, "qwen3"], ids=["template", "native"])
def qwen(request, load):
    return load("qwen3", request.param)


def learnt(tokenizer, messages, **policy):
    documents = documents_of(tokenizer, Conversation(messages), MaskPolicy(**policy), chat=True)
    return [
        tokenizer.decode(d.rendered.tokens[d.decision.mask & MaskFlag.LOSS == 0], skip_special=False) for d in documents
    ]


def rows(*turns, style="openai"):
    if style == "openai":
        return [{"messages": [{"role": "user", "content": "q"}, *turns]}]
    return [{"conversations": [{"from": "human", "value": "q"}, *turns]}]


@pytest.mark.parametrize(
    ("turn", "style"),
    [
        ({"role": "assistant", "content": "a", "reasoning_content": "think hard"}, "openai"),
        ({"role": "assistant", "content": "a", "reasoning": "think hard"}, "openai"),
        ({"role": "assistant", "content": "a", "thinking": "think hard", "reasoning": None}, "openai"),
        ({"role": "assistant", "content": [{"type": "thinking", "thinking": "think hard"}, {"text": "a"}]}, "openai"),
        ({"role": "assistant", "content": [{"type": "reasoning", "text": "think hard"}, {"text": "a"}]}, "openai"),
        (
            {"role": "assistant",
             "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "think hard"}]}, {"text": "a"}]},
            "openai",
        ),
        ({"from": "gpt", "value": "a", "reasoning": "think hard"}, "sharegpt"),
    ],
)  # fmt: skip
def test_reasoning_in_a_field_of_its_own_is_learnt(qwen, turn, style):
    samples = chat_dataset(qwen, source=rows(turn, style=style))
    assert qwen.decode(samples[0].tokens[samples[0].mask == 0], skip_special=False) == WRITTEN


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ({"role": "assistant", "content": "a", "reasoning_content": {"text": "x"}}, "reasoning_content is an object"),
        ({"role": "assistant", "content": "a", "reasoning": "x", "thinking": "y"}, "different reasoning in"),
        ({"role": "assistant", "content": "<think>x</think>a", "reasoning": "x"}, "and in <think> of its text"),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, {"text": "a"}], "reasoning": "x"},
            "in its content and beside it",
        ),
        (
            {"role": "assistant", "content": [{"text": "a"}, {"type": "thinking", "thinking": "x"}]},
            "of type 'thinking'",
        ),
        ({"role": "user", "content": "a", "reasoning": "x"}, "is not the assistant"),
        ({"role": "assistant", "content": "", "reasoning": "x"}, "answer is empty"),
    ],
)
def test_reasoning_that_cannot_be_meant_is_refused(load, turn, what):
    with pytest.raises(RowError, match=what) as raised:
        chat_dataset(load("qwen3"), source=[{"messages": [{"role": "user", "content": "q"}, turn,
                                                          {"role": "assistant", "content": "b"}]}])  # fmt: skip
    assert raised.value.id in ("D06", "D08")


@pytest.mark.parametrize(
    ("name", "chat_format"), [("llama3", "llama3"), ("qwen3", "qwen3_instruct"), ("qwen3", "qwen3_nothink")]
)
def test_a_format_without_thinking_refuses_reasoning_rather_than_drop_it(load, name, chat_format):
    source = rows({"role": "assistant", "content": "a", "reasoning": "x"})
    with pytest.raises(
        DataError, match=f"reasoning beside its content, which the chat format '{chat_format}'"
    ) as raised:
        chat_dataset(load(name, chat_format), source=source)
    assert raised.value.id == "D07" and raised.value.where == ":1"


def test_raw_rows_have_no_place_for_reasoning(load):
    with pytest.raises(DataError, match="reasoning"):
        render_segments(load("llama3"), TALK, MaskPolicy())


def test_the_native_format_writes_what_the_template_does(load):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    talks = [
        TALK,
        [Message("user", "q"), Message("assistant", "\n\n a ", reasoning="\n  deep\n\n thought \n")],
        [Message("user", "q"), Message("assistant", "", reasoning="t", tool_calls=[call]), Message("tool", "r"),
         Message("assistant", "done", reasoning="u")],
        [Message("user", "q"), Message("assistant", "a<think>b</think>c", reasoning="t </think> t")],
        [*TALK, Message("user", "q2"), Message("assistant", "a2", reasoning="é🚀")],
    ]  # fmt: skip
    for talk in talks:
        talk = [replace(message, masked=True) for message in talk[:-1]] + talk[-1:]
        native, template = (load("qwen3", name).render(talk) for name in ("qwen3", None))
        assert native.tokens.tolist() == template.tokens.tolist()
        assert native.kinds.tolist() == template.kinds.tolist()
        said = native.kinds != TokenKind.STRUCTURE
        assert native.turns[said].tolist() == template.turns[said].tolist()
        if talk[1].text == talk[1].text.strip():  # marks stand inside of blanks at the ends
            assert native.content_starts.tolist() == template.content_starts.tolist()


@pytest.mark.parametrize("rule", [{"part": "reasoning"}, {"between": ["<think>\n", "\n</think>"], "name": "reasoning"}])
def test_reasoning_can_be_down_weighted_masked_and_hidden(qwen, rule):
    for say, weight, hidden in [({"weight": 0.125}, 0.125, 0), ({"train": False}, 0, 0), ({"visible": False}, 1, 2)]:
        [(rendered, decision)] = documents_of(
            qwen, Conversation(TALK), MaskPolicy(spans=({**rule, **say},)), chat=True
        )  # fmt: skip
        pieces = [qwen.decode([int(id)]) for id in rendered.tokens]
        inside = [pieces.index("think"), pieces.index(" hard")]
        weights = np.where(decision.mask & 1, 0, 1) if decision.weights is None else decision.weights
        assert weights[inside].tolist() == [weight] * 2 and weights[-2] == 1
        assert [i for i, flag in enumerate(decision.mask) if flag & MaskFlag.ATTENTION] == (inside if hidden else [])
        assert decision.spans[0].places == 1 and decision.spans[0].name == "reasoning"


@pytest.mark.parametrize(("straddle", "last"), [("overlap", ".\n"), ("inside", ""), ("split", ".")])
def test_a_token_over_the_edge_of_reasoning_goes_by_the_straddle_policy(qwen, straddle, last):
    talk = [TALK[0], Message("assistant", "a", reasoning="it is so.")]
    only = ({"part": "reasoning", "train": "only"},)
    assert learnt(qwen, talk, straddle=straddle, spans=only) == [f"it is so{last}<|im_end|>"]


def test_a_tag_rule_covers_reasoning_with_its_tags(qwen):
    assert learnt(qwen, TALK, spans=({"tag": "think", "train": False},)) == ["\n\na<|im_end|>"]


def test_a_reasoning_part_has_its_own_say(qwen):
    part = {"type": "thinking", "thinking": "think hard", "weight": 0.5, "visible": False}
    samples = chat_dataset(qwen, source=rows({"role": "assistant", "content": [part, {"text": "a"}]}))
    pieces = [qwen.decode([int(id)]) for id in samples[0].tokens]
    assert samples[0].weights[[pieces.index("think"), pieces.index("a")]].tolist() == [0.5, 1.0]
    assert samples[0].mask[[pieces.index(" hard"), pieces.index("a")]].tolist() == [2, 0]
    assert [samples.rule_names[r] for r in samples[0].rules][pieces.index("think")] == "part"


def test_own_characters_and_parts_still_count_in_the_answer(qwen):
    message = Message("assistant", [{"text": "ab"}, {"text": " cd", "name": "end"}], reasoning="think hard")
    for rule in ({"chars": [2, 5]}, {"part": 1}, {"part": -1}, {"part": "end"}, {"chars": [-3, None]}):
        assert learnt(qwen, [TALK[0], message], spans=({**rule, "train": "only"},)) == [" cd<|im_end|>"]


def test_earlier_turns_lose_reasoning_so_the_row_is_refused_or_expanded(qwen):
    talk = [*TALK, Message("user", "q2"), THOUGHT]
    with pytest.raises(DataError) as raised:
        documents_of(qwen, Conversation(talk), MaskPolicy(), chat=True)
    assert raised.value.id == "D14"
    assert learnt(qwen, talk, unstable_template="expand") == [WRITTEN] * 2
    assert learnt(qwen, talk, masking_strategy="train_on_last") == [WRITTEN]


def test_a_row_with_reasoning_in_a_batch_is_the_row_alone(qwen):
    alone = chat_dataset(qwen, source=rows({"role": "assistant", "content": "a", "reasoning": "think hard"}))
    plain = rows({"role": "assistant", "content": "b"})
    both = chat_dataset(qwen, source=[*plain, *rows({"role": "assistant", "content": "a", "reasoning": "think hard"})])
    assert both[1].tokens.tolist() == alone[0].tokens.tolist() and both[1].mask.tolist() == alone[0].mask.tolist()
    bulk = Bulk.of(partial(documents_of, qwen, policy=MaskPolicy(), chat=True))
    assert isinstance(bulk.write(Conversation(TALK)), list)  # written out, not sketched without it


def test_the_loss_of_reasoning_is_a_group_of_its_own(load):
    torch = pytest.importorskip("torch")
    from torchmask.training import LossGroups

    source = rows({"role": "assistant", "content": "a", "reasoning": "think hard"})
    samples = chat_dataset(load("qwen3"), source=source, spans=[{"part": "reasoning", "weight": 0.1}])
    packs = PackedDataset(samples, max_seq_len=64)
    row = packs[0]
    groups = LossGroups(packs.rule_names)
    slots = torch.tensor(np.flatnonzero(row.labels != -100))
    is_thought = np.isin(row.labels[row.labels != -100], load("qwen3").encode("think hard"))
    groups.add(torch.tensor(row.rules)[None], slots, torch.tensor(np.where(is_thought, 3.0, 1.0)))

    class Run:
        def agree(self, *values):
            return values

    found = groups.take(Run())
    assert found["loss/reasoning"] == 3.0 and found["loss/eos"] == 1.0


HARMONY = """{%- for message in messages -%}
    {%- if message.role == "user" -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- elif loop.last and not add_generation_prompt -%}
        {%- if "thinking" in message -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif -%}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
    {%- else -%}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" }}{%- endif -%}"""
NEVER_IN_A_CALL = """{%- for m in messages -%}<|start|>{{ m.role }}<|message|>
{%- if m.reasoning_content and not m.tool_calls %}<think>{{ m.reasoning_content }}</think>{% endif -%}
{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}<|return|>{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant<|message|>{%- endif -%}"""


@pytest.fixture
def made_of(assets, tmp_path):
    def make(template):
        tokens = ["<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|endoftext|>"]
        file = json.loads((assets / "tokenizers/qwen3/tokenizer.json").read_text())
        first = 1 + max(token["id"] for token in file["added_tokens"])
        known = {token["content"] for token in file["added_tokens"]}
        file["added_tokens"] += [
            {"id": first + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, text in enumerate(text for text in tokens if text not in known)
        ]  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>"}))
        (tmp_path / "chat_template.jinja").write_text(template)
        return from_pretrained(tmp_path)

    return make


def test_a_template_reads_reasoning_under_its_own_name(made_of):
    tokenizer = made_of(HARMONY)
    assert learnt(tokenizer, TALK) == [
        "<|channel|>analysis<|message|>think hard<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>"
    ]
    only = ({"part": "reasoning", "train": "only"},)
    assert learnt(tokenizer, TALK, spans=only) == ["think hard<|return|>"]


def test_a_template_that_reads_no_reasoning_refuses_it(made_of):
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    tokenizer = made_of(template + "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}")
    with pytest.raises(DataError, match="which the chat template does not write") as raised:
        documents_of(tokenizer, Conversation(TALK), MaskPolicy(), chat=True)
    assert raised.value.id == "D07"


def test_a_template_that_drops_reasoning_of_some_messages_refuses_those(made_of):
    tokenizer = made_of(NEVER_IN_A_CALL)
    assert learnt(tokenizer, TALK) == ["<think>think hard</think>a<|return|>"]
    call = {"function": {"name": "f", "arguments": {}}}
    talk = [Message("user", "q"), Message("assistant", "", reasoning="why", tool_calls=[call])]
    with pytest.raises(DataError, match="does not write there") as raised:
        documents_of(tokenizer, Conversation(talk), MaskPolicy(), chat=True)
    assert raised.value.id == "D07"
