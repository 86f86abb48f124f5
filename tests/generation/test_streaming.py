"""Text as it comes: whole characters only, and together the same text."""

import pytest
from hypothesis import given
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


def test_text_is_cut_before_the_first_of_several_stop_texts():
    assert before_stop("one END two\n\nthree", ["\n\n", "END"]) == ("one ", True)
    assert before_stop("one", ["\n\n", "END"]) == ("one", False)
