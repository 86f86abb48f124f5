"""Google's formats: Gemma and Gemma 2, and Gemma 3."""

from collections.abc import Sequence

from torchmask.messages import Message, Piece
from torchmask.tokenizers.formats.base import (
    STRUCTURE,
    ChatFormat,
    Tools,
    as_given,
    check_turns,
    ending,
    stripped,
    stripped_text,
    token,
)


def gemma(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<bos>`, then `<start_of_turn>role\\ncontent<end_of_turn>\\n` for each message; the assistant is `model`.

    Raises:
        DataError: D07, a system message, or roles that are not user and assistant in turn.
    """
    check_turns("gemma", messages, takes_system=False)
    return _written(messages, 0, add_generation_prompt)


def gemma3(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """Gemma's format with the system message, as it is given, in front of the first user message.

    Raises:
        DataError: D07, the roles are not an optional system message, then user and assistant in turn.
    """
    check_turns("gemma3", messages)
    return _written(messages, 1 if messages and messages[0].role == "system" else 0, add_generation_prompt)


def _written(messages: Sequence[Message], first: int, add_generation_prompt: bool) -> list[Piece]:
    pieces = [token("<bos>", -1)]
    for i, message in enumerate(messages[first:], first):
        pieces += _header("model" if message.role == "assistant" else message.role, i)
        if first and i == first:
            pieces += [*as_given(messages[0], 0), Piece("\n\n", STRUCTURE, 0)]
        pieces += [*stripped(message, i), *ending(message, i, "<end_of_turn>", "\n")]
    return [*pieces, *(_header("model", -1) if add_generation_prompt else ())]


def _header(role: str, turn: int) -> tuple[Piece, ...]:
    return token("<start_of_turn>", turn), Piece(f"{role}\n", STRUCTURE, turn)


_CONTROL = ("<bos>", "<start_of_turn>", "<end_of_turn>")

FORMATS = (
    ChatFormat("gemma", gemma, _CONTROL, ("<end_of_turn>",), shown=stripped_text),
    ChatFormat("gemma3", gemma3, _CONTROL, ("<end_of_turn>",), shown=stripped_text),
)
