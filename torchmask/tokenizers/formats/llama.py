"""Meta's formats: Llama-2-chat, Llama 3, and Llama 3.1 with tools.

What the template puts between the generation prompt and the end-of-turn token (Llama-2's blanks around an answer) is
content: the model has to produce it.
"""

from collections.abc import Sequence
from functools import lru_cache

from torchmask.errors import DataError
from torchmask.messages import Message, Piece
from torchmask.tokenizers.formats.base import (
    CONTENT,
    STRUCTURE,
    ChatFormat,
    Tools,
    check_turns,
    ending,
    said,
    stripped,
    stripped_text,
    token,
)
from torchmask.tokenizers.tool_calls import calls_of, to_json

_KNOWLEDGE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
"""As the published template has it where no date is given, so that the ids of a data set do not change by the day."""
_TOOLS_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def llama2(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<s>[INST] <<SYS>>..<</SYS>> user [/INST] answer </s>`, the system message inside the first user turn.

    Ends in ` [/INST]` whenever the last message is the user's, which is its generation prompt.

    Raises:
        DataError: D07, the roles are not an optional system message, then user and assistant in turn.
    """
    check_turns("llama2", messages)
    pieces: list[Piece] = []
    system = 1 if messages and messages[0].role == "system" else 0
    for i, message in enumerate(messages[system:], system):
        if message.role == "user":
            pieces += [token("<s>", i), Piece("[INST] ", STRUCTURE, i)]
            if system and i == 1:
                pieces += [Piece("<<SYS>>\n", STRUCTURE, 0), *said(messages[0], 0, messages[0].text, 0)]
                pieces.append(Piece("\n<</SYS>>" + ("\n\n" if message.text.strip() else ""), STRUCTURE, 0))
                pieces += said(message, i, message.text.rstrip(), 0)
            else:
                pieces += stripped(message, i)
            pieces.append(Piece(" [/INST]", STRUCTURE, i))
        else:
            pieces += [Piece(" ", CONTENT, i), *stripped(message, i), Piece(" ", CONTENT, i)]
            pieces += ending(message, i, "</s>")
    return pieces


def llama3(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>` for each message, after one BOS.

    Tool results have the role `ipython`. A message with `ipython` set begins with `<|python_tag|>` and ends in
    `<|eom_id|>`: the turn goes on after the tool has answered.
    """
    pieces = [_BOS]
    for i, message in enumerate(messages):
        pieces += _turn(message, i)
    return [*pieces, *(_header("assistant", -1) if add_generation_prompt else ())]


def llama3_1(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """Llama 3 with a system message that is always there and says the dates, tools, calls and their results.

    Tools stand in the first user message, a call is `{"name": ..., "parameters": ...}` in place of content, a result is
    written as a JSON string (as the published template does with texts).

    Raises:
        DataError: D07, no user message to write the tools into; several calls in one message, or text besides one.
    """
    first = 1 if messages and messages[0].role == "system" else 0
    turn = 0 if first else -1
    opening = ("Environment: ipython\n" if tools else "") + _KNOWLEDGE
    pieces = [_BOS, *_header("system", turn), Piece(opening, STRUCTURE, turn)]
    pieces += [*stripped(messages[0], 0), *ending(messages[0], 0, "<|eot_id|>")] if first else [token("<|eot_id|>", -1)]
    if tools and (len(messages) <= first or messages[first].role != "user"):
        raise DataError(
            "D07",
            "tools are given, which the chat format 'llama3_1' writes into the first user message, and there is none",
            fix="begin the conversation with a user message, or leave the tools out",
        )
    for i, message in enumerate(messages[first:], first):
        if message.tool_calls:
            pieces += [*_header("assistant", i), _call(message, i), *ending(message, i, "<|eot_id|>")]
        elif message.role == "tool":
            pieces += [*_header("ipython", i), Piece(to_json(message.text), CONTENT, i)]
            pieces += ending(message, i, "<|eot_id|>")
        elif tools and i == first:
            described = "".join(to_json(tool, indent=4) + "\n\n" for tool in tools)
            pieces += [*_header("user", i), Piece(_TOOLS_INTRODUCTION + described, STRUCTURE, i)]
            pieces += [*stripped(message, i), *ending(message, i, "<|eot_id|>")]
        else:
            pieces += _turn(message, i)
    return [*pieces, *(_header("assistant", -1) if add_generation_prompt else ())]


def _call(message: Message, turn: int) -> Piece:
    calls = calls_of(message)
    if len(calls) != 1 or message.text.strip():
        raise DataError(
            "D07",
            f"turn {turn + 1} has {len(calls)} tool_calls{' and text' if message.text.strip() else ''}; "
            "the chat format 'llama3_1' writes one call and nothing else in a message",
            fix="put each call, and the text, into a message of its own",
        )
    name, arguments, _ = calls[0]
    return Piece(f'{{"name": "{name}", "parameters": {to_json(arguments)}}}', CONTENT, turn)


def _turn(message: Message, turn: int) -> list[Piece]:
    pieces = list(_header("ipython" if message.role == "tool" else message.role, turn))
    pieces += [token("<|python_tag|>", turn, CONTENT)] if message.ipython else ()
    pieces += stripped(message, turn)
    if message.ipython:
        return [*pieces, *ending(_ENDED, turn, "<|eom_id|>")]
    return [*pieces, *ending(message, turn, "<|eot_id|>")]


_BOS = Piece("<|begin_of_text|>", STRUCTURE, -1, True)
_ENDED = Message("assistant", "")


@lru_cache(maxsize=1024)
def _header(role: str, turn: int) -> tuple[Piece, ...]:
    return (
        Piece("<|start_header_id|>", STRUCTURE, turn, True),
        Piece(role, STRUCTURE, turn),
        Piece("<|end_header_id|>", STRUCTURE, turn, True),
        Piece("\n\n", STRUCTURE, turn),
    )


_LLAMA3_CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA3_STOPS = ("<|eot_id|>", "<|eom_id|>")
_LLAMA3_ROLES = ("system", "user", "assistant", "tool", "ipython")


def _shown_by_llama3_1(message: Message) -> str | None:
    return None if message.role == "tool" else message.text.strip()


FORMATS = (
    ChatFormat("llama2", llama2, ("<s>", "</s>"), ("</s>",), alone=True),
    ChatFormat("llama3", llama3, _LLAMA3_CONTROL, _LLAMA3_STOPS, shown=stripped_text, roles=_LLAMA3_ROLES),
    ChatFormat(
        "llama3_1",
        llama3_1,
        _LLAMA3_CONTROL,
        _LLAMA3_STOPS,
        shown=_shown_by_llama3_1,
        takes_tools=True,
        roles=_LLAMA3_ROLES,
    ),
)
