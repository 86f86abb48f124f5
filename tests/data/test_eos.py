"""The rules for stop tokens when a row is tokenised: edges E1 and E4, appending, presets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data.eos import EosPolicy
from torchmask.data.formats import Conversation
from torchmask.data.masks import append_eos, decide, finish_chat
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of
from torchmask.errors import ConfigError
from torchmask.messages import ROLES, Message, Rendered, TokenKind

TALK = [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a2")]


def trained_stops(tokenizer, messages, **eos):
    """Text of the trained tokens that are stops, with their places among all stops."""
    [(rendered, decision)] = documents_of(
        tokenizer, Conversation(messages), MaskPolicy(eos=EosPolicy(**eos)), chat=True
    )
    stops = np.flatnonzero((rendered.kinds == TokenKind.END_OF_TURN) | (rendered.kinds == TokenKind.EOS))
    return [i for i, place in enumerate(stops) if decision.mask[place] == 0]


@pytest.mark.parametrize(
    ("eos", "trained"),
    [
        ({}, [1, 3]),
        ({"train_on_eos": "all"}, [0, 1, 2, 3]),
        ({"train_on_eos": "none"}, []),
        ({"train_on_eos": "last"}, [3]),
        ({"train_on_eos": "none", "train_on_eot": "turn"}, [1]),
        ({"train_on_eos": "turn", "train_on_eot": "none"}, [3]),
        ({"train_on_eos": "turn", "train_on_eot": "all"}, [0, 1, 2, 3]),
        ({"train_on_eos": "all", "train_on_eot": "turn"}, [1, 3]),
        ({"weight": 0}, []),
    ],
)
def test_which_stop_tokens_of_a_conversation_are_trained(char_tokenizer, eos, trained):
    assert trained_stops(char_tokenizer(), TALK, **eos) == trained
    assert trained_stops(char_tokenizer(eot_id=2), TALK, **eos) == trained  # EOS and end of turn are one id: Qwen


def test_last_is_the_documents_stop_even_after_the_users_word(char_tokenizer):
    assert trained_stops(char_tokenizer(), TALK[:3], train_on_eos="last") == [2]
    assert trained_stops(char_tokenizer(), TALK[:3], train_on_eos="turn") == [1]


def test_an_appended_eos_and_the_last_end_of_turn_are_told_apart(char_tokenizer):
    always = {"append": "always"}
    assert trained_stops(char_tokenizer(), TALK, **always) == [1, 3, 4]
    assert trained_stops(char_tokenizer(), TALK, **always, train_on_eos="none", train_on_eot="turn") == [1, 3]
    assert trained_stops(char_tokenizer(), TALK, **always, train_on_eos="last") == [3, 4]


@pytest.mark.parametrize(
    ("append", "has_eot", "text"),
    [
        ("auto", True, "^#q1|#a1|"),
        ("auto", False, "^#q1#a1$"),
        ("virtual", False, "^#q1#a1$"),
        ("always", True, "^#q1|#a1|$"),
        ("never", False, "^#q1#a1"),
    ],
)
def test_what_is_appended(char_tokenizer, append, has_eot, text):
    tokenizer = char_tokenizer(has_eot=has_eot)
    policy = MaskPolicy(eos=EosPolicy(append=append))
    [(rendered, _)] = documents_of(tokenizer, Conversation(TALK[:2]), policy, chat=True)
    assert tokenizer.text(rendered.tokens) == text


def test_always_appends_nothing_where_the_end_of_turn_is_eos_itself(char_tokenizer):
    tokenizer = char_tokenizer(eot_id=2)
    policy = MaskPolicy(eos=EosPolicy(append="always"))
    [(rendered, decision)] = documents_of(tokenizer, Conversation(TALK), policy, chat=True)
    assert rendered.tokens.tolist().count(2) == 4 and decision.stop == len(rendered) - 1


def test_the_weight_of_stops_multiplies_their_messages(char_tokenizer):
    talk = [TALK[0], Message("assistant", "ab", weight=0.5)]
    policy = MaskPolicy(eos=EosPolicy(weight=0.5))
    [(_, decision)] = documents_of(char_tokenizer(), Conversation(talk), policy, chat=True)
    assert decision.weights.tolist() == [0, 0, 0, 0, 0, 0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("preset", ["target", "boundary", "none", "virtual"])
def test_presets_are_policies_and_fields_go_on_top(preset):
    policy = EosPolicy.preset(preset)
    assert EosPolicy.of(preset) == policy == EosPolicy.of(None, preset=preset)
    assert EosPolicy.of({"on_truncate": "drop"}, preset=preset).train_on_eos == policy.train_on_eos


@pytest.mark.parametrize(
    ("make", "id", "text"),
    [
        (lambda: EosPolicy.of("boundry"), "C06", "did you mean 'boundary'?"),
        (lambda: EosPolicy.of({"on_trunkate": "keep"}), "C06", "did you mean 'on_truncate'?"),
        (lambda: EosPolicy(train_on_eos="every"), "C06", "turn, all, last, none"),
        (lambda: EosPolicy(weight=float("nan")), "C09", "finite"),
        (lambda: EosPolicy(boundary_loss="train", train_on_eos="none"), "C09", "never learns to write"),
        (lambda: EosPolicy(boundary_loss="train", weight=0), "C09", "eos.weight is 0"),
        (lambda: EosPolicy(boundary_loss="train", append="virtual"), "C09", "takes no slot"),
        (lambda: EosPolicy.of("none", preset="none"), "C09", "leave one out"),
    ],
)
def test_policies_that_cannot_be_meant_are_refused(make, id, text):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.id == id and text in str(caught.value)


@st.composite
def renderings(draw):
    """Messages of random roles, with and without ends of turn, as a template might write them."""
    has_eot = draw(st.booleans())
    talk = draw(st.lists(st.builds(Message, st.sampled_from(ROLES), st.text("ab", max_size=3)), min_size=1, max_size=5))
    rows = [(1, 0, -1)]
    for i, message in enumerate(talk):
        rows += [(9, 0, i), *[(5, 1, i)] * len(message.text)] + ([(draw(st.sampled_from([2, 3])), 2, i)] * has_eot)
    ids, kinds, turns = zip(*rows)
    return Rendered(np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(turns, np.int32)), talk


appends = st.sampled_from(["auto", "always", "never", "virtual"])
choices = st.sampled_from(["turn", "all", "last", "none"])


@given(made=renderings(), append=appends)
def test_p6_appending_is_idempotent(made, append):
    rendered, talk = made
    once = finish_chat(rendered, talk, 2, EosPolicy(append=append))
    assert finish_chat(once, talk, 2, EosPolicy(append=append)).tokens.tolist() == once.tokens.tolist()
    assert append_eos(append_eos(rendered, 2, turn=0), 2, turn=0).tokens.tolist()[-1] == 2


@given(made=renderings(), append=appends, train=choices, eot=st.one_of(st.none(), choices))
def test_p5_trained_stops_are_the_documents_whose_stop_is_trained(made, append, train, eot):
    """By hand: the document's stop by its own rule, and nothing else is called `eos`."""
    rendered, talk = made
    eos = EosPolicy(append=append, train_on_eos=train, train_on_eot=eot)
    rendered = finish_chat(rendered, talk, 2, eos)
    decision = decide(rendered, talk, MaskPolicy(eos=eos))
    named = np.flatnonzero(decision.rules == decision.rule_names.index("eos"))
    assert named.tolist() == ([decision.stop] if decision.stop >= 0 else [])
    if decision.stop >= 0:
        message = talk[rendered.turns[decision.stop]]
        wanted = {"turn": message.role == "assistant", "none": False}.get(train, True)
        assert (decision.mask[decision.stop] == 0) == (wanted and decision.stop > 0)
