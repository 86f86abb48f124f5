"""Spans located in real tokenisations; cases of masking.md section 7 are named by their number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of, render_segments
from torchmask.errors import DataError
from torchmask.messages import MaskFlag, Message, TokenKind
from torchmask.tokenizers import from_pretrained

NAMES = [("llama2", "llama2"), ("llama3", "llama3"), ("qwen3", None)]


@pytest.fixture(scope="module")
def tokenizers(assets):
    loaded = {name: from_pretrained(assets / "tokenizers" / name, chat_format) for name, chat_format in NAMES}
    return loaded | {"llama3 raw": from_pretrained(assets / "tokenizers" / "llama3")}


def one(tokenizer, answer, chat=True, **policy):
    talk = [Message("user", "q"), Message("assistant", answer)]
    [(rendered, decision)] = documents_of(tokenizer, Conversation(talk), MaskPolicy(**policy), chat=chat)
    return rendered, decision


def pieces(tokenizer, rendered, chosen):
    return [tokenizer.decode([int(id)], skip_special=False) for id in rendered.tokens[chosen]]


def test_case_8_the_answer_alone_is_trained_where_its_marker_merges_with_what_is_before(assets):
    tokenizer = from_pretrained(assets / "tokenizers/llama2")
    talk = [Message("user", "### User:Hello\n\n### Assistant:"), Message("assistant", "Hi there")]
    rendered = render_segments(tokenizer, talk, MaskPolicy())
    assert tokenizer.encode("### Assistant:") == [835, 4007, 22137, 29901]
    ids = rendered.tokens.tolist()
    assert ids[5:12] == [13, 13, 2277, 29937, 4007, 22137, 29901]
    assert rendered.turns.tolist() == [-1] + [0] * 11 + [1, 1, 1] and tokenizer.decode(ids[12:14]) == "Hi there"


def test_case_10_a_straddler_is_counted_and_can_be_split(tokenizers):
    tokenizer = tokenizers["llama3 raw"]
    talk = [Message("user", "### Response:"), Message("assistant", "\nHi")]
    whole = render_segments(tokenizer, talk, MaskPolicy())
    assert whole.num_straddlers == 1 and pieces(tokenizer, whole, whole.turns == 1)[0] == ":\n"
    split = render_segments(tokenizer, talk, MaskPolicy(straddle="split"))
    assert split.num_straddlers == 0 and pieces(tokenizer, split, split.turns == 1)[:2] == ["\n", "Hi"]


@pytest.mark.parametrize(
    ("straddle", "trained", "num_tokens"), [("overlap", [' "?"'], 1), ("inside", [], 0), ("split", ["?"], 1)]
)
def test_case_11_a_value_that_holds_no_whole_token(tokenizers, straddle, trained, num_tokens):
    """With `overlap` the token that covers it is trained; with `inside` there is none, and that is said."""
    tokenizer = tokenizers["llama3"]
    spans = ({"json_path": "$.answer", "train": True},)
    rendered, decision = one(tokenizer, '{"answer": "?"}', straddle=straddle, roles_to_train=(), spans=spans)
    assert pieces(tokenizer, rendered, decision.mask == 0) == trained
    [count] = decision.spans
    assert (count.places, count.tokens) == (1, num_tokens)
    assert decision.unmatched == ([] if num_tokens else ["json_path"])


def test_case_12_brackets_in_an_answer_are_content_for_every_tokenizer(tokenizers):
    for name, _ in NAMES:
        rendered, decision = one(tokenizers[name], "[[Paris]] is nice [[x]]")
        content = rendered.kinds == TokenKind.CONTENT
        assert (decision.mask[content & (rendered.turns == 1)] == 0).all()


def test_thinking_can_be_trained_weighted_and_hidden(tokenizers):
    tokenizer = tokenizers["qwen3"]
    for say, weight, hidden in [({"weight": 0.125}, 0.125, 0), ({"train": False}, 0, 0), ({"visible": False}, 1, 2)]:
        spans = ({"tag": "think", **say},)
        rendered, decision = one(tokenizer, "<think>\nit is so\n</think>\n\nYes", spans=spans)
        named, seen = decision.rules == decision.rule_names.index("tag"), decision.mask & MaskFlag.ATTENTION == 0
        inside = np.flatnonzero(~seen if hidden else named)
        assert pieces(tokenizer, rendered, inside) == ["<think>", "\n", "it", " is", " so", "\n", "</think>"]
        weights = np.where(decision.mask & 1, 0, 1) if decision.weights is None else decision.weights
        assert set(weights[inside].tolist()) == {weight}
        assert (decision.mask[inside] & MaskFlag.ATTENTION == hidden).all()
        assert weights[-2] == 1 and (decision.mask != 2).sum() == len(decision.mask) - (7 if hidden else 0)


def test_a_rewritten_text_is_searched_as_the_template_writes_it(tokenizers):
    """Qwen puts line breaks into `<think>x</think>y`; the rule sees them, and parts of the text are still known."""
    _, decision = one(tokenizers["qwen3"], "<think>x</think>y", spans=({"regex": r"x\n", "train": False},))
    assert decision.spans[0].places == 1
    with pytest.raises(DataError, match="rewrites the assistant's text"):
        one(tokenizers["qwen3"], "<think>x</think>y", spans=({"chars": [7, 8], "train": False},))


def test_calls_that_a_template_writes_are_searched_too(tokenizers):
    talk = [
        Message("user", "q"),
        Message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {"a": 7}}}]),
    ]
    policy = MaskPolicy(spans=({"json_path": "$.arguments.a", "train": "only"},))
    [(rendered, decision)] = documents_of(tokenizers["qwen3"], Conversation(talk), policy, chat=True)
    assert pieces(tokenizers["qwen3"], rendered, decision.mask == 0) == ["7", "<|im_end|>"]


def test_blanks_that_a_template_puts_around_a_text_are_not_searched(tokenizers):
    _, decision = one(tokenizers["llama2"], "Paris", spans=({"regex": "^Paris$", "weight": 0.5},))
    assert decision.spans[0].places == 1


@pytest.mark.parametrize(
    ("straddle", "trained"),
    [("overlap", ["\n\n", "Hi"]), ("inside", ["\n\n", "Hi"]), ("error", ["\n\n", "Hi"]), ("split", ["\n", "Hi"])],
)
def test_a_token_over_header_and_content_of_a_chat_format_is_content_unless_it_is_split(assets, straddle, trained):
    tokenizer = from_pretrained(assets / "tokenizers/qwen3", "chatml")
    rendered, decision = one(tokenizer, "\nHi", straddle=straddle)
    assert pieces(tokenizer, rendered, decision.mask == 0) == [*trained, "<|im_end|>"]
    assert rendered.num_straddlers == (straddle != "split")


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3"])
def test_split_changes_no_text(tokenizers, name):
    """The cut rendering is the same text in other tokens, with a boundary at each edge."""
    tokenizer = tokenizers[name]
    answer = "The capital is Paris, isn't it?"
    spans = ({"regex": "apit|ari", "train": "only"},)
    rendered, decision = one(tokenizer, answer, straddle="split", spans=spans)
    plain, _ = one(tokenizer, answer)
    assert tokenizer.decode(rendered.tokens).split() == tokenizer.decode(plain.tokens).split()
    trained = [p for p in pieces(tokenizer, rendered, decision.mask == 0) if not p.startswith("<")]
    assert "".join(trained) == "apitari" and decision.straddlers == 0


words = st.lists(st.sampled_from(["a", "Paris ", "\n", '"x"', "🙂", "é", "  ", "12", ".", "{"]), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(words=words, data=st.data(), name=st.sampled_from(["llama2", "llama3", "qwen3"]))
def test_tokens_of_a_span_are_those_that_share_a_character_with_it(tokenizers, words, data, name):
    """`overlap` covers every character of the span, and no token that shares none of them."""
    answer = "x" + "".join(words) + "x"
    start = data.draw(st.integers(0, len(answer) - 1))
    end = data.draw(st.integers(start + 1, len(answer)))
    spans = ({"chars": [start, end], "train": True},)
    rendered, decision = one(tokenizers[name], answer, roles_to_train=(), spans=spans)
    mine = (rendered.turns == 1) & (rendered.content_starts >= 0)
    touches = (rendered.content_starts < end) & (rendered.content_ends > start)
    has_chars = rendered.content_ends > rendered.content_starts
    assert ((decision.mask == 0) == (mine & touches))[has_chars].all()
    covered = {c for a, b in zip(rendered.content_starts[decision.mask == 0], rendered.content_ends[decision.mask == 0])
               for c in range(a, b)}  # fmt: skip
    assert set(range(start, end)) <= covered
