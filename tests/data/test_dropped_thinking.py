"""A native format that drops thinking from earlier answers: never trained on in part, alone and in batches."""

from functools import partial

import pytest

from torchmask import Message
from torchmask.data.bulk import Bulk
from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy
from torchmask.data.rendering import documents_of
from torchmask.errors import DataError
from torchmask.tokenizers import from_pretrained

THOUGHT = "<think>\nso\n</think>\n\na"
TALK = Conversation([
    Message("user", "q1"), Message("assistant", THOUGHT), Message("user", "q2"), Message("assistant", THOUGHT),
])  # fmt: skip
PLAIN = Conversation(
    [Message("user", "q1"), Message("assistant", "a1"), Message("user", "q2"), Message("assistant", "a")]
)


@pytest.fixture(scope="module")
def tokenizer(assets):
    return from_pretrained(assets / "tokenizers" / "qwen3", "qwen3")


def test_a_row_that_loses_a_trained_answers_thinking_is_refused(tokenizer):
    with pytest.raises(DataError, match="drops text of a trained turn once other turns follow it") as raised:
        documents_of(tokenizer, TALK, MaskPolicy(), chat=True)
    assert raised.value.id == "D14"


def test_expanded_every_answer_keeps_its_thinking(tokenizer):
    documents = documents_of(tokenizer, TALK, MaskPolicy(unstable_template="expand"), chat=True)
    learnt = [tokenizer.decode(d.rendered.tokens[d.decision.mask == 0], skip_special=False) for d in documents]
    assert learnt == [f"{THOUGHT}<|im_end|>"] * 2


def test_such_a_row_is_not_taken_into_a_batch(tokenizer):
    bulk = Bulk.of(partial(documents_of, tokenizer, policy=MaskPolicy(), chat=True))
    assert bulk.write(TALK) is None
    assert bulk.write(Conversation(TALK.messages[:2])) is not None
    assert not isinstance(bulk.write(PLAIN), list)  # a sketch, as no text is looked into
