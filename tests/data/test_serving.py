"""Train equals serve: templates that rewrite history are refused or expanded."""

import json

import numpy as np
import pytest

from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of, render_prompt
from torchmask.data.serving import serving_mismatch
from torchmask.errors import DataError
from torchmask.messages import Message, TokenKind
from torchmask.tokenizers import from_pretrained

THINKING = [Message("user", "u1"), Message("assistant", "<think>x</think>y"), Message("user", "u2"),
            Message("assistant", "<think>z</think>w")]  # fmt: skip


@pytest.fixture(scope="module")
def qwen(assets):
    return from_pretrained(assets / "tokenizers/qwen3")


def expand(tokenizer, talk, **policy):
    return documents_of(tokenizer, Conversation(talk), MaskPolicy(unstable_template="expand", **policy), chat=True)


def trained_text(tokenizer, document):
    return tokenizer.decode(document.rendered.tokens[document.decision.mask == 0], skip_special=False)


def test_case_17_stripped_thinking_is_an_error_that_shows_the_first_token_that_differs(qwen):
    with pytest.raises(DataError) as caught:
        documents_of(qwen, Conversation(THINKING), MaskPolicy(), chat=True)
    assert caught.value.id == "D14"
    assert "'y' (88) in training, '<think>' (151667) at inference" in str(caught.value)
    assert "unstable_template to expand" in caught.value.fix


def test_case_17_expand_makes_one_sample_of_each_trained_turn(qwen):
    found = expand(qwen, THINKING)
    assert [trained_text(qwen, document) for document in found] == [
        "<think>\nx\n</think>\n\ny<|im_end|>", "<think>\nz\n</think>\n\nw<|im_end|>"]  # fmt: skip
    for i, (rendered, decision) in zip((1, 3), found):
        served = render_prompt(qwen, Conversation(THINKING[:i]), chat=True)
        first = int(np.flatnonzero(decision.mask == 0)[0])
        assert rendered.tokens[:first].tolist() == served


def test_turns_that_are_not_trained_may_be_rewritten(qwen):
    policy = MaskPolicy("train_on_last")
    [document] = documents_of(qwen, Conversation(THINKING), policy, chat=True)
    assert trained_text(qwen, document) == "<think>\nz\n</think>\n\nw<|im_end|>"


def test_conversations_that_a_template_leaves_alone_are_not_expanded(qwen):
    talk = [Message("user", "u1"), Message("assistant", "y"), Message("user", "u2"), Message("assistant", "w")]
    assert len(expand(qwen, talk)) == 1 and serving_mismatch(qwen, Conversation(talk)) is None
    assert len(expand(qwen, THINKING[2:])) == 1


def test_other_trained_turns_go_with_the_next_answer(qwen):
    found = expand(qwen, THINKING, masking_strategy="train_on_all")
    assert [trained_text(qwen, document) for document in found] == [
        "u1<|im_end|><think>\nx\n</think>\n\ny<|im_end|>",
        "u2<|im_end|><think>\nz\n</think>\n\nw<|im_end|>",
    ]


def test_rules_of_the_policy_hold_in_every_expanded_sample(qwen):
    found = expand(qwen, THINKING, spans=({"tag": "think", "train": False}, {"regex": "u1", "visible": False}))
    assert [trained_text(qwen, document) for document in found] == ["\n\ny<|im_end|>", "\n\nw<|im_end|>"]
    assert [int((document.decision.mask & 2 != 0).sum()) for document in found] == [2, 2]


def test_a_template_that_moves_earlier_turns_is_found_by_its_prompt(folder_with_template):
    """A template that writes the number of messages first: every prompt differs from how the whole begins."""
    tokenizer = folder_with_template(
        "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [Message("user", "q"), Message("assistant", "a"), Message("user", "r"), Message("assistant", "b")]
    assert serving_mismatch(tokenizer, Conversation(talk)).position == 0
    with pytest.raises(DataError, match=r"'4' .* in training, '1' .* at inference"):
        documents_of(tokenizer, Conversation(talk), MaskPolicy(), chat=True)


@pytest.fixture
def folder_with_template(assets, tmp_path):
    def make(template):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (assets / "tokenizers/qwen3" / name).read_text()
            if name == "tokenizer_config.json":
                text = json.dumps({**json.loads(text), "chat_template": template})
            (tmp_path / name).write_text(text)
        return from_pretrained(tmp_path)

    return make


@pytest.mark.parametrize(("name", "chat_format"), [("llama2", "llama2"), ("llama3", "llama3"), ("qwen3", None)])
def test_tokens_before_each_answer_are_what_generation_is_fed(assets, name, chat_format):
    """For all stored conversations but those in which a token covers header and answer, which are reported."""
    tokenizer = from_pretrained(assets / "tokenizers" / name, chat_format)
    cases = json.loads((assets / f"goldens/{name}.json").read_text())["cases"]
    checked = 0
    for case in cases:
        talk = [Message(m["role"], m["content"] or "", tool_calls=m.get("tool_calls") or []) for m in case["messages"]]
        if case["add_generation_prompt"] or "<think>" in str(case["messages"]):
            continue
        rendered = tokenizer.render(talk, case["tools"])
        expects = rendered.num_straddlers and any(
            (rendered.kinds[i] == TokenKind.CONTENT) and talk[rendered.turns[i]].role == "assistant"
            for i in case.get("boundary_straddling_positions", [])
        )
        mismatch = serving_mismatch(tokenizer, Conversation(talk, case["tools"]))
        assert (mismatch is None) or expects, (case["name"], mismatch)
        checked += 1
    assert checked > 3
