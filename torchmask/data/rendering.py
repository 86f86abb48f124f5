"""Conversations and plain text -> tokens with their kinds, with or without a chat format.

A base model's tokenizer has no chat format; for it a prompt and its answer are one text, `BOS prompt answer EOS`. It is
tokenised once, as a whole, and the answer is found by character offsets: the prompt tokenised alone may end in other
tokens than it does in front of the answer.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from torchmask.data.formats import Conversation
from torchmask.data.masks import append_eos, finish_chat
from torchmask.errors import ConfigError
from torchmask.messages import Message, Rendered, TokenKind


class Tokenizer(Protocol):
    """What this package needs of a tokenizer (`torchmask.tokenizers` has them; siblings do not import each other)."""

    bos_id: int | None
    eos_id: int | None

    @property
    def has_chat_format(self) -> bool:
        """Whether `render` works."""

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of plain text and the characters each covers: ids, starts, ends, [n] int32 each."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """A conversation in the chat format."""


def render_conversation(tokenizer: Tokenizer, conversation: Conversation, *, chat: bool) -> Rendered:
    """A conversation in the tokenizer's chat format, or as one raw text, with its EOS by the default policy.

    Args:
        tokenizer: a tokenizer.
        conversation: the messages and tools.
        chat: False = raw, for a conversation of one prompt and its answer.

    Raises:
        DataError: the chat format cannot write these messages.
    """
    messages = conversation.messages
    if chat:
        return finish_chat(tokenizer.render(messages, conversation.tools), messages, tokenizer.eos_id)
    prompt, answer = messages
    return render_raw(tokenizer, prompt.text, answer.text)


def render_raw(tokenizer: Tokenizer, prompt: str, completion: str) -> Rendered:
    """`BOS prompt completion EOS` in one tokenisation: the prompt is message 0, completion and EOS are message 1.

    A token that covers the edge belongs to the completion and is counted as a straddler.

    Raises:
        ConfigError: the tokenizer has no EOS, so nothing would teach the model to stop (C09).
    """
    ids, starts, ends = tokenizer.encode_with_offsets(prompt + completion)
    edge = len(prompt)
    in_completion = (ends > edge) | (starts >= edge)
    turns = in_completion.astype(np.int32)
    num_straddlers = int(((starts < edge) & (ends > edge)).sum())
    return append_eos(_document(tokenizer, ids, turns, num_straddlers), _eos(tokenizer), turn=1)


def render_text(tokenizer: Tokenizer, text: str, *, add_bos: bool = True, add_eos: bool = True) -> Rendered:
    """`BOS text EOS`, all of it message 0.

    Raises:
        ConfigError: EOS is asked of a tokenizer that has none (C09).
    """
    ids, _, _ = tokenizer.encode_with_offsets(text)
    rendered = _document(tokenizer, ids, np.zeros(len(ids), np.int32), 0, add_bos=add_bos)
    return append_eos(rendered, _eos(tokenizer), turn=0) if add_eos else rendered


def render_prompt(tokenizer: Tokenizer, conversation: Conversation, *, chat: bool | None = None) -> list[int]:
    """Ids that generation is fed for a conversation whose answer is wanted: what precedes the answer in training.

    Args:
        tokenizer: a tokenizer.
        conversation: messages up to the user's last; in the raw form the single prompt.
        chat: None = whether the tokenizer has a chat format.
    """
    if tokenizer.has_chat_format if chat is None else chat:
        return tokenizer.render(conversation.messages, conversation.tools, add_generation_prompt=True).tokens.tolist()
    (prompt,) = conversation.messages
    return render_text(tokenizer, prompt.text, add_eos=False).tokens.tolist()


def _document(
    tokenizer: Tokenizer,
    ids: npt.NDArray[np.int32],
    turns: npt.NDArray[np.int32],
    num_straddlers: int,
    *,
    add_bos: bool = True,
) -> Rendered:
    """BOS, where the tokenizer has one, and content."""
    kinds = np.full(len(ids), TokenKind.CONTENT, np.uint8)
    if add_bos and tokenizer.bos_id is not None:
        ids, kinds, turns = np.insert(ids, 0, tokenizer.bos_id), np.insert(kinds, 0, 0), np.insert(turns, 0, -1)
    return Rendered(ids.astype(np.int32), kinds, turns.astype(np.int32), num_straddlers)


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ConfigError(
            "C09", "the tokenizer has no EOS token", fix="add_eos=False for text, or a chat_format for rows"
        )
    return tokenizer.eos_id
