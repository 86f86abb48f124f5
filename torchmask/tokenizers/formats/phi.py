"""Microsoft's formats: Phi-3, Phi-3.5, Phi-4 and Phi-4-mini. None of them writes a BOS."""

from collections.abc import Sequence
from functools import partial

from torchmask.errors import DataError
from torchmask.messages import Message, Piece, TokenKind
from torchmask.tokenizers.formats.base import (
    STRUCTURE,
    ChatFormat,
    Tools,
    as_given,
    ending,
    given_text,
    token,
)
from torchmask.tokenizers.tool_calls import to_json

_ROLES = ("system", "user", "assistant")


def phi3(
    messages: Sequence[Message], tools: Tools, add_generation_prompt: bool, *, writes_empty_system: bool
) -> list[Piece]:
    """`<|role|>\\ncontent<|end|>\\n` for each message, and the document's end where no answer is asked for.

    Args:
        messages, tools, add_generation_prompt: as in every format.
        writes_empty_system: whether an empty system message is written (Phi-3) or left out (Phi-3.5).
    """
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        if message.role != "system" or message.text or writes_empty_system:
            pieces += [token(f"<|{message.role}|>", i), Piece("\n", STRUCTURE, i), *as_given(message, i)]
            pieces += ending(message, i, "<|end|>", "\n")
    if add_generation_prompt:
        return [*pieces, token("<|assistant|>", -1), Piece("\n", STRUCTURE, -1)]
    return [*pieces, *_end_of_document(messages)]


def phi4(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<|im_start|>role<|im_sep|>content<|im_end|>` for each message, nothing between them."""
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        pieces += [*_phi4_header(message.role, i), *as_given(message, i), *ending(message, i, "<|im_end|>")]
    return [*pieces, *(_phi4_header("assistant", -1) if add_generation_prompt else ())]


def phi4_mini(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<|role|>content<|end|>` for each message, tools as a JSON list of functions behind the system message's text.

    The published template writes no calls, so the assistant's are refused; a tool's message has the role `tool`.

    Raises:
        DataError: D07, a message with tool calls.
    """
    for i, message in enumerate(messages):
        if message.tool_calls:
            raise DataError(
                "D07",
                f"turn {i + 1} has tool_calls, which the chat format 'phi4_mini' does not write",
                fix="write the call into the content, between <|tool_call|> and <|/tool_call|> as the model card says",
            )
    pieces: list[Piece] = []
    has_system = bool(messages) and messages[0].role == "system"
    if tools and not has_system:
        pieces += [token("<|system|>", -1), *_described(tools, -1), token("<|end|>", -1)]
    for i, message in enumerate(messages):
        pieces += [token(f"<|{message.role}|>", i), *as_given(message, i)]
        pieces += _described(tools, 0) if tools and has_system and i == 0 else []
        pieces += ending(message, i, "<|end|>")
    if add_generation_prompt:
        return [*pieces, token("<|assistant|>", -1)]
    return [*pieces, *_end_of_document(messages)]


def _described(tools: Sequence[dict[str, object]], turn: int) -> list[Piece]:
    functions = to_json([tool.get("function", tool) for tool in tools])
    return [token("<|tool|>", turn), Piece(functions, STRUCTURE, turn), token("<|/tool|>", turn)]


def _phi4_header(role: str, turn: int) -> tuple[Piece, ...]:
    return token("<|im_start|>", turn), Piece(role, STRUCTURE, turn), token("<|im_sep|>", turn)


def _end_of_document(messages: Sequence[Message]) -> list[Piece]:
    """`<|endoftext|>`, which ends the document and not a turn; not after a turn that goes on."""
    if messages and not messages[-1].eot:
        return []
    return [token("<|endoftext|>", len(messages) - 1, TokenKind.EOS)]


_PHI3_CONTROL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
_PHI3_STOPS = ("<|end|>", "<|endoftext|>")

FORMATS = (
    *(
        ChatFormat(name, partial(phi3, writes_empty_system=written), _PHI3_CONTROL, _PHI3_STOPS,
                   shown=given_text, roles=_ROLES)
        for name, written in (("phi3", True), ("phi3_5", False))
    ),
    ChatFormat("phi4", phi4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), ("<|im_end|>", "<|endoftext|>"),
               shown=given_text, roles=_ROLES),
    ChatFormat("phi4_mini", phi4_mini, _PHI3_CONTROL, _PHI3_STOPS, shown=given_text, takes_tools=True,
               roles=(*_ROLES, "tool")),
)  # fmt: skip
