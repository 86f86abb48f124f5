"""Chat formats written here: Llama-2-chat, Llama-3 and ChatML, with the ids that their publishers' code makes.

A format is a function from a conversation to pieces (text with an owner, control tokens by name), so what is structure,
content and end of turn is known from writing it. What the template puts between the generation prompt and the
end-of-turn token (Llama-2's blanks around an answer) is content: the model has to produce it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torchmask.errors import DataError
from torchmask.messages import Message, TokenKind
from torchmask.tokenizers.pieces import Piece

STRUCTURE, CONTENT, END_OF_TURN = TokenKind.STRUCTURE, TokenKind.CONTENT, TokenKind.END_OF_TURN
Tools = Sequence[dict[str, Any]] | None


@dataclass(frozen=True)
class ChatFormat:
    """A native chat format.

    Attributes:
        name: what `chat_format` says.
        pieces: `(messages, add_generation_prompt) -> pieces`.
        control: the control tokens it writes, which the tokenizer must have.
        stops: tokens that end generation, where the tokenizer has them.
        shown: how a text is written, where neither it nor what is around it depends on other texts; else None.
    """

    name: str
    pieces: Callable[[Sequence[Message], bool], list[Piece]]
    control: tuple[str, ...]
    stops: tuple[str, ...]
    shown: Callable[[str], str] | None = None


def llama2(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """`<s>[INST] <<SYS>>..<</SYS>> user [/INST] answer </s>`, the system message inside the first user turn.

    Ends in ` [/INST]` whenever the last message is the user's, which is its generation prompt.

    Raises:
        DataError: D07, the roles are not an optional system message, then user and assistant in turn.
    """
    _check_turns("llama2", messages)
    pieces: list[Piece] = []
    system = 1 if messages and messages[0].role == "system" else 0
    for i, message in enumerate(messages[system:], system):
        if message.role == "user":
            pieces += [Piece("<s>", STRUCTURE, i, True), Piece("[INST] ", STRUCTURE, i)]
            if system and i == 1:
                pieces += [Piece("<<SYS>>\n", STRUCTURE, 0), Piece(messages[0].text, CONTENT, 0, offset=0),
                           Piece("\n<</SYS>>\n\n", STRUCTURE, 0)]  # fmt: skip
                text = message.text
                pieces.append(Piece(text.rstrip(), CONTENT, i, offset=0))
            else:
                pieces.append(_stripped(message.text, i))
            pieces.append(Piece(" [/INST]", STRUCTURE, i))
        else:
            pieces += [Piece(" ", CONTENT, i), _stripped(message.text, i), Piece(" ", CONTENT, i)]
            pieces += [Piece("</s>", END_OF_TURN, i, True)] if message.eot else []
    return pieces


def llama3(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """`<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>` for each message, after one BOS.

    Tool results have the role `ipython`. A message with `ipython` set begins with `<|python_tag|>` and ends in
    `<|eom_id|>`: the turn goes on after the tool has answered.
    """
    pieces = [_LLAMA3_BOS]
    for i, message in enumerate(messages):
        pieces += _llama3_header("ipython" if message.role == "tool" else message.role, i)
        pieces += [Piece("<|python_tag|>", CONTENT, i, True)] if message.ipython else ()
        pieces.append(_stripped(message.text, i))
        if message.ipython or message.eot:
            pieces.append(_end_of_turn("<|eom_id|>" if message.ipython else "<|eot_id|>", i))
    return [*pieces, *(_llama3_header("assistant", -1) if add_generation_prompt else ())]


def chatml(messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """`<|im_start|>role\\ncontent<|im_end|>\\n` for each message; content as it is given."""
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        pieces += [Piece("<|im_start|>", STRUCTURE, i, True), Piece(f"{message.role}\n", STRUCTURE, i)]
        pieces.append(Piece(message.text, CONTENT, i, offset=0))
        if message.eot:
            pieces += [Piece("<|im_end|>", END_OF_TURN, i, True), Piece("\n", STRUCTURE, i)]
    if add_generation_prompt:
        pieces += [Piece("<|im_start|>", STRUCTURE, -1, True), Piece("assistant\n", STRUCTURE, -1)]
    return pieces


_LLAMA3_BOS = Piece("<|begin_of_text|>", STRUCTURE, -1, True)


@lru_cache(maxsize=1024)
def _end_of_turn(text: str, turn: int) -> Piece:
    return Piece(text, END_OF_TURN, turn, True)


@lru_cache(maxsize=1024)
def _llama3_header(role: str, turn: int) -> tuple[Piece, ...]:
    return (
        Piece("<|start_header_id|>", STRUCTURE, turn, True),
        Piece(role, STRUCTURE, turn),
        Piece("<|end_header_id|>", STRUCTURE, turn, True),
        Piece("\n\n", STRUCTURE, turn),
    )


def _stripped(text: str, turn: int) -> Piece:
    """The text without blanks around it, as content."""
    stripped = text.strip()
    return Piece(stripped, CONTENT, turn, False, 0 if len(stripped) == len(text) else len(text) - len(text.lstrip()))


def _check_turns(name: str, messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    for i, role in enumerate(roles[first:], first):
        expected = ("user", "assistant")[(i - first) % 2]
        if role != expected:
            raise DataError(
                "D07",
                f"turn {i + 1} of {len(roles)} is from {role!r}, the chat format {name!r} expects {expected!r} there; "
                f"roles: {', '.join(roles)}",
                fix="an optional system message first, then user and assistant in turn; or another chat_format",
            )
    if roles == ["system"]:
        raise DataError(
            "D07",
            f"the chat format {name!r} writes a system message into the user's turn, and there is none",
            fix="add the user's message, or use another chat_format",
        )


NATIVE_FORMATS = {
    chat_format.name: chat_format
    for chat_format in (
        ChatFormat("llama2", llama2, ("<s>", "</s>"), ("</s>",)),
        ChatFormat(
            "llama3",
            llama3,
            ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            ("<|eot_id|>", "<|eom_id|>"),
            shown=str.strip,
        ),
        ChatFormat("chatml", chatml, ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",), shown=str),
    )
}
