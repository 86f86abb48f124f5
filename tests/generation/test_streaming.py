"""Text as it comes: whole characters only, and together the same text."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchmask.generation import TextStream, before_stop, decode_continuation, stop_on_text

TEXTS = [
    "Hello world, how are you?",
    "naïve café, 東京と日本語のテキスト",
    "robots 🤖 and families 👩‍👩‍👧 and flags 🇫🇷",
    "  two blanks,\n\ttab\n\n  and an end \n",
    "नमस्ते مرحبا שלום",
]


class Bytes:
    """A token a byte: the hardest case."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.fixture(scope="module", params=["llama2", "llama3", "qwen3", "stories260k", "gemma"])
def tokenizer(request, assets):
    from torchmask.tokenizers import from_pretrained

    return from_pretrained(assets / "tokenizers" / request.param)


@given(st.text())
def test_bytes_come_out_as_whole_characters_and_the_same_text(text):
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_tokens_of_real_tokenizers_give_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_continuation_keeps_the_blank_after_its_prompt(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=True)
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if whole.startswith(before):  # else the cut is inside a character
            assert before + decode_continuation(tokenizer, ids[:cut], ids[cut:]) == whole
            stream = TextStream(tokenizer, context=ids[:cut])
            assert before + "".join(map(stream.push, ids[cut:])) + stream.finish() == whole


def test_lone_blanks_after_a_word_are_shown(assets):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers" / "stories260k")
    assert [tokenizer.id_to_piece(id) for id in (410, 297)] == ["▁", "▁n"]
    stream = TextStream(tokenizer, context=tokenizer.encode("a"))
    assert [stream.push(id) for id in (410, 410, 297)] == [" ", " ", " n"]


@pytest.fixture(scope="module")
def blanks(tokenizer):
    """Ids of one blank and of several."""
    ids = range(min(tokenizer.vocab_size, 32_000))
    return [id for id in ids if set(tokenizer.id_to_piece(id)) <= set("▁Ġ ")][:20]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 31_999)), min_size=1, max_size=14), st.integers(0, 13))
@settings(max_examples=100, deadline=None)
def test_any_tokens_and_runs_of_blanks_come_out_as_the_continuation(tokenizer, blanks, drawn, cut):
    ids = [blanks[n % len(blanks)] if is_blank else n % tokenizer.vocab_size for is_blank, n in drawn]
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    assume(whole.startswith(before))  # else the cut is inside a character
    for n in range(cut, len(ids)):  # bytes that are a character are none to sentencepiece beside bytes that are not
        assume(whole.startswith(tokenizer.decode(ids[:n]).rstrip("\ufffd")))
    stream = TextStream(tokenizer, context=ids[:cut])
    assert "".join(map(stream.push, ids[cut:])) + stream.finish() == whole[len(before) :]


def test_half_a_character_at_the_end_is_shown_by_finish():
    stream = TextStream(Bytes())
    assert [stream.push(byte) for byte in "aé".encode()[:-1]] == ["a", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_bytes_that_are_no_character_do_not_hold_up_what_follows():
    stream = TextStream(Bytes())
    assert "".join(stream.push(byte) for byte in b"a\xff\xffb") == "a\ufffd\ufffdb"


def test_a_stop_text_is_found_across_tokens_and_per_prompt():
    is_complete = stop_on_text(Bytes(), ["\n\n", "END"])
    assert [is_complete(0, byte) for byte in b"a\nEN"] == [False] * 4
    assert not is_complete(1, ord("D"))
    assert is_complete(0, ord("D"))


def test_a_stop_text_that_begins_with_a_blank_is_found_in_the_first_token(assets):
    from torchmask.tokenizers import from_pretrained

    tokenizer = from_pretrained(assets / "tokenizers" / "stories260k")
    prompts = [tokenizer.encode("was"), tokenizer.encode("a big")]
    is_complete = stop_on_text(tokenizer, [" n"], contexts=prompts)
    assert is_complete(1, 297) and is_complete(0, 297)
    assert not stop_on_text(tokenizer, [" n"])(0, 297)  # a completion that stands for itself begins without


def test_text_is_cut_before_the_first_of_several_stop_texts():
    assert before_stop("one END two\n\nthree", ["\n\n", "END"]) == ("one ", True)
    assert before_stop("one", ["\n\n", "END"]) == ("one", False)
