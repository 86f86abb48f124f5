"""Formats whose headers are plain text: Zephyr and Alpaca, for any tokenizer that has an end-of-text token."""

from collections.abc import Sequence

from torchmask.errors import DataError
from torchmask.messages import Message, Piece
from torchmask.tokenizers.formats.base import (
    BOS,
    CONTENT,
    EOS,
    STRUCTURE,
    ChatFormat,
    Tools,
    as_given,
    check_turns,
    ending,
    given_text,
    token,
)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_ALPACA_BEGINS, _ALPACA_ENDS = "Below is an instruction that describes a task", "### Response:"


def zephyr(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<|role|>\\ncontent</s>\\n` for each message, the headers as text; no BOS, EOS ends a turn."""
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        before = "\n" if i and messages[i - 1].eot else ""
        pieces += [Piece(f"{before}<|{message.role}|>\n", STRUCTURE, i), *as_given(message, i)]
        pieces += ending(message, i, EOS)
    after = "\n" if messages and messages[-1].eot else ""
    if add_generation_prompt:
        return [*pieces, Piece(f"{after}<|assistant|>\n", STRUCTURE, -1)]
    return [*pieces, *([Piece(after, STRUCTURE, len(messages) - 1)] if after else ())]


def alpaca(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """Stanford Alpaca's two prompts (tatsu-lab/stanford_alpaca, train.py), then the response and EOS.

    The user's message is the instruction; parts of its content with the name `input` are the input, and bring the
    prompt for that. A user's message that already is one of the prompts, as `alpaca_dataset` makes it, stays as it is.
    A system message replaces the first paragraph.

    Raises:
        DataError: D07, more than one instruction and one response: the prompt is made for no more.
    """
    check_turns("alpaca", messages)
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > first + 2:
        raise DataError(
            "D07",
            f"the conversation has {len(messages) - first} turns; the chat format 'alpaca' is one instruction and one "
            "response",
            fix="split the rows, or use another chat_format",
        )
    pieces = [token(BOS, -1)]
    for i, message in enumerate(messages[first:], first):
        if message.role == "user":
            pieces += _prompt(messages[0] if first else None, message, i)
        else:
            pieces += [*as_given(message, i), *ending(message, i, EOS)]
    return pieces


def _prompt(system: Message | None, message: Message, turn: int) -> list[Piece]:
    if system is None and message.text.startswith(_ALPACA_BEGINS) and message.text.endswith(_ALPACA_ENDS):
        return as_given(message, turn)
    parts = message.content if isinstance(message.content, list) else [{"text": message.content}]
    asked: list[Piece] = []
    given: list[Piece] = []
    at = 0
    for part in parts:
        piece = Piece(part["text"], CONTENT, turn, False, at)
        (given if part.get("name") == "input" else asked).append(piece)
        at += len(part["text"])
    has_input = any(piece.text for piece in given)
    if system is None:
        pieces = [Piece(_ALPACA_WITH_INPUT if has_input else _ALPACA, STRUCTURE, turn)]
    else:
        pieces = [*as_given(system, 0), Piece("\n\n", STRUCTURE, 0)]
    pieces += [Piece("### Instruction:\n", STRUCTURE, turn), *asked]
    pieces += [Piece("\n\n### Input:\n", STRUCTURE, turn), *given] if has_input else []
    return [*pieces, Piece(f"\n\n{_ALPACA_ENDS}", STRUCTURE, turn)]


FORMATS = (
    ChatFormat("zephyr", zephyr, (EOS,), (EOS,), shown=given_text, roles=("system", "user", "assistant")),
    ChatFormat("alpaca", alpaca, (EOS,), (EOS,), optional=(BOS,)),
)
