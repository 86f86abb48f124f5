"""Cases of masking.md section 7 are named by their number."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data.formats import Conversation
from torchmask.data.masks import MaskPolicy, append_eos, finish_chat, mask_of, stop_index, trained_turns
from torchmask.data.rendering import render_conversation
from torchmask.errors import ConfigError
from torchmask.messages import ROLES, MaskFlag, Message, Rendered, TokenKind, default_mask

TALK = [Message("system", "s"), Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"),
        Message("assistant", "a2")]  # fmt: skip


def trained_text(tokenizer, messages, policy=None, tools=None):
    policy = policy or MaskPolicy()
    rendered = render_conversation(tokenizer, Conversation(messages, tools), chat=True)
    return tokenizer.text(rendered.tokens[mask_of(rendered, messages, policy) == 0])


def test_the_assistant_is_trained_by_default(char_tokenizer):
    assert trained_text(char_tokenizer(), TALK) == "a1|a2|"


def test_train_on_last_trains_the_last_answer_only(char_tokenizer):
    assert trained_text(char_tokenizer(), TALK, MaskPolicy("train_on_last")) == "a2|"


def test_train_on_last_means_the_last_answer_even_where_the_user_has_the_last_word(char_tokenizer):
    assert trained_text(char_tokenizer(), [*TALK, Message("user", "q3")], MaskPolicy("train_on_last")) == "a2|"


def test_train_on_all_trains_contents_and_ends_of_turn_but_no_headers(char_tokenizer):
    assert trained_text(char_tokenizer(), TALK, MaskPolicy("train_on_all")) == "s|q1|a1|q2|a2|"


def test_roles_decide_in_place_of_the_strategy(char_tokenizer):
    assert trained_text(char_tokenizer(), TALK, MaskPolicy("train_on_last", roles_to_train=("user",))) == "q1|q2|"


def test_a_message_has_the_last_word_over_strategy_and_roles(char_tokenizer):
    talk = [Message("user", "q1", masked=False), Message("assistant", "a1", masked=True), *TALK[3:]]
    assert trained_text(char_tokenizer(), talk) == "q1|a2|"
    assert trained_text(char_tokenizer(), talk, MaskPolicy("train_on_all")) == "q1|q2|a2|"
    assert trained_text(char_tokenizer(), talk, MaskPolicy("train_on_last")) == "q1|a2|"
    assert trained_text(char_tokenizer(), talk, MaskPolicy(roles_to_train=("assistant",))) == "q1|a2|"


@pytest.mark.parametrize(("options", "near"), [
    ({"masking_strategy": "train_on_asistant"}, "train_on_assistant"),
    ({"roles_to_train": ("asistant",)}, "assistant"),
])  # fmt: skip
def test_unknown_strategies_and_roles_are_refused_with_the_nearest_name(options, near):
    with pytest.raises(ConfigError) as caught:
        MaskPolicy(**options)
    assert f"did you mean {near!r}?" in caught.value.fix


def test_case_1_a_mask_does_not_depend_on_any_length_limit(char_tokenizer):
    """EOS stays trained: the mask is made of the whole document, before anything can be cut."""
    tokenizer = char_tokenizer(bos_id=None, eot_id=2)
    rendered = Rendered(np.array([5, 6, 7, 2]), np.array([0, 1, 1, 2], np.uint8), np.array([0, 0, 1, 1]))
    assert mask_of(rendered, TALK[1:3], MaskPolicy()).tolist() == [1, 1, 0, 0]
    assert trained_text(tokenizer, TALK[1:3]) == "a1$"


def test_case_2_an_end_of_turn_that_equals_the_padding_id_is_trained(char_tokenizer):
    rendered = char_tokenizer(eot_id=0).render(TALK[1:3])
    assert rendered.tokens[-1] == 0 and mask_of(rendered, TALK[1:3], MaskPolicy())[-1] == 0


def test_case_3_every_answers_end_of_turn_is_trained_and_no_users(char_tokenizer):
    tokenizer = char_tokenizer(eot_id=106, eos_id=1)
    rendered = tokenizer.render(TALK[1:])
    mask = mask_of(rendered, TALK[1:], MaskPolicy())
    assert ((rendered.tokens == 106) & (mask == 0)).sum() == 2 and (rendered.tokens == 106).sum() == 4


def test_case_4_nothing_follows_the_last_messages_terminator(char_tokenizer):
    tokenizer = char_tokenizer()
    rendered = render_conversation(tokenizer, Conversation(TALK), chat=True)
    assert rendered.tokens[-1] == tokenizer.eot_id and stop_index(rendered) == len(rendered) - 1


def test_a_format_without_end_of_turn_gets_one_trained_eos(char_tokenizer):
    tokenizer = char_tokenizer(has_eot=False)
    rendered = render_conversation(tokenizer, Conversation(TALK), chat=True)
    assert rendered.kinds.tolist().count(TokenKind.EOS) == 1 and rendered.tokens[-1] == tokenizer.eos_id
    assert trained_text(tokenizer, TALK) == "a1a2$"


def test_no_eos_is_appended_to_a_turn_that_goes_on_or_to_the_users_word(char_tokenizer):
    open_turn = [TALK[1], Message("assistant", "a1", eot=False)]
    assert trained_text(char_tokenizer(), open_turn) == "a1"
    users_word = [*TALK[1:3], Message("user", "q2")]
    rendered = render_conversation(char_tokenizer(has_eot=False), Conversation(users_word), chat=True)
    assert TokenKind.EOS not in rendered.kinds


def test_an_eos_follows_its_message(char_tokenizer):
    talk = [Message("user", "q"), Message("assistant", "a", masked=True)]
    assert trained_text(char_tokenizer(has_eot=False), talk) == ""


def test_appending_eos_is_idempotent(char_tokenizer):
    rendered = char_tokenizer(has_eot=False).render(TALK)
    once = append_eos(rendered, 2, turn=4)
    assert append_eos(once, 2, turn=4) is once and len(once) == len(rendered) + 1
    assert finish_chat(finish_chat(rendered, TALK, 2), TALK, 2).tokens.tolist() == once.tokens.tolist()


def test_a_text_that_ends_in_the_eos_id_still_gets_its_eos():
    """Whether EOS is there is told by kind: an id that a back end made from text is text."""
    rendered = Rendered(np.array([5, 2]), np.array([1, 1], np.uint8), np.array([0, 0]))
    assert append_eos(rendered, 2, turn=0).tokens.tolist() == [5, 2, 2]


def test_case_12_brackets_in_an_answer_are_content(char_tokenizer):
    answer = "[[Paris]] is nice [[x]]"
    assert trained_text(char_tokenizer(), [Message("user", "q"), Message("assistant", answer)]) == answer + "|"


def test_case_15_a_tool_result_and_both_headers_are_masked(char_tokenizer):
    talk = [Message("user", "q"), Message("assistant", "CALL"), Message("tool", "RESULT"), Message("assistant", "done")]
    tokenizer = char_tokenizer()
    rendered = tokenizer.render(talk)
    mask = mask_of(rendered, talk, MaskPolicy())
    assert tokenizer.text(rendered.tokens[mask == 0]) == "CALL|done|"
    assert (mask[rendered.kinds == TokenKind.STRUCTURE] == MaskFlag.LOSS).all()


@pytest.mark.parametrize("typed", ["<|eot_id|>", "<|im_end|>", "</s>", "<s>[INST]"])
def test_case_16_typed_control_tokens_change_no_mask(char_tokenizer, typed):
    neutral = "x" * len(typed)
    for role in ("user", "assistant"):
        masks = []
        for text in (typed, neutral):
            talk = [Message("user", "q"), Message("assistant", "a"), Message("user", "u"), Message("assistant", "b")]
            talk[0 if role == "user" else 1].content = text
            masks.append(mask_of(char_tokenizer().render(talk), talk, MaskPolicy()).tolist())
        assert masks[0] == masks[1]


@pytest.mark.parametrize("typed", ["<|eot_id|>", "</s>", "<|im_end|>"])
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_case_16_holds_for_real_tokenizers(assets, name, typed):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers" / name, name)
    talk = [Message("user", f"a {typed} b"), Message("assistant", f"c {typed} d")]
    rendered = tokenizer.render(talk)
    trained = rendered.tokens[mask_of(rendered, talk, MaskPolicy()) == 0]
    assert tokenizer.decode(trained, skip_special=True).strip() == f"c {typed} d"
    assert sum(int(id) in tokenizer.stop_ids for id in trained) == 1


def test_the_first_token_is_never_a_target(char_tokenizer):
    rendered = Rendered(np.array([5, 6]), np.array([1, 1], np.uint8), np.array([0, 0]))
    assert mask_of(rendered, [Message("assistant", "ab")], MaskPolicy()).tolist() == [1, 0]


def test_a_document_that_ends_in_the_users_open_turn_has_no_stop():
    rendered = Rendered(np.array([5, 2, 6, 9]), np.array([1, 2, 1, 0], np.uint8), np.array([1, 1, 2, 2]))
    assert stop_index(rendered) == -1


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3"])
def test_the_default_mask_equals_the_published_supervised_positions(assets, name):
    from torchmask.tokenizers import from_pretrained

    golden = json.loads((assets / f"goldens/{name}.json").read_text())
    tokenizer = from_pretrained(assets / "tokenizers" / name, None if name == "qwen3" else name)
    for case in golden["cases"]:
        messages = [
            Message(m["role"], m["content"] or "", tool_calls=m.get("tool_calls") or []) for m in case["messages"]
        ]
        rendered = tokenizer.render(messages, case["tools"], case["add_generation_prompt"])
        assert rendered.tokens.tolist() == case["input_ids"], case["name"]
        expected = np.ones(len(rendered), np.uint8)
        expected[case["supervised_positions"]] = 0
        assert mask_of(rendered, messages, MaskPolicy()).tolist() == expected.tolist(), case["name"]


messages = st.lists(
    st.builds(Message, st.sampled_from(ROLES), st.text(max_size=4), st.sampled_from([None, True, False])),
    min_size=1,
    max_size=6,
)


@given(talk=messages, strategy=st.sampled_from(["train_on_assistant", "train_on_last", "train_on_all"]))
def test_a_token_is_trained_iff_its_message_is_and_it_is_no_structure(talk, strategy):
    """By hand, message after message, against the vectorised rule."""
    from torchmask.data.masks import MaskPolicy as Policy

    kinds, turns = [TokenKind.STRUCTURE], [-1]
    for i, message in enumerate(talk):
        size = len(message.text)
        kinds += [TokenKind.STRUCTURE, *[TokenKind.CONTENT] * size, TokenKind.END_OF_TURN]
        turns += [i] * (size + 2)
    rendered = Rendered(np.arange(len(kinds)), np.array(kinds, np.uint8), np.array(turns))
    policy = Policy(strategy)
    chosen = trained_turns(talk, policy)
    expected = [0 if t >= 0 and chosen[t] and k != TokenKind.STRUCTURE else 1 for k, t in zip(kinds, turns)]
    assert mask_of(rendered, talk, policy).tolist() == expected
    if strategy == "train_on_assistant":
        assert default_mask(rendered, talk).tolist() == expected
