"""Conversations, and what a tokenizer says about every token of one.

`Message` is what formats make and chat formats render; `Rendered` is what a rendering knows of each token (its message,
its kind), so that masks are decided by index and never by comparing token values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

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
        content: the text, or a list of parts `{"type": "text", "text": ...}`, each of which may say for itself
            `masked`, `train`, `weight` and `visible`, and may have a `name` for span rules. None beside `tool_calls`,
            which is OpenAI's way, is an empty text.
        masked: True = no token of it is trained, False = its content and end of turn are, None = the masking strategy
            decides (the assistant's are trained).
        ipython: the assistant's text is code for a tool to run (Llama-3's `<|python_tag|>`).
        eot: whether the turn ends here; False leaves out the end-of-turn token (torchtune's meaning).
        tool_calls: calls the assistant makes, in OpenAI's shape `{"function": {"name", "arguments"}}`.
        weight: scales the loss of its content and end of turn; 0 = not trained, None = nothing is said.
        train: the opposite of `masked`, under the name that Axolotl's rows use.
        visible: False = no later token may attend to its content.
        train_detail: character ranges of its text with their own say, as Axolotl writes them: `begin_offset` and
            `end_offset`, the first and the last character, with `train`, `weight` or `visible`; the rest is masked.
        name: who speaks, for templates that write it.
        tool_call_id: the call that a tool's message answers, for templates that write it.
        reasoning: what the assistant thought before its answer, where the content does not hold it: a text, or a part
            as in `content`. Chat formats that write thinking put it there; span rules call it the part `reasoning`.
    """

    role: str
    content: str | list[dict[str, Any]]
    masked: bool | None = None
    ipython: bool = False
    eot: bool = True
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    weight: float | None = None
    train: bool | None = None
    visible: bool = True
    train_detail: Sequence[Mapping[str, Any]] = ()
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.content is None and self.tool_calls:
            self.content = ""

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content)

    @property
    def reasoning_text(self) -> str:
        """The reasoning as a string, empty where there is none.

        Where characters of a message are counted (`Piece.offset`), those of its reasoning follow those of its `text`,
        whatever the order in which a chat format writes the two.
        """
        if self.reasoning is None or isinstance(self.reasoning, str):
            return self.reasoning or ""
        text: str = self.reasoning["text"]
        return text

    @property
    def trained(self) -> bool:
        """Whether its content and end of turn are training targets when no other rule speaks."""
        own = self.own_weight
        return self.role == "assistant" if own is None else own != 0

    @property
    def own_weight(self) -> float | None:
        """What `masked`, `train` and `weight` say together; None where none of them is set.

        >>> Message("user", "a").own_weight, Message("user", "a", weight=0.5).own_weight
        (None, 0.5)
        """
        return said_weight(self.masked, self.train, self.weight)


def said_weight(masked: bool | None, train: bool | None, weight: float | None) -> float | None:
    """The weight that the three ways to say it come to; what masks wins over what does not."""
    if masked or train is False:
        return 0.0
    if weight is not None:
        return float(weight)
    return None if masked is None and train is None else 1.0


class TokenKind(IntEnum):
    """What a rendered token is, whoever wrote it."""

    STRUCTURE = 0  # BOS, role headers, separators: written by the template, never by the model
    CONTENT = 1  # text of a message, including what the template puts around an answer after the generation prompt
    END_OF_TURN = 2  # the token that ends a message; the model must produce it after an assistant's message
    EOS = 3  # the token that ends the document, where it is not the last message's end of turn


class Piece(NamedTuple):
    """A stretch of a rendering with its owner: text, or one control token.

    Attributes:
        text: plain text, or the control token's text.
        kind: what its tokens are.
        turn: index of the message it belongs to; -1 for none.
        is_token: whether `text` names one token, to be written as its id.
        offset: where in its message's text, and then its reasoning, the text begins; -1 where it is in neither.
        apart: whether a token may not reach over its beginning (`straddle: split`).
        served: False for an answer whose header in this rendering is not the whole prompt that generation would be fed.
    """

    text: str
    kind: TokenKind
    turn: int
    is_token: bool = False
    offset: int = -1
    apart: bool = False
    served: bool = True


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered once: ids and, for each, its kind and its message.

    Attributes:
        tokens: [n] int32.
        kinds: [n] uint8 of `TokenKind`. A token that covers the edge of header and content counts as content.
        turns: [n] int32, index of the message each token belongs to; -1 where it belongs to none.
        num_straddlers: how many tokens cover both structure and content.
        content_starts, content_ends: [n] int32, the characters of its message's text that a token covers, those of its
            reasoning counted on from there; -1 where it stands for none. None where the tokenizer does not say.
        pieces: the rendering's text by owner, in order; None where the tokenizer does not say.
        starts, ends: [n] int32, the characters that a token covers, counted over the texts of all pieces.
    """

    tokens: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    turns: npt.NDArray[np.int32]
    num_straddlers: int = 0
    content_starts: npt.NDArray[np.int32] | None = None
    content_ends: npt.NDArray[np.int32] | None = None
    pieces: Sequence[Piece] | None = None
    starts: npt.NDArray[np.int32] | None = None
    ends: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RenderedBatch:
    """Many conversations rendered together, one after the other in flat columns; `batch[i]` is a `Rendered` of views.

    Attributes:
        tokens, kinds, turns, content_starts, content_ends: [n] as in `Rendered`, of all conversations.
        offsets: [C + 1] int64; conversation i has the tokens `offsets[i]:offsets[i + 1]`.
        num_straddlers: [C] int64, as in `Rendered`, of each conversation.
        pieces: those of each conversation.
        starts, ends: [n] int32, the characters that a token covers, counted over the pieces of all conversations.
        bases: [C] int32, where each conversation's characters begin among them.
    """

    tokens: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    turns: npt.NDArray[np.int32]
    content_starts: npt.NDArray[np.int32]
    content_ends: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    num_straddlers: npt.NDArray[np.int64]
    pieces: Sequence[Sequence[Piece]]
    starts: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]
    bases: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Rendered:
        cut = slice(self.offsets[index], self.offsets[index + 1])
        return Rendered(
            self.tokens[cut],
            self.kinds[cut],
            self.turns[cut],
            int(self.num_straddlers[index]),
            self.content_starts[cut],
            self.content_ends[cut],
            self.pieces[index],
            self.starts[cut] - self.bases[index],
            self.ends[cut] - self.bases[index],
        )


def default_mask(rendered: Rendered, messages: Sequence[Message]) -> npt.NDArray[np.uint8]:
    """[n] uint8 of `MaskFlag`: content and end of turn of the trained messages are targets, all else is not.

    >>> r = Rendered(np.array([1, 5, 6, 2]), np.array([0, 1, 1, 2], np.uint8), np.array([-1, 0, 1, 1]))
    >>> default_mask(r, [Message("user", "a"), Message("assistant", "b")]).tolist()
    [1, 1, 0, 0]
    """
    trained = np.array([m.trained for m in messages] + [False])  # the last entry answers for turn -1
    is_target = (rendered.kinds == TokenKind.CONTENT) | (rendered.kinds == TokenKind.END_OF_TURN)
    return np.where(is_target & trained[rendered.turns], MaskFlag.NONE, MaskFlag.LOSS).astype(np.uint8)
