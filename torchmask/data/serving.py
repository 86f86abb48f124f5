"""Train equals serve: before each trained turn a model must see the ids that generation would feed it.

Most templates write a conversation so that every prefix of it is written the same way, and one document teaches all of
its turns. Templates that rewrite history (Qwen's, which drops the thinking of earlier turns) do not: what such a
document shows of an early turn is not what the model writes there. Rows like that are refused, or expanded into one
document for each trained turn.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from torchmask.data.formats import Conversation
from torchmask.data.policy import MaskPolicy, detail_weight, turn_weights
from torchmask.data.span_masks import split_at_edges
from torchmask.data.spans import part_ranges
from torchmask.errors import DataError
from torchmask.messages import Message, Piece, Rendered, TokenKind, said_weight

_OPENING = re.compile(r"^\s*<think>")
_THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)+?)</think>", re.DOTALL)  # as answers begin with it


class ChatTokenizer(Protocol):
    """A tokenizer with a chat format."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> Rendered:
        """A conversation in the chat format; the option `edit` is given only where texts are to be cut."""

    def id_to_piece(self, id: int) -> str:
        """A token as its file spells it."""


class Writing(NamedTuple):
    """One document to render.

    Attributes:
        messages: those to write; `Message.trained` says which have targets and so have to be located.
        options: for `Tokenizer.render`: `edit` where texts are to be cut.
        only: messages that may be trained; None = all.
    """

    messages: Sequence[Message]
    options: dict[str, Any]
    only: range | None


class Mismatch(NamedTuple):
    """Where training and inference part.

    Attributes:
        turn: index of the trained message.
        position: the first token before its answer, or of it, that differs.
        trained: the id there in the training document, None where it has none.
        served: the id there that generation would be fed, None where it ends before.
    """

    turn: int
    position: int
    trained: int | None
    served: int | None

    def describe(self, tokenizer: ChatTokenizer) -> str:
        """In words, with the tokens as their file spells them."""
        trained, served = (
            "nothing" if id is None else f"{tokenizer.id_to_piece(id)!r} ({id})" for id in (self.trained, self.served)
        )
        return (
            f"the first token that differs up to turn {self.turn + 1} is number {self.position}: {trained} in "
            f"training, {served} at inference"
        )


def lost_text(pieces: Sequence[Piece] | None, messages: Sequence[Message]) -> int | None:
    """The first trained assistant message that the template has not written as the model is to; None = none.

    It has dropped a part of the message's text or reasoning (blanks do not count, and neither does what it adds), or a
    part of the prompt that generation would be fed (`Piece.served`).

    >>> shown = [Piece("y", TokenKind.CONTENT, 0)]
    >>> lost_text(shown, [Message("assistant", "<think>x</think>y")])
    0
    """
    return next(_lost(pieces, messages), None)


def _lost(pieces: Sequence[Piece] | None, messages: Sequence[Message]) -> Iterator[int]:
    return (i for i, message in enumerate(messages) if message.trained and _is_lost(pieces, i, message))


def _is_lost(pieces: Sequence[Piece] | None, turn: int, message: Message) -> bool:
    if pieces is None or message.role != "assistant":
        return False
    if message.reasoning and _loses_reasoning(pieces, turn, message):
        return True
    if any(piece.turn == turn and not piece.served for piece in pieces):
        return True
    own = _content(pieces, turn)
    size = len(message.text)
    opened = _OPENING.sub("", message.text)  # a prompt may have opened the thinking
    return not any(0 <= piece.offset < size for piece in own) and not _is_in(opened, own)


def _loses_reasoning(pieces: Sequence[Piece] | None, turn: int, message: Message) -> bool:
    """Whether the reasoning of a message is not in what the template wrote of it."""
    if pieces is None or not message.reasoning_text.strip():
        return False
    own = _content(pieces, turn)
    size = len(message.text)
    return not any(piece.offset >= size for piece in own) and not _is_in(message.reasoning_text, own)


def _drops_thinking(pieces: Sequence[Piece] | None, turn: int, message: Message) -> bool:
    """Whether a message's text begins with thinking that is not in what the template wrote of it."""
    thought = _THOUGHT.match(message.text)
    return pieces is not None and thought is not None and not _is_in(thought[1], _content(pieces, turn))


def _content(pieces: Sequence[Piece], turn: int) -> list[Piece]:
    return [piece for piece in pieces if piece.turn == turn and piece.kind == TokenKind.CONTENT]


def _is_in(text: str, pieces: Sequence[Piece]) -> bool:
    """Whether a text stands in the pieces, blanks aside."""
    return "".join(text.split()) in "".join("".join(piece.text for piece in pieces).split())


def is_rewritten(tokenizer: ChatTokenizer, rendered: Rendered, one: Writing, conversation: Conversation) -> bool:
    """Whether the template drops text of a trained turn that it would write if that turn were the last.

    Raises:
        DataError: D07, it drops the turn's reasoning even then.
    """
    for lost in _lost(rendered.pieces, one.messages):
        shown = one.messages[: lost + 1]
        is_last = len(shown) == len(one.messages)
        last = rendered if is_last else tokenizer.render(shown, conversation.tools)
        refuse_lost_reasoning(last.pieces, shown)
        if not is_last and lost not in _lost(last.pieces, shown):
            return True
    return False


def refuse_lost_reasoning(pieces: Sequence[Piece] | None, messages: Sequence[Message]) -> None:
    """Nothing, where the reasoning of the last message, in its text or beside it, is written or not trained.

    Raises:
        DataError: D07.
    """
    last = len(messages) - 1
    message = messages[last]
    if message.trained and _loses_reasoning(pieces, last, message):
        raise DataError(
            "D07",
            f"turn {last + 1} has reasoning beside its content, which the chat template does not write there",
            fix="write it into the content, leave it out, or do not train this turn",
        )
    if message.trained and message.role == "assistant" and _drops_thinking(pieces, last, message):
        raise DataError(
            "D07",
            f"turn {last + 1} thinks before it answers, which the chat template drops even where no turn follows",
            fix="leave the thinking out of the row, do not train this turn, or put a chat_template.jinja that keeps it "
            "into the folder",
        )


def may_train(messages: Sequence[Message], policy: MaskPolicy) -> list[bool]:
    """Which messages can have targets: as a whole, in a part, or by a span rule."""
    training = [named.rule for named in policy.rules if named.rule.own_weight]
    return [
        weight != 0
        or any(rule.looks_at(message.role) for rule in training)
        or any(detail_weight(detail) for detail in message.train_detail)
        or (bool(message.reasoning or not isinstance(message.content, str)) and any(map(_part_weight, _parts(message))))
        for message, (weight, _) in zip(messages, turn_weights(messages, policy), strict=True)
    ]


def _parts(message: Message) -> list[Mapping[str, Any]]:
    return [part for part, _ in part_ranges(message)]


def _part_weight(part: Mapping[str, Any]) -> float | None:
    return said_weight(part.get("masked"), part.get("train"), part.get("weight"))


def writing(conversation: Conversation, policy: MaskPolicy) -> Writing:
    """The conversation as one document."""
    messages = conversation.messages
    return Writing(_said(messages, may_train(messages, policy)), _options(messages, policy), None)


def expanded(conversation: Conversation, policy: MaskPolicy) -> list[Writing]:
    """One document for each trained assistant turn, which ends there; other trained turns go with the next of them."""
    messages = conversation.messages
    trained = may_train(messages, policy)
    result: list[Writing] = []
    first = 0
    for i, message in enumerate(messages):
        if not trained[i] or (message.role != "assistant" and any(_answers(messages, trained, i + 1))):
            continue
        mine = [yes and j >= first for j, yes in enumerate(trained[: i + 1])]
        shown = messages[: i + 1]
        result.append(Writing(_said(shown, mine), _options(shown, policy), range(first, i + 1)))
        first = i + 1
    return result


def _answers(messages: Sequence[Message], trained: Sequence[bool], start: int) -> list[bool]:
    return [trained[j] and messages[j].role == "assistant" for j in range(start, len(messages))]


def _said(messages: Sequence[Message], trained: Sequence[bool]) -> list[Message]:
    """The messages, each saying itself whether it has targets."""
    return [
        message if message.trained == yes else replace(message, masked=not yes, train=None, weight=None)
        for message, yes in zip(messages, trained, strict=True)
    ]


def _options(messages: Sequence[Message], policy: MaskPolicy) -> dict[str, Any]:
    return {"edit": partial(split_at_edges, messages=messages, policy=policy)} if policy.straddle == "split" else {}


def serving_mismatch(
    tokenizer: ChatTokenizer, conversation: Conversation, policy: MaskPolicy | None = None
) -> Mismatch | None:
    """The first trained assistant turn before which training shows other ids than generation would feed; None = none.

    Also found is a token that covers both the end of the generation prompt and the beginning of the answer, which no
    model can produce after that prompt (`straddle: split` cuts there).

    Args:
        tokenizer: with a chat format.
        conversation: the messages and tools.
        policy: says which turns are trained; None = the assistant's.
    """
    messages, tools = conversation.messages, conversation.tools
    policy = policy or MaskPolicy()
    trained = may_train(messages, policy)
    anywhere = _said(messages, [False] * len(messages))  # nothing has to be located
    rendered = tokenizer.render(anywhere, tools, **_options(messages, policy))
    whole = rendered.tokens
    for i, message in enumerate(messages):
        if not trained[i] or message.role != "assistant":
            continue
        try:
            served = tokenizer.render(messages[:i], tools, True).tokens
        except DataError:
            return Mismatch(i, 0, int(whole[0]) if len(whole) else None, None)
        own = np.flatnonzero((rendered.turns == i) & (rendered.kinds != TokenKind.STRUCTURE))
        at = _first_difference(whole, served)
        if at is None and len(own) and int(own[0]) < len(served):
            at = int(own[0])
        if at is None and _is_lost(rendered.pieces, i, message):
            served = tokenizer.render(messages[: i + 1], tools).tokens
            at = _first_difference(whole, served)
        if at is not None:
            here = int(whole[at]) if at < len(whole) else None
            return Mismatch(i, at, here, int(served[at]) if at < len(served) else None)
    return None


def _first_difference(whole: npt.NDArray[np.int32], served: npt.NDArray[np.int32]) -> int | None:
    """Where `served` is not how `whole` begins; None where it is."""
    size = min(len(served), len(whole))
    differs = np.flatnonzero(whole[:size] != served[:size])
    if len(differs):
        return int(differs[0])
    return size if len(served) > len(whole) else None
