"""ChatML and the formats on it: Qwen 2.5 and Qwen 3, with tools and thinking."""

from collections.abc import Sequence
from functools import partial

from torchmask.messages import Message, Piece, TokenKind
from torchmask.tokenizers.formats.base import (
    CONTENT,
    STRUCTURE,
    ChatFormat,
    Tools,
    as_given,
    ending,
    given_text,
    said,
    token,
)
from torchmask.tokenizers.tool_calls import calls_of, to_json

_QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_TOOLS_INTRODUCTION = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALLS_INTRODUCTION = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
)


def chatml(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<|im_start|>role\\ncontent<|im_end|>\\n` for each message, whatever its role; content as it is given.

    The published template writes any role, which is ChatML's very point; those on it (Qwen's) do not.
    """
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        pieces += _turn(message, i)
    return [*pieces, *(_header("assistant", -1) if add_generation_prompt else ())]


def qwen2_5(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """ChatML with a system message that is always there, tools in it, calls and their results between markers.

    Results that follow each other share a turn of the user.
    """
    has_system = bool(messages) and messages[0].role == "system"
    turn = 0 if has_system else -1
    pieces = list(_header("system", turn))
    pieces += as_given(messages[0], 0) if has_system else [Piece(_QWEN2_5_SYSTEM, STRUCTURE, -1)]
    if tools:
        pieces += [Piece("\n\n", STRUCTURE, turn), *_described(tools, turn)]
    pieces += _end_of_system(messages, has_system)
    for i, message in enumerate(messages[has_system:], has_system):
        if message.role == "tool":
            pieces += _result(messages, i)
        elif message.tool_calls:
            pieces += [*_header("assistant", i), *as_given(message, i)]
            pieces += [*_calls(message, i, begins_line=not message.text), *ending(message, i, "<|im_end|>", "\n")]
        else:
            pieces += _turn(message, i)
    return [*pieces, *(_header("assistant", -1) if add_generation_prompt else ())]


def qwen3(
    messages: Sequence[Message], tools: Tools, add_generation_prompt: bool, *, thinking: str = "yes"
) -> list[Piece]:
    """ChatML with tools, and with thinking only in answers to the last question, as the published template writes it.

    An answer's thinking is its reasoning, else what stands in front of `</think>` in its text. The last message always
    has a think block, be it an empty one; earlier answers lose theirs.

    Args:
        messages, tools, add_generation_prompt: as in every format.
        thinking: "yes"; "no" = the generation prompt holds an empty think block (`enable_thinking=false`), so it is
            not the model's to write; "never" = no think blocks at all, texts as given (the 2507 Instruct models).
    """
    has_system = bool(messages) and messages[0].role == "system"
    pieces: list[Piece] = []
    if has_system or tools:
        turn = 0 if has_system else -1
        pieces += _header("system", turn)
        pieces += as_given(messages[0], 0) if has_system else []
        if tools:
            pieces += [Piece("\n\n" if has_system else "", STRUCTURE, turn), *_described(tools, turn)]
        pieces += _end_of_system(messages, has_system)
    questions = [i for i, message in enumerate(messages) if message.role == "user"]
    last_question = questions[-1] if questions else len(messages) - 1
    for i, message in enumerate(messages[has_system:], has_system):
        if message.role == "tool":
            pieces += _result(messages, i)
        elif message.role == "assistant":
            if thinking == "never":
                shown, text = as_given(message, i), message.text
            else:
                shown, text = _answer(message, i, i > last_question, i + 1 == len(messages), thinking == "no")
            pieces += [*_header("assistant", i), *shown, *_calls(message, i, begins_line=not text)]
            pieces += ending(message, i, "<|im_end|>", "\n")
        else:
            pieces += _turn(message, i)
    if add_generation_prompt:
        pieces += _header("assistant", -1)
        pieces += _empty_thinking(-1, STRUCTURE) if thinking == "no" else []
    return pieces


def _answer(
    message: Message, turn: int, is_after_question: bool, is_last: bool, prompted: bool
) -> tuple[list[Piece], str]:
    """An answer with or without its thinking, and its text without it."""
    text, thought = message.text, message.reasoning_text
    if not thought and "</think>" in text:
        before, _, text = text.rpartition("</think>")
        thought = before.partition("</think>")[0].rpartition("<think>")[2].strip("\n")
        text = text.lstrip("\n")
    if not is_after_question or not (is_last or thought):
        return said(message, turn, text, 0 if text == message.text else -1), text
    text_shown = text.lstrip("\n")
    if not thought:
        offset = len(message.text) - len(text_shown) if message.text.endswith(text) and text == message.text else -1
        kind = STRUCTURE if prompted else CONTENT
        return [*_empty_thinking(turn, kind), *said(message, turn, text_shown, offset)], text
    if message.reasoning_text:
        return [*_reasoning(message, turn), *said(message, turn, text_shown, len(text) - len(text_shown))], text
    whole = f"<think>\n{thought}\n</think>\n\n{text_shown}"
    return said(message, turn, whole, 0 if whole == message.text else -1), text


def _empty_thinking(turn: int, kind: TokenKind) -> list[Piece]:
    return [token("<think>", turn, kind), Piece("\n\n", kind, turn), token("</think>", turn, kind),
            Piece("\n\n", kind, turn)]  # fmt: skip


def _reasoning(message: Message, turn: int) -> list[Piece]:
    thought = message.reasoning_text
    offset = len(message.text) + len(thought) - len(thought.lstrip("\n"))
    return [token("<think>", turn, CONTENT), Piece("\n", CONTENT, turn),
            *said(message, turn, thought.strip("\n"), offset),
            Piece("\n", CONTENT, turn), token("</think>", turn, CONTENT), Piece("\n\n", CONTENT, turn)]  # fmt: skip


def _header(role: str, turn: int) -> tuple[Piece, ...]:
    return token("<|im_start|>", turn), Piece(f"{role}\n", STRUCTURE, turn)


def _turn(message: Message, turn: int) -> list[Piece]:
    return [*_header(message.role, turn), *as_given(message, turn), *ending(message, turn, "<|im_end|>", "\n")]


def _end_of_system(messages: Sequence[Message], has_system: bool) -> list[Piece]:
    if has_system:
        return ending(messages[0], 0, "<|im_end|>", "\n")
    return [token("<|im_end|>", -1), Piece("\n", STRUCTURE, -1)]


def _described(tools: Sequence[object], turn: int) -> list[Piece]:
    """The tools, and how to call them, as they stand in the system message; all structure."""
    described = "".join("\n" + to_json(tool) for tool in tools)
    how = '\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    first, last = token("<tool_call>", turn), token("</tool_call>", turn)
    return [
        Piece(_TOOLS_INTRODUCTION + described + _CALLS_INTRODUCTION, STRUCTURE, turn), first, last,
        Piece(" XML tags:\n", STRUCTURE, turn), first, Piece(how, STRUCTURE, turn), last,
    ]  # fmt: skip


def _calls(message: Message, turn: int, *, begins_line: bool) -> list[Piece]:
    """The calls of a message, each on its own lines; the first begins one where no text is in front of it."""
    pieces: list[Piece] = []
    for number, (name, arguments, _) in enumerate(calls_of(message)):
        pieces += [
            Piece("" if number == 0 and begins_line else "\n", CONTENT, turn), token("<tool_call>", turn, CONTENT),
            Piece(f'\n{{"name": "{name}", "arguments": {to_json(arguments)}}}\n', CONTENT, turn),
            token("</tool_call>", turn, CONTENT),
        ]  # fmt: skip
    return pieces


def _result(messages: Sequence[Message], turn: int) -> list[Piece]:
    """What a tool said, in a user's turn that opens and closes with the first and the last of several results."""
    message = messages[turn]
    opens = turn == 0 or messages[turn - 1].role != "tool"
    closes = turn + 1 == len(messages) or messages[turn + 1].role != "tool"
    return [
        *([token("<|im_start|>", turn), Piece("user\n", STRUCTURE, turn)] if opens else [Piece("\n", STRUCTURE, turn)]),
        token("<tool_response>", turn), Piece("\n", STRUCTURE, turn), *as_given(message, turn),
        Piece("\n", STRUCTURE, turn), token("</tool_response>", turn),
        *(ending(message, turn, "<|im_end|>", "\n") if closes else ()),
    ]  # fmt: skip


def _shown_by_qwen3(message: Message) -> str | None:
    return None if message.text.startswith("\n") or "</think>" in message.text else message.text


_CONTROL = ("<|im_start|>", "<|im_end|>")
_STOPS = ("<|im_end|>", "<|endoftext|>")
_MARKERS = ("<tool_response>", "</tool_response>")
_QWEN_ROLES = ("system", "user", "assistant", "tool")

FORMATS = (
    ChatFormat("chatml", chatml, _CONTROL, ("<|im_end|>",), shown=given_text),
    ChatFormat("qwen2_5", qwen2_5, _CONTROL, _STOPS, shown=given_text, optional=_MARKERS, takes_tools=True,
               roles=_QWEN_ROLES),
    ChatFormat("qwen3", qwen3, _CONTROL, _STOPS, shown=_shown_by_qwen3, optional=_MARKERS, takes_tools=True,
               takes_reasoning=True, roles=_QWEN_ROLES),
    *(
        ChatFormat(name, partial(qwen3, thinking=thinking), _CONTROL, _STOPS, shown=shown, optional=_MARKERS,
                   takes_tools=True, roles=_QWEN_ROLES)
        for name, thinking, shown in (
            ("qwen3_nothink", "no", _shown_by_qwen3), ("qwen3_instruct", "never", given_text))
    ),
)  # fmt: skip
