"""Conversations tokenised together are what each of them is alone."""

from copy import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchmask import Message
from torchmask.errors import DataError
from torchmask.messages import Piece, TokenKind
from torchmask.tokenizers.tiktoken_ranks import LLAMA3_SPECIALS

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FORMATS = [("llama2", "llama2"), ("llama3", "llama3"), ("qwen3", "chatml"), ("qwen3", None), ("gpt2", None),
           ("gemma", None), ("mistral_v3", None), ("stories260k", None)]  # fmt: skip
TYPED = ["</s>", "<s>", "<|im_end|>", "<|eot_id|>", "[/INST]", "<|reserved_special_token_247|>", "<unk>", "<think>"]
words = st.one_of(st.text(max_size=10), st.sampled_from([*TYPED, " ", "\n", "  ", "é你", "e\u0301", "👩‍👩‍👧", "Hello"]))
contents = st.lists(words, max_size=5).map("".join)
conversations = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(contents, contents), min_size=1, max_size=2)), max_size=6
)


def as_messages(with_system, turns):
    messages = [Message("system", "You are kind.")] if with_system else []
    for asked, answered in turns:
        messages += [Message("user", asked), Message("assistant", answered)]
    return messages


def assert_same(one, other):
    assert one.num_straddlers == other.num_straddlers and list(one.pieces) == list(other.pieces)
    for name in ("tokens", "kinds", "turns", "content_starts", "content_ends", "starts", "ends"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype and mine.tolist() == theirs.tolist(), name


@pytest.mark.parametrize(("name", "chat_format"), [f for f in FORMATS if f[0] in ("llama2", "llama3", "qwen3")])
@given(talks=conversations)
@few
def test_a_batch_of_conversations_is_each_rendered_alone(load, name, chat_format, talks):
    tokenizer = load(name, chat_format)
    talks = [as_messages(*talk) for talk in talks]
    batch = tokenizer.assemble([tokenizer.write(talk) for talk in talks])
    assert len(batch) == len(talks)
    for i, talk in enumerate(talks):
        assert_same(batch[i], tokenizer.render(talk))


@pytest.mark.parametrize(("name", "chat_format"), FORMATS)
@given(texts=st.lists(contents, max_size=8))
@few
def test_many_texts_are_encoded_as_each_alone(load, name, chat_format, texts):
    backend = load(name, chat_format)._backend
    many = backend.encode_many(texts, num_threads=2)
    assert len(many.offsets) == len(texts) + 1
    for i, text in enumerate(texts):
        cut = slice(many.offsets[i], many.offsets[i + 1])
        assert many.ids[cut].tolist() == backend.encode(text)
        ids, starts, ends = backend.encode_with_offsets(text)
        assert many.ids[cut].tolist() == ids.tolist()
        assert (many.starts[cut].tolist(), many.ends[cut].tolist()) == (starts.tolist(), ends.tolist())


@pytest.mark.parametrize("name", ["gemma", "mistral_v3", "stories260k"])
@given(text=contents.filter(lambda text: "<" not in text))  # of a marker's characters it knows only the first
@few
def test_characters_are_those_that_sentencepieces_own_origins_lead_to(load, name, text):
    backend = load(name)._backend
    asking = copy(backend)
    asking._moves_starts = True  # asks for the origins of every text
    for mine, theirs in zip(backend.encode_with_offsets(text), asking.encode_with_offsets(text), strict=True):
        assert mine.tolist() == theirs.tolist()


@given(
    pieces=st.lists(st.tuples(contents, st.sampled_from(TokenKind), st.booleans()), max_size=6),
    copies=st.integers(1, 3),
)
@few
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_cut_and_empty_pieces_are_assembled_alike(load, name, pieces, copies):
    from torchmask.tokenizers.pieces import assemble

    tokenizer = load(name)
    talk = [Piece(text, kind, i, False, 0 if kind == 1 else -1, apart) for i, (text, kind, apart) in enumerate(pieces)]
    batch = tokenizer.assemble([[], *[talk] * copies, []])
    alone = assemble(
        talk,
        encode=tokenizer._backend.encode_with_offsets,
        encode_structure=tokenizer._encoders.structure,
        encode_control=tokenizer._encoders.control,
        encode_rest=tokenizer._encoders.rest,
    )
    assert len(batch[0]) == len(batch[copies + 1]) == 0
    for i in range(copies):
        assert_same(batch[i + 1], alone)


def test_texts_that_hold_every_control_token_are_still_cut_apart(load):
    backend = load("llama3")._backend
    texts = ["".join(LLAMA3_SPECIALS), "b", "<|eot_id|>"]
    many = backend.encode_many(texts)
    assert [many.ids[a:b].tolist() for a, b in zip(many.offsets, many.offsets[1:])] == [
        backend.encode(t) for t in texts
    ]
    assert not np.isin(many.ids, list(backend.specials.values())).any()


def test_very_long_runs_among_many_texts_keep_their_offsets(load):
    backend = load("llama3")._backend
    texts = ["a b", " " * 60_000 + "é", "c"]
    many = backend.encode_many(texts)
    assert many.ids[many.offsets[1] : many.offsets[2]].tolist() == backend.encode(texts[1])
    assert many.ends[many.offsets[1:] - 1].tolist() == [3, 60_001, 1]


def test_a_text_that_is_no_unicode_stops_the_batch_as_it_stops_alone(load):
    for name in ("llama2", "llama3", "qwen3"):
        with pytest.raises(DataError, match="lone surrogate"):
            load(name)._backend.encode_many(["good", "\ud83d"])


paragraphs = st.lists(
    st.sampled_from(["\n", "\n\n", "\r\n", "\r", " ", "\t", "\x1c", "\x85", "\u2028", "\u3000", "a", "I'm", "12345",
                     "!", "###", "\"}", "<|eot_id|>", "é", "你", "Below is an instruction.", "_", "\x7f", "~"]),
    max_size=14,
).map("".join)  # fmt: skip


@given(texts=st.lists(paragraphs, min_size=1, max_size=6))
@settings(few, max_examples=300)
def test_texts_cut_at_paragraphs_have_the_ids_of_whole_ones(load, texts):
    backend = load("llama3")._backend
    for in_characters in (True, False):
        many = backend.encode_many(texts + texts, in_characters=in_characters)
        for i, text in enumerate(texts + texts):
            cut = slice(many.offsets[i], many.offsets[i + 1])
            assert many.ids[cut].tolist() == backend.encode(text)
            data = text if in_characters else text.encode()
            assert many.starts[cut][:1].tolist() == [0][: len(text)]
            assert many.ends[cut][-1:].tolist() == [len(data)][: len(text)]


@pytest.mark.parametrize(("name", "chat_format"), [("llama3", "llama3"), ("qwen3", "chatml")])
@given(talks=conversations)
@few
def test_sketched_conversations_have_the_tokens_of_those_written_out(load, name, chat_format, talks):
    tokenizer = load(name, chat_format)
    talks = [as_messages(*talk) for talk in talks]
    sketched = [(tokenizer.sketch(talk), talk) for talk in talks]
    kept = [(sketch, talk) for sketch, talk in sketched if sketch is not None]
    assert name == "qwen3" or len(kept) == len(talks)
    batch = tokenizer.assemble_sketches([sketch for sketch, _ in kept])
    assert len(batch) == len(kept)
    for i, (_, talk) in enumerate(kept):
        alone = tokenizer.render(talk)
        assert batch[i].num_straddlers == alone.num_straddlers
        for column in ("tokens", "kinds", "turns"):
            mine, theirs = getattr(batch[i], column), getattr(alone, column)
            assert mine.dtype == theirs.dtype and mine.tolist() == theirs.tolist(), column


def test_what_a_sketch_cannot_say_is_written_out(load):
    call = Message("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    assert load("llama3", "llama3").sketch([Message("user", "q"), call]) is None
    thinking = [Message("user", "q"), Message("assistant", "<think>a</think>b")]
    assert load("qwen3", "chatml").sketch(thinking) is None
    assert load("llama2", "llama2").sketch(thinking) is None and load("qwen3").sketch(thinking) is None


def test_flags_of_messages_have_sketches_of_their_own(load):
    tokenizer = load("llama3", "llama3")
    talks = [
        [Message("user", "q"), Message("assistant", "a", eot=False)],
        [
            Message("user", "q"),
            Message("assistant", "a", ipython=True),
            Message("tool", "r"),
            Message("assistant", " "),
        ],
        [],
    ]
    batch = tokenizer.assemble_sketches([tokenizer.sketch(talk) for talk in talks])
    for i, talk in enumerate(talks):
        assert batch[i].tokens.tolist() == tokenizer.render(talk).tokens.tolist()
        assert batch[i].kinds.tolist() == tokenizer.render(talk).kinds.tolist()
