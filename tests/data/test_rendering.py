import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.data.eos import EosPolicy
from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import render_prompt, render_raw, render_segments, render_text
from torchmask.errors import ConfigError, DataError
from torchmask.messages import Message, TokenKind


class PairTokenizer:
    """Two characters a token, so that a token can cover the edge of prompt and completion."""

    bos_id, eos_id, adds_bos, has_chat_format = 1, 2, True, False

    def encode_with_offsets(self, text):
        starts = np.arange(0, len(text), 2, dtype=np.int32)
        ends = np.minimum(starts + 2, len(text)).astype(np.int32)
        return np.arange(10, 10 + len(starts), dtype=np.int32), starts, ends


def test_raw_is_bos_prompt_completion_eos(char_tokenizer):
    tokenizer = char_tokenizer(chat=False)
    rendered = render_raw(tokenizer, "Q:", "ab")
    assert tokenizer.text(rendered.tokens) == "^Q:ab$"
    assert rendered.turns.tolist() == [-1, 0, 0, 1, 1, 1]
    assert rendered.kinds.tolist() == [0, 1, 1, 1, 1, TokenKind.EOS] and rendered.num_straddlers == 0


def test_raw_is_tokenised_once(char_tokenizer):
    tokenizer = char_tokenizer(chat=False)
    render_raw(tokenizer, "Q:", "ab")
    assert tokenizer.num_encoded == 1


def test_a_token_over_the_edge_belongs_to_the_completion_and_is_counted():
    rendered = render_raw(PairTokenizer(), "abc", "xy")
    assert rendered.turns.tolist() == [-1, 0, 1, 1, 1] and rendered.num_straddlers == 1


def test_a_token_over_the_edge_goes_by_the_straddle_policy():
    talk = [Message("user", "abc"), Message("assistant", "xyz"), Message("user", " d")]
    for straddle, turns in {"overlap": [-1, 0, 1, 1, 2, 2], "inside": [-1, 0, 0, 1, 2, 2]}.items():
        rendered = render_segments(PairTokenizer(), talk, MaskPolicy(straddle=straddle))
        assert rendered.turns.tolist() == turns and rendered.num_straddlers == 1
    with pytest.raises(DataError, match=r"characters 2 to 4\) covers both the text of message 0 and") as caught:
        render_segments(PairTokenizer(), talk, MaskPolicy(straddle="error"))
    assert caught.value.id == "D14"


@pytest.mark.parametrize(("answer", "turns"), [("x ", [-1, 1, 2]), ("xy", [-1, 1, 1])])
def test_a_template_takes_the_blank_before_it_where_that_is_one_token_with_it(answer, turns):
    """Llama-2's ` USER` is the beginning of the template `USER:`, not the end of an answer."""
    talk = [Message("user", "a"), Message("assistant", answer), Message("user", "b")]
    policy = MaskPolicy(eos=EosPolicy(append="never"))
    ours = {yes: render_segments(PairTokenizer(), talk, policy, yields_blanks=yes) for yes in (True, False)}
    assert ours[True].turns.tolist() == turns
    assert ours[False].turns.tolist() == [-1, 1, 1] and ours[True].num_straddlers == 2


@given(prompt=st.text(max_size=9), completion=st.text(min_size=1, max_size=9))
def test_every_character_of_the_completion_lies_in_a_trained_token(prompt, completion):
    tokenizer = PairTokenizer()
    rendered = render_raw(tokenizer, prompt, completion)
    _, starts, ends = tokenizer.encode_with_offsets(prompt + completion)
    covered = {c for s, e, t in zip(starts, ends, rendered.turns[1:-1]) if t == 1 for c in range(s, e)}
    assert set(range(len(prompt), len(prompt) + len(completion))) <= covered
    assert len(covered) - len(completion) == rendered.num_straddlers


def test_a_tokenizer_without_bos_gets_none(char_tokenizer):
    tokenizer = char_tokenizer(chat=False, bos_id=None)
    assert tokenizer.text(render_raw(tokenizer, "a", "b").tokens) == "ab$"
    assert tokenizer.text(render_text(tokenizer, "ab").tokens) == "ab$"


def test_a_tokenizer_without_eos_cannot_end_a_document(char_tokenizer):
    tokenizer = char_tokenizer(chat=False, eos_id=None)
    with pytest.raises(ConfigError, match="no EOS token"):
        render_raw(tokenizer, "a", "b")
    assert tokenizer.text(render_text(tokenizer, "ab", add_eos=False).tokens) == "^ab"


def test_the_prompt_for_generation_is_the_training_prefix(char_tokenizer):
    asked = Conversation([Message("user", "Q:")])
    for chat in (False, True):
        tokenizer = char_tokenizer(chat=chat)
        if chat:
            whole = tokenizer.render([*asked.messages, Message("assistant", "ab")]).tokens.tolist()
        else:
            whole = render_raw(tokenizer, "Q:", "ab").tokens.tolist()
        prompt = render_prompt(tokenizer, asked)
        assert whole[: len(prompt)] == prompt and len(whole) == len(prompt) + 3


PROMPT = "Below is an instruction.\n\n### Instruction:\nName a city.\n\n### Response:"


@pytest.mark.parametrize("name", ["stories260k", "llama2", "llama3", "gpt2", "qwen3"])
def test_raw_rendering_with_real_tokenizers_trains_the_answer_alone(assets, name):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers" / name)
    answer = " Paris, the café of Europe 🙂."
    rendered = render_raw(tokenizer, PROMPT, answer)
    trained = rendered.tokens[(rendered.turns == 1) & (rendered.kinds == TokenKind.CONTENT)]
    assert tokenizer.decode(trained).strip() == answer.strip()
    assert rendered.tokens[-1] == tokenizer.eos_id and rendered.num_straddlers == 0
    prompt = render_prompt(tokenizer, Conversation([Message("user", PROMPT)]), chat=False)
    assert rendered.tokens[: len(prompt)].tolist() == prompt
    body = rendered.tokens[(rendered.kinds == TokenKind.CONTENT)].tolist()
    assert body == tokenizer.encode(PROMPT + answer)


def test_llama3_merges_a_colon_with_a_line_break_and_that_token_is_trained(assets):
    """Case 10 of masking.md: `":\\n"` is a straddler."""
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers/llama3")
    rendered = render_raw(tokenizer, PROMPT, "\nHi")
    assert rendered.num_straddlers == 1
    assert tokenizer.decode(rendered.tokens[rendered.turns == 1]) == ":\nHi"
