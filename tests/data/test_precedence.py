"""The whole chain of rules, later ones winning, with the rule that decided each token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data.eos import EosPolicy
from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of
from torchmask.data.spans import SpanRule
from torchmask.errors import DataError
from torchmask.messages import ROLES, MaskFlag, Message


def decided(tokenizer, messages, **policy):
    [(rendered, decision)] = documents_of(tokenizer, Conversation(messages), MaskPolicy(**policy), chat=True)
    return rendered, decision


def shown(tokenizer, messages, **policy):
    """(text, weight, hidden, rule) of stretches of tokens that share all three."""
    rendered, decision = decided(tokenizer, messages, **policy)
    weights = np.where(decision.mask & MaskFlag.LOSS, 0, 1) if decision.weights is None else decision.weights
    result = []
    for id, mask, weight, rule in zip(rendered.tokens, decision.mask, weights, decision.rules):
        say = (round(float(weight), 4), bool(mask & MaskFlag.ATTENTION), decision.rule_names[rule])
        if result and result[-1][1:] == say:
            result[-1] = (result[-1][0] + tokenizer.text([id]), *say)
        else:
            result.append((tokenizer.text([id]), *say))
    return result


TALK = [Message("user", "q"), Message("assistant", "abcd")]
HEAD = [("^", 0, False, "bos"), ("#", 0, False, "header")]


def test_every_token_says_which_rule_decided_it(char_tokenizer):
    assert shown(char_tokenizer(), TALK) == [
        *HEAD, ("q", 0, False, "strategy"), ("|", 0, False, "eot"), ("#", 0, False, "header"),
        ("abcd", 1, False, "strategy"), ("|", 1, False, "eos"),
    ]  # fmt: skip
    rules = [rule for *_, rule in shown(char_tokenizer(), TALK, roles_to_train=("user",))]
    assert rules == ["bos", "header", "roles", "eot", "header", "roles", "eos"]


def test_a_messages_weight_scales_its_text_and_its_end(char_tokenizer):
    talk = [TALK[0], Message("assistant", "ab", weight=0.25)]
    assert shown(char_tokenizer(), talk)[-2:] == [("ab", 0.25, False, "message"), ("|", 0.25, False, "eos")]


def test_a_hidden_message_is_still_trained(char_tokenizer):
    talk = [Message("user", "q", visible=False), Message("assistant", "a", visible=False)]
    found = shown(char_tokenizer(), talk)
    assert ("q", 0, True, "strategy") in found and ("a", 1, True, "strategy") in found
    assert found[-1] == ("|", 1, False, "eos")


def test_parts_of_a_message_win_over_the_message(char_tokenizer):
    parts = [{"text": "ab", "weight": 0.5}, {"text": "cd"}, {"text": "ef", "train": False, "visible": False}]
    assert shown(char_tokenizer(), [TALK[0], Message("assistant", parts)])[-4:] == [
        ("ab", 0.5, False, "part"), ("cd", 1, False, "strategy"), ("ef", 0, True, "part"), ("|", 1, False, "eos"),
    ]  # fmt: skip


def test_what_train_detail_does_not_cover_is_not_trained(char_tokenizer):
    detail = [{"begin_offset": 1, "end_offset": 2, "train": True}]
    talk = [TALK[0], Message("assistant", "abcd", train_detail=detail)]
    assert shown(char_tokenizer(), talk)[-4:] == [
        ("a", 0, False, "part"), ("bc", 1, False, "part"), ("d", 0, False, "part"), ("|", 1, False, "eos"),
    ]  # fmt: skip


def test_of_two_rules_the_later_wins(char_tokenizer):
    spans = ({"regex": "abc", "weight": 0.5}, {"regex": "c", "train": False, "name": "c"}, {"regex": "c", "weight": 2})
    assert shown(char_tokenizer(), TALK, spans=spans)[-4:] == [
        ("ab", 0.5, False, "regex"), ("c", 2, False, "regex#2"), ("d", 1, False, "strategy"), ("|", 1, False, "eos"),
    ]  # fmt: skip


def test_only_masks_the_rest_of_the_message_and_keeps_its_end(char_tokenizer):
    spans = ({"regex": "b", "train": "only", "name": "answer"},)
    assert shown(char_tokenizer(), TALK, spans=spans)[-4:] == [
        ("a", 0, False, "answer"), ("b", 1, False, "answer"), ("cd", 0, False, "answer"), ("|", 1, False, "eos"),
    ]  # fmt: skip


def test_a_hiding_rule_leaves_the_loss_alone(char_tokenizer):
    found = shown(char_tokenizer(), [Message("user", "xq"), TALK[1]], spans=({"regex": "x|b", "visible": False},))
    assert ("x", 0, True, "strategy") in found and ("b", 1, True, "strategy") in found


@pytest.mark.parametrize(
    ("answer", "spans"),
    [
        (Message("assistant", "abcd"), ({"regex": ".*", "visible": False}, {"regex": "bc", "visible": True})),
        (Message("assistant", "abcd", visible=False), ({"regex": "bc", "visible": True},)),
        (Message("assistant", [{"text": "a"}, {"text": "bc", "visible": True}, {"text": "d"}], visible=False), ()),
        (Message("assistant", [{"text": "abcd", "visible": False}]), ({"chars": [1, 3], "visible": True},)),
        (
            Message(
                "assistant", "abcd", visible=False,
                train_detail=[{"begin_offset": 1, "end_offset": 2, "visible": True}],
            ),
            (),
        ),
    ],
)  # fmt: skip
def test_what_a_later_rule_shows_is_seen_again(char_tokenizer, answer, spans):
    found = shown(char_tokenizer(), [TALK[0], answer], spans=spans)
    assert [(text, hidden) for text, weight, hidden, _ in found if weight][:3] == [
        ("a", True), ("bc", False), ("d", True),
    ]  # fmt: skip


def test_a_rule_that_only_shows_or_hides_decided_no_label(char_tokenizer):
    spans = ({"regex": "b", "weight": 0.5, "name": "half"}, {"regex": ".", "visible": False, "name": "hider"},
             {"regex": "b|c", "visible": True, "name": "shower"})  # fmt: skip
    assert shown(char_tokenizer(), TALK, spans=spans)[-5:-1] == [
        ("a", 1, True, "strategy"), ("b", 0.5, False, "half"), ("c", 1, False, "strategy"), ("d", 1, True, "strategy"),
    ]  # fmt: skip


def test_rules_with_only_that_follow_each_other_train_what_any_of_them_selects(char_tokenizer):
    fields = ({"regex": "a", "train": "only", "name": "one"}, {"regex": "b", "visible": False},
              {"regex": "c", "train": "only", "weight": 2, "name": "two"})  # fmt: skip
    assert shown(char_tokenizer(), TALK, spans=fields)[-5:] == [
        ("a", 1, False, "one"), ("b", 0, True, "one"), ("c", 2, False, "two"), ("d", 0, False, "one"),
        ("|", 1, False, "eos"),
    ]  # fmt: skip
    between = (fields[0], {"regex": "d", "weight": 0.5}, fields[2])  # the last word is `two`'s alone
    assert [(text, weight) for text, weight, *_ in shown(char_tokenizer(), TALK, spans=between)][-4:] == [
        ("ab", 0), ("c", 2), ("d", 0), ("|", 1),
    ]  # fmt: skip


def test_a_field_of_several_that_is_missing_takes_nothing_from_the_others(char_tokenizer):
    for pair in (("z", "c"), ("c", "z")):
        spans = tuple({"regex": pattern, "train": "only"} for pattern in pair)
        found = shown(char_tokenizer(), TALK, spans=spans)
        assert [text for text, weight, *_ in found if weight] == ["c", "|"]


def test_headers_are_trained_with_their_messages_only_when_asked(char_tokenizer):
    found = shown(char_tokenizer(), TALK, train_on_header=True)
    assert [weight for _, weight, _, rule in found if rule == "header"] == [0, 1]


def test_labels_can_be_a_copy_of_the_inputs(char_tokenizer):
    tokenizer = char_tokenizer()
    _, decision = decided(tokenizer, TALK, masking_strategy="train_on_all", train_on_header=True)
    assert decision.mask.tolist() == [1] + [0] * (len(decision.mask) - 1) and decision.weights is None


def test_rules_that_match_nothing_are_named(char_tokenizer):
    _, decision = decided(char_tokenizer(), TALK, spans=({"regex": "z", "train": False}, {"tag": "t", "train": True}))
    assert decision.unmatched == ["regex", "tag"]


def test_weights_of_one_are_no_column(char_tokenizer):
    _, decision = decided(char_tokenizer(), [TALK[0], Message("assistant", "ab", weight=1.0)])
    assert decision.weights is None


class PairTokenizer:
    """Two characters a token; a conversation is raw text."""

    bos_id, eos_id, adds_bos, has_chat_format = 1, 2, True, False

    def encode_with_offsets(self, text, goes_on=False):
        starts = np.arange(0, len(text), 2, dtype=np.int32)
        return 10 + starts, starts, np.minimum(starts + 2, len(text)).astype(np.int32)


def raw(answer, straddle, **rule):
    talk = [Message("user", "qq"), Message("assistant", answer)]
    policy = MaskPolicy(straddle=straddle, spans=(rule,), masking_strategy="train_on_last")
    [(rendered, decision)] = documents_of(PairTokenizer(), Conversation(talk), policy, chat=False)
    return rendered, decision


@pytest.mark.parametrize(
    ("straddle", "trained", "straddlers"), [("overlap", [2, 3], 1), ("inside", [3], 1), ("split", [3, 4], 0)]
)
def test_what_becomes_of_a_token_over_the_edge(straddle, trained, straddlers):
    """`ab cd ef` with the span `bcd`: token `ab` reaches over its edge; `split` makes it `a`, `b`+`c`, `d`."""
    rendered, decision = raw("abcdef", straddle, regex="bcd", train="only")
    content = [i for i in np.flatnonzero(decision.mask == 0) if i < len(rendered) - 1]
    assert decision.straddlers == straddlers
    assert content == trained and len(rendered) == (7 if straddle == "split" else 6)


def test_straddlers_can_be_refused():
    with pytest.raises(DataError, match="reaches over the edge"):
        raw("abcdef", "error", regex="bcd", train=True)
    _, decision = raw("abcdef", "error", regex="cd", train=True)
    assert decision.straddlers == 0


texts = st.text("abc", min_size=1, max_size=6)
weights = st.sampled_from([None, 0.0, 0.5, 1.0, 2.0])
parts = st.lists(
    st.builds(lambda t, w: {"text": t, **({} if w is None else {"weight": w})}, texts, weights), min_size=1, max_size=3
)
flags = st.fixed_dictionaries({}, optional={"weight": st.sampled_from([0.0, 0.5, 1.0, 2.0])})
messages = st.lists(
    st.builds(lambda role, content, more: Message(role, content, **more), st.sampled_from(ROLES), texts | parts, flags),
    min_size=1,
    max_size=5,
)
says = st.sampled_from(
    [{"train": True}, {"train": False}, {"weight": 0.5}, {"weight": 3.0}, {"train": "only"}, {"visible": False},
     {"visible": True}, {"train": True, "visible": False}]
)  # fmt: skip
rules = st.lists(
    st.builds(
        lambda pattern, say, roles: {"regex": pattern, **say, **({} if roles is None else {"roles": roles})},
        st.sampled_from(["a", "b+", "ab", "c|a", "bc."]),
        says,
        st.sampled_from([None, ("user",), ("user", "assistant")]),
    ),
    max_size=3,
)


@given(
    talk=messages,
    spans=rules,
    strategy=st.sampled_from(["train_on_assistant", "train_on_last", "train_on_all"]),
    roles=st.sampled_from([None, (), ("user", "tool")]),
    eos=st.sampled_from(["turn", "all", "none"]),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_later_rules_win_whatever_they_are(char_tokenizer, talk, spans, strategy, roles, eos, scale):
    """Against the chain written down rule by rule, one character a token."""
    policy = MaskPolicy(strategy, roles, spans=spans, eos=EosPolicy(train_on_eos=eos, weight=scale))
    [(_, decision)] = documents_of(char_tokenizer(), Conversation(talk), policy, chat=True)
    expected, hidden = [0.0], [False]
    last = max((i for i, m in enumerate(talk) if m.role == "assistant"), default=-1)
    for i, message in enumerate(talk):
        strategies = {"train_on_all": True, "train_on_last": i == last}
        whole = float(strategies.get(strategy, message.role == "assistant") if roles is None else message.role in roles)
        whole = whole if message.weight is None else message.weight
        chars, unseen = [], [False] * len(message.text)
        for part in message.content if isinstance(message.content, list) else [{"text": message.content}]:
            chars += [part.get("weight", whole)] * len(part["text"])
        goes_on, is_cleared = False, False
        for rule in map(SpanRule.of, spans):
            if message.role not in (rule.roles or (("assistant",) if rule.own_weight is not None else ROLES)):
                continue
            if rule.train == "only" and not goes_on:
                chars, is_cleared = [0.0] * len(chars), True
            goes_on = rule.train == "only" or (goes_on and rule.own_weight is None)
            for start, end in rule.find(message.text):
                for k in range(start, end):
                    chars[k] = chars[k] if rule.own_weight is None else rule.own_weight
                    unseen[k] = unseen[k] if rule.visible is None else not rule.visible
        whole = 0.0 if is_cleared and not any(chars) else whole
        stop = {"turn": whole, "all": whole or 1.0, "none": 0.0}[eos] * scale
        expected += [0.0, *chars, stop]
        hidden += [False, *unseen, False]
    is_target = np.array(expected) != 0
    assert ((decision.mask & MaskFlag.LOSS) == 0).tolist() == is_target.tolist()
    assert ((decision.mask & MaskFlag.ATTENTION) != 0).tolist() == hidden
    found = is_target.astype(float) if decision.weights is None else decision.weights
    assert found.tolist() == expected
