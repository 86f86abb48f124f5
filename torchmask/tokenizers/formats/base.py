"""What chat formats are made of: the format as data, its pieces, and the checks that several of them share."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torchmask.errors import DataError
from torchmask.messages import Message, Piece, TokenKind
from torchmask.tokenizers.tool_calls import check_arguments

STRUCTURE, CONTENT, END_OF_TURN = TokenKind.STRUCTURE, TokenKind.CONTENT, TokenKind.END_OF_TURN
Tools = Sequence[dict[str, Any]] | None
Writer = Callable[[Sequence[Message], Tools, bool], list[Piece]]

BOS, EOS = "{bos_token}", "{eos_token}"
"""Tokens by their role, in formats that take whichever the tokenizer has. BOS is left out where it has none."""

ASSISTANT_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens, not flagged special, that a model writes in its own turn: in the assistant's text they are tokens."""

_MARKER = re.compile("(" + "|".join(map(re.escape, ASSISTANT_MARKERS)) + ")")


@dataclass(frozen=True)
class ChatFormat:
    """A native chat format.

    Attributes:
        name: what `chat_format` says.
        pieces: `(messages, tools, add_generation_prompt) -> pieces`.
        control: the control tokens it cannot do without.
        stops: tokens that end generation, where the tokenizer has them.
        shown: how a message's text is written, where neither it nor what is around it depends on other texts; it says
            None of a message for which that does not hold. None = it holds for none.
        optional: texts that are tokens where the tokenizer has them, and plain text elsewhere.
        takes_tools: whether it writes tools and the assistant's calls.
        takes_reasoning: whether it writes reasoning that is not in the content.
        roles: those it writes, in any order; empty = it looks at the order of roles itself, or writes any role.
        alone: whether its publisher's code encodes each text between control tokens as if it stood alone, whatever the
            tokenizer's file says about text that follows a token.
    """

    name: str
    pieces: Writer
    control: tuple[str, ...]
    stops: tuple[str, ...]
    shown: Callable[[Message], str | None] | None = None
    optional: tuple[str, ...] = ()
    takes_tools: bool = False
    takes_reasoning: bool = False
    roles: tuple[str, ...] = ()
    alone: bool = False

    def write(self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
        """The conversation as the format writes it.

        Raises:
            DataError: D07, roles that the format does not write or in an order that it does not take, tools or
                reasoning where it writes none; D08, arguments of a call that are no object.
        """
        check_arguments(messages)
        if not self.takes_tools:
            _refuse_tools(self.name, messages, tools)
        if not self.takes_reasoning:
            _refuse_reasoning(self.name, messages)
        if self.roles:
            _refuse_roles(self.name, messages, self.roles)
        return self.pieces(messages, tools, add_generation_prompt)


def bound(chat_format: ChatFormat, *, control: Collection[str], bos: str | None, eos: str | None) -> ChatFormat:
    """The format for one tokenizer: BOS and EOS by their texts, and as tokens only what the tokenizer has.

    Args:
        chat_format: a format.
        control: texts of the tokenizer's control tokens.
        bos, eos: texts of its BOS and EOS; None where it has none.
    """
    changes: dict[str, tuple[str, bool]] = {
        text: (text, False) for text in (*chat_format.optional, *ASSISTANT_MARKERS) if text not in control
    }
    for role, text in ((BOS, bos), (EOS, eos)):
        if role in chat_format.control + chat_format.optional:
            changes[role] = (text or "", text is not None)
    unbound = chat_format.pieces

    def pieces(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
        return [
            piece._replace(text=changes[piece.text][0], is_token=changes[piece.text][1])
            if piece.is_token and piece.text in changes
            else piece
            for piece in unbound(messages, tools, add_generation_prompt)
        ]

    names = {role: text for role, (text, _) in changes.items() if role in (BOS, EOS)}
    control_texts, stops = (
        tuple(names.get(text, text) for text in texts) for texts in (chat_format.control, chat_format.stops)
    )
    if not changes:
        return chat_format
    return replace(chat_format, pieces=pieces, control=control_texts, stops=stops)


@lru_cache(maxsize=4096)
def token(text: str, turn: int, kind: TokenKind = STRUCTURE) -> Piece:
    """A control token."""
    return Piece(text, kind, turn, True)


def said(message: Message, turn: int, text: str, offset: int) -> list[Piece]:
    """A message's own text from its character `offset` on (-1 = not as given); the assistant's markers are tokens."""
    if message.role != "assistant" or "<" not in text:
        return [Piece(text, CONTENT, turn, False, offset)]
    pieces: list[Piece] = []
    at = 0
    for i, part in enumerate(_MARKER.split(text)):
        if part:
            pieces.append(Piece(part, CONTENT, turn, i % 2 == 1, offset + at if offset >= 0 else -1))
        at += len(part)
    return pieces


def as_given(message: Message, turn: int) -> list[Piece]:
    """A message's text as it is."""
    return said(message, turn, message.text, 0)


def stripped(message: Message, turn: int) -> list[Piece]:
    """A message's text without blanks around it."""
    text = message.text
    inner = text.strip()
    return said(message, turn, inner, 0 if len(inner) == len(text) else len(text) - len(text.lstrip()))


def given_text(message: Message) -> str:
    """`shown` of formats that write texts as they are."""
    return message.text


def stripped_text(message: Message) -> str:
    """`shown` of formats that strip them."""
    return message.text.strip()


def ending(message: Message, turn: int, end: str, after: str = "") -> list[Piece]:
    """A turn's end token and the text that belongs to it; nothing for messages that do not end here."""
    if not message.eot:
        return []
    return [token(end, turn, END_OF_TURN), *([Piece(after, STRUCTURE, turn)] if after else ())]


def check_turns(
    name: str, messages: Sequence[Message], *, takes_system: bool = True, takes_tools: bool = False, fix: str = ""
) -> None:
    """Raises unless there is an optional system message, then user and assistant in turn.

    Args:
        name: the format's name.
        messages: the conversation.
        takes_system: whether a system message may come first.
        takes_tools: whether tool results may come between an assistant's calls and its next message.
        fix: what to do instead, where there is something to say.

    Raises:
        DataError: D07.
    """
    roles = [message.role for message in messages]
    first = 1 if takes_system and roles[:1] == ["system"] else 0
    expected: tuple[str, ...] = ("user",)
    for i, message in enumerate(messages[first:], first):
        if message.role not in expected:
            raise DataError(
                "D07",
                f"turn {i + 1} of {len(roles)} is from {message.role!r}, the chat format {name!r} expects "
                f"{' or '.join(map(repr, expected))} there; roles: {', '.join(roles)}",
                fix=fix or _turns_fix(message.role, takes_system, takes_tools),
            )
        if message.role == "user":
            expected = ("assistant",)
        elif message.role == "tool":
            expected = ("tool", "assistant")
        else:
            expected = ("tool", "user") if takes_tools and message.tool_calls else ("user",)
    if roles == ["system"]:
        raise DataError(
            "D07",
            f"the chat format {name!r} writes a system message into the user's turn, and there is none",
            fix="add the user's message, or use another chat_format",
        )


def _turns_fix(role: str, takes_system: bool, takes_tools: bool) -> str:
    if role == "system" and not takes_system:
        return "put its text into the first user message, or use another chat_format"
    order = "an optional system message first, then user" if takes_system else "user"
    return f"{order} and assistant in turn{', tool after calls' if takes_tools else ''}; or another chat_format"


_OTHER_NAMES = {"developer": "system", "human": "user", "gpt": "assistant", "function": "tool", "ipython": "tool"}


def _refuse_roles(name: str, messages: Sequence[Message], roles: Collection[str]) -> None:
    """Most published templates write nothing for a role they know nothing of, and no model has learnt such a one."""
    for i, message in enumerate(messages):
        if message.role not in roles:
            raise DataError(
                "D07",
                f"turn {i + 1} of {len(messages)} is from {message.role!r}, which the chat format {name!r} does not "
                f"write; it writes {', '.join(roles)}",
                fix=f"{_meant(message.role, roles)}leave it out, or use another chat_format",
            )


def _meant(role: str, roles: Collection[str]) -> str:
    """The name that a format has for a role known elsewhere by another."""
    other = _OTHER_NAMES.get(role)
    return f"did you mean {other!r}? Else " if other in roles else ""


def _refuse_tools(name: str, messages: Sequence[Message], tools: Tools) -> None:
    """Native formats without tool calls must not drop them in silence."""
    if not tools and not any(message.tool_calls for message in messages):
        return
    turn = next((i for i, message in enumerate(messages) if message.tool_calls), None)
    what = "tools are given" if turn is None else f"turn {turn + 1} has tool_calls"
    raise DataError(
        "D07",
        f"{what}, which the chat format {name!r} does not write",
        fix="use the folder's own template (leave chat_format out), or write the calls into the content",
    )


def _refuse_reasoning(name: str, messages: Sequence[Message]) -> None:
    """Nor may those without thinking drop reasoning."""
    turn = next((i for i, message in enumerate(messages) if message.reasoning_text), None)
    if turn is not None:
        raise DataError(
            "D07",
            f"turn {turn + 1} has reasoning beside its content, which the chat format {name!r} does not write",
            fix="write it into the content as the model is to write it (<think>...</think>), leave it out, or use a "
            "format or template that thinks, such as qwen3",
        )
