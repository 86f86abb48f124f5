"""What a rendering knows of its tokens: kinds, messages, straddlers, characters; and that training equals serving."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from torchmask import Message
from torchmask.errors import ConfigError, DataError
from torchmask.messages import TokenKind, default_mask
from torchmask.tokenizers import from_pretrained
from torchmask.tokenizers.pieces import Piece, assemble

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMATS = [("llama2", "llama2"), ("llama3", "llama3"), ("qwen3", "chatml"), ("qwen3", None)]
TYPED = ["</s>", "<s>", "<|im_end|>", "<|eot_id|>", "[/INST]", "<|im_start|>assistant\n", "<tool_response>", "<unk>"]
words = st.one_of(st.text(max_size=10), st.sampled_from([*TYPED, " ", "\n", "é你", "Hello", "1+1", '{"a": 1}']))
contents = st.lists(words, min_size=1, max_size=5).map("".join)


@st.composite
def conversations(draw):
    num_turns = draw(st.integers(1, 3))
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(num_turns):
        messages += [Message("user", draw(contents)), Message("assistant", draw(contents))]
    return messages


def pieces_of(tokenizer, rendered, where):
    return [tokenizer.id_to_piece(int(id)) for id in rendered.tokens[where]]


@pytest.mark.parametrize(("name", "chat_format"), FORMATS)
@given(messages=conversations())
@few
def test_every_token_has_a_kind_and_every_answer_one_end_of_turn(load, name, chat_format, messages):
    rendered = load(name, chat_format).render(messages)
    assert len(rendered.tokens) == len(rendered.kinds) == len(rendered.turns) == len(rendered.content_starts)
    assert rendered.tokens.dtype == rendered.turns.dtype == np.int32
    assert rendered.kinds.dtype == np.uint8
    assert set(rendered.turns.tolist()) <= set(range(-1, len(messages)))
    for i, message in enumerate(messages):
        if message.role == "assistant":
            ends = np.flatnonzero((rendered.turns == i) & (rendered.kinds == TokenKind.END_OF_TURN))
            own = np.flatnonzero((rendered.turns == i) & (rendered.kinds == TokenKind.CONTENT))
            assert len(ends) == 1
            assert own.tolist() == list(range(ends[0] - len(own), ends[0]))


@pytest.mark.parametrize(("name", "chat_format"), FORMATS)
@given(messages=conversations())
@few
def test_content_characters_of_tokens_lead_back_to_the_text(load, name, chat_format, messages):
    rendered = load(name, chat_format).render(messages)
    for i, message in enumerate(messages):
        mine = (rendered.turns == i) & (rendered.content_starts >= 0)
        starts, ends = rendered.content_starts[mine], rendered.content_ends[mine]
        assert (rendered.kinds[mine] == TokenKind.CONTENT).all()
        assert (starts <= ends).all() and (np.diff(starts) >= 0).all()
        assert (ends <= len(message.text)).all()
        if len(starts) and name != "qwen3":  # NFC drops the offset of a merged combining mark
            covered = np.unique(np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)]))
            assert "".join(message.text[c] for c in covered).strip() == message.text.strip()


@pytest.mark.parametrize(("name", "chat_format"), FORMATS)
@given(messages=conversations())
@few
def test_typed_control_tokens_add_no_control_id(load, name, chat_format, messages):
    tokenizer = load(name, chat_format)
    neutral = [Message(m.role, "x") for m in messages]
    control = list(tokenizer.control_tokens.values())
    counts = [np.isin(tokenizer.render(m).tokens, control).sum() for m in (messages, neutral)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "chat_format"), FORMATS)
@given(messages=conversations())
@few
def test_tokens_before_the_last_answer_are_the_prompt_generation_is_fed(load, name, chat_format, messages):
    tokenizer = load(name, chat_format)
    rendered = tokenizer.render(messages)
    prompt = tokenizer.render(messages[:-1], add_generation_prompt=True)
    assume(rendered.num_straddlers == tokenizer.render([*messages[:-1], Message("assistant", "x")]).num_straddlers)
    first_target = np.flatnonzero((default_mask(rendered, messages) == 0) & (rendered.turns == len(messages) - 1))[0]
    assert rendered.tokens[:first_target].tolist() == prompt.tokens.tolist()


def test_llama2_text_around_an_answer_is_tokenised_in_its_context(load):
    # masking.md section 7, case 8: "### Assistant:" alone is [835, 4007, 22137, 29901]
    tokenizer = load("llama2")
    pieces = [
        Piece("### User: Hi", TokenKind.CONTENT, 0),
        Piece("\n\n### Assistant:", TokenKind.STRUCTURE, 1),
        Piece(" Hello", TokenKind.CONTENT, 1),
        Piece("</s>", TokenKind.END_OF_TURN, 1, True),
    ]
    encode = tokenizer._backend.encode_with_offsets
    rendered = assemble(pieces, encode=encode, encode_structure=encode, encode_control=tokenizer._encoders.control)
    assert tokenizer.encode("### Assistant:") == [835, 4007, 22137, 29901]
    answer = (rendered.turns == 1) & (rendered.kinds == TokenKind.CONTENT)
    assert pieces_of(tokenizer, rendered, answer) == ["▁Hello"]
    header = (rendered.turns == 1) & (rendered.kinds == TokenKind.STRUCTURE)
    assert rendered.tokens[header].tolist() == [13, 13, 2277, 29937, 4007, 22137, 29901]
    assert rendered.num_straddlers == 0


def test_llama3_token_over_header_and_content_is_content_and_counted(load):
    # masking.md section 7, case 10: "### Response:" + "\nHi" share the token ":\n"
    tokenizer = load("llama3")
    pieces = [Piece("### Response:", TokenKind.STRUCTURE, 0), Piece("\nHi", TokenKind.CONTENT, 0, offset=0)]
    encode = tokenizer._backend.encode_with_offsets
    rendered = assemble(pieces, encode=encode, encode_structure=encode, encode_control=encode)
    assert rendered.num_straddlers == 1
    content = rendered.kinds == TokenKind.CONTENT
    assert pieces_of(tokenizer, rendered, content) == [":\n", "Hi"]
    assert rendered.content_starts[content].tolist() == [0, 1]
    assert rendered.content_ends[content].tolist() == [1, 3]


def test_a_rendering_of_nothing_is_empty(load):
    assert len(load("qwen3", "chatml").render([])) == 0


def test_bracketed_content_is_all_content(load):
    messages = [Message("user", "q"), Message("assistant", "[[Paris]] is nice [[x]]")]
    tokens, mask = load("llama3", "llama3").tokenize_messages(messages)
    trained = [token for token, flag in zip(tokens, mask, strict=True) if flag == 0]
    assert load("llama3").decode(trained) == "[[Paris]] is nice [[x]]"


def test_messages_own_flags_decide_what_is_trained(load):
    messages = [Message("user", "q", masked=False), Message("assistant", "a", masked=True)]
    tokens, mask = load("llama3", "llama3").tokenize_messages(messages)
    trained = [token for token, flag in zip(tokens, mask, strict=True) if flag == 0]
    assert load("llama3").decode(trained, skip_special=False) == "q<|eot_id|>"


def test_without_eot_the_last_message_has_no_end_of_turn(load):
    for name, chat_format, end in (
        ("llama2", "llama2", 1),
        ("llama3", "llama3", 1),
        ("qwen3", "chatml", 2),
        ("qwen3", None, 2),
    ):
        whole = load(name, chat_format).tokenize_messages([Message("user", "q"), Message("assistant", "a")])[0]
        open_end = load(name, chat_format).tokenize_messages(
            [Message("user", "q"), Message("assistant", "a", eot=False)]
        )[0]
        assert open_end == whole[:-end], (name, chat_format)


def test_llama3_code_for_a_tool_ends_the_message_and_its_result_is_from_ipython(load):
    messages = [
        Message("user", "1+1"),
        Message("assistant", "print(2)", ipython=True),
        Message("tool", "2"),
        Message("assistant", "2"),
    ]
    tokens, mask = load("llama3", "llama3").tokenize_messages(messages)
    text = load("llama3").decode(tokens, skip_special=False)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == (
        f"<|begin_of_text|>{header.format('user')}1+1<|eot_id|>{header.format('assistant')}<|python_tag|>print(2)<|eom_id|>"
        f"{header.format('ipython')}2<|eot_id|>{header.format('assistant')}2<|eot_id|>"
    )
    trained = [token for token, flag in zip(tokens, mask, strict=True) if flag == 0]
    assert load("llama3").decode(trained, skip_special=False) == "<|python_tag|>print(2)<|eom_id|>2<|eot_id|>"


def test_chatml_answers_may_think_but_users_may_not(load):
    qwen = load("qwen3", "chatml")
    think = qwen.control_tokens["<think>"]
    messages = [Message("user", "<think>"), Message("assistant", "<think>x</think>y")]
    rendered = qwen.render(messages)
    assert (
        np.flatnonzero(rendered.tokens == think).tolist()
        == np.flatnonzero((rendered.turns == 1) & (rendered.content_starts == 0)).tolist()
    )
    assert rendered.content_starts[rendered.turns == 1].max() == len("<think>x</think>")


def test_content_parts_are_joined(load):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for name, chat_format in FORMATS:
        render = load(name, chat_format).render
        assert render([Message("user", parts)]).tokens.tolist() == render([Message("user", "Hello")]).tokens.tolist()


@pytest.mark.parametrize(
    ("roles", "turn"),
    [
        (["assistant"], 1),
        (["user", "user"], 2),
        (["system", "assistant"], 2),
        (["user", "tool"], 2),
        (["user", "system"], 2),
    ],
)
def test_llama2_names_the_turn_whose_role_is_out_of_order(load, roles, turn):
    with pytest.raises(DataError, match=rf"turn {turn} of {len(roles)} is from '{roles[turn - 1]}'") as raised:
        load("llama2", "llama2").render([Message(role, "x") for role in roles])
    assert raised.value.id == "D07"


def test_native_formats_refuse_tool_calls_rather_than_drop_them(load):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    with pytest.raises(DataError, match="turn 2 has tool_calls"):
        load("llama3", "llama3").render([Message("user", "x"), Message("assistant", "", tool_calls=[call])])
    with pytest.raises(DataError, match="tools are given"):
        load("llama3", "llama3").render([Message("user", "x")], tools=[{"type": "function"}])


def test_a_tokenizer_without_chat_format_names_the_formats_that_fit_it(load):
    assert not load("llama3").has_chat_format
    with pytest.raises(ConfigError, match=r"the tokens of llama3, llama3_1, zephyr, alpaca$") as raised:
        load("llama3").tokenize_messages([Message("user", "x")])
    assert raised.value.id == "C06"


def test_an_unknown_chat_format_gets_the_nearest_name_and_the_list(load):
    with pytest.raises(
        ConfigError, match=r"(?s)unknown chat_format 'lama3'.*llama2, llama3, llama3_1, chatml.*did you mean 'llama3'"
    ):
        load("llama3", "lama3")


def test_chatml_on_a_tokenizer_without_its_control_tokens_is_refused(load):
    with pytest.raises(ConfigError, match=r"'chatml' needs the control tokens <\|im_start\|>, <\|im_end\|>"):
        load("llama2", "chatml")


def test_stop_ids_include_the_end_of_turn_of_the_format(load):
    assert load("llama2", "llama2").stop_ids == (2,)
    assert load("llama3", "llama3").stop_ids == (128001, 128008, 128009)
    assert load("qwen3").stop_ids == (151645,)


def test_chatml_equals_its_template(load, folder_with):
    template = (
        "{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    by_template = from_pretrained(
        folder_with("qwen3", ["tokenizer.json"], chat_template=template, eos_token="<|im_end|>")
    )
    messages = [Message("system", " be\n"), Message("user", "\n\nq<|im_end|>"), Message("assistant", " a\n")]
    for add_generation_prompt in (False, True):
        ours = load("qwen3", "chatml").render(messages, add_generation_prompt=add_generation_prompt)
        theirs = by_template.render(messages, add_generation_prompt=add_generation_prompt)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.kinds.tolist() == theirs.kinds.tolist()
        assert ours.turns.tolist() == theirs.turns.tolist()
