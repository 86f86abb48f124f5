"""Conversations, and what a tokenizer says about every token of one.

`Message` is what formats make and chat formats render; `Rendered` is what a rendering knows of each token (its message,
its kind), so that masks are decided by index and never by comparing token values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt

ROLES = ("system", "user", "assistant", "tool")


class MaskFlag(IntFlag):
    """What a token is excluded from; 0 means trained and seen.

    `True == MaskFlag.LOSS`, so a torchtune mask (list of bool, True = ignored) is a valid mask.
    """

    NONE = 0
    LOSS = 1  # not a training target
    ATTENTION = 2  # no later token may attend to it


@dataclass
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: the text, or a list of parts `{"type": "text", "text": ...}`.
        masked: True = no token of it is trained, False = its content and end of turn are, None = the masking strategy
            decides (the assistant's are trained).
        ipython: the assistant's text is code for a tool to run (Llama-3's `<|python_tag|>`).
        eot: whether the turn ends here; False leaves out the end-of-turn token (torchtune's meaning).
        tool_calls: calls the assistant makes, in OpenAI's shape `{"function": {"name", "arguments"}}`.
    """

    role: str
    content: str | list[dict[str, Any]]
    masked: bool | None = None
    ipython: bool = False
    eot: bool = True
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content)

    @property
    def trained(self) -> bool:
        """Whether its content and end of turn are training targets when no other rule speaks."""
        return self.role == "assistant" if self.masked is None else not self.masked


class TokenKind(IntEnum):
    """What a rendered token is, whoever wrote it."""

    STRUCTURE = 0  # BOS, role headers, separators: written by the template, never by the model
    CONTENT = 1  # text of a message, including what the template puts around an answer after the generation prompt
    END_OF_TURN = 2  # the token that ends a message; the model must produce it after an assistant's message
    EOS = 3  # the token that ends the document, where it is not the last message's end of turn


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered once: ids and, for each, its kind and its message.

    Attributes:
        tokens: [n] int32.
        kinds: [n] uint8 of `TokenKind`. A token that covers the edge of header and content counts as content.
        turns: [n] int32, index of the message each token belongs to; -1 where it belongs to none.
        num_straddlers: how many tokens cover both structure and content.
        content_starts, content_ends: [n] int32, the characters of its message's text that a token covers; -1 where it
            stands for none of them. None where the tokenizer does not say.
    """

    tokens: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    turns: npt.NDArray[np.int32]
    num_straddlers: int = 0
    content_starts: npt.NDArray[np.int32] | None = None
    content_ends: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


def default_mask(rendered: Rendered, messages: Sequence[Message]) -> npt.NDArray[np.uint8]:
    """[n] uint8 of `MaskFlag`: content and end of turn of the trained messages are targets, all else is not.

    >>> r = Rendered(np.array([1, 5, 6, 2]), np.array([0, 1, 1, 2], np.uint8), np.array([-1, 0, 1, 1]))
    >>> default_mask(r, [Message("user", "a"), Message("assistant", "b")]).tolist()
    [1, 1, 0, 0]
    """
    trained = np.array([m.trained for m in messages] + [False])  # the last entry answers for turn -1
    is_target = (rendered.kinds == TokenKind.CONTENT) | (rendered.kinds == TokenKind.END_OF_TURN)
    return np.where(is_target & trained[rendered.turns], MaskFlag.NONE, MaskFlag.LOSS).astype(np.uint8)
