"""Mistral's formats by the versions of its tokenizers, with the ids that mistral-common makes.

mistral-common encodes each message alone, so a token never covers the edge of header and content. With a sentencepiece
vocabulary each of them begins with the blank that sentencepiece puts in front of a text; between control tokens that
comes of itself, and in v1, whose `[INST]` is text, it is written.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torchmask.errors import DataError
from torchmask.messages import Message, Piece
from torchmask.tokenizers.formats.base import (
    CONTENT,
    STRUCTURE,
    ChatFormat,
    Tools,
    as_given,
    check_turns,
    ending,
    said,
    token,
)
from torchmask.tokenizers.tool_calls import calls_of, to_json

_CALL_ID = re.compile("[a-zA-Z0-9]{9}")


def mistral_v1(messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
    """`<s> [INST] user [/INST] answer</s>`, the markers as text, the system message in front of the first user's.

    Raises:
        DataError: D07, the roles are not an optional system message, then user and assistant in turn.
    """
    check_turns("mistral_v1", messages)
    first = 1 if messages and messages[0].role == "system" else 0
    pieces = [token("<s>", -1)]
    for i, message in enumerate(messages[first:], first):
        if message.role == "user":
            pieces.append(Piece("[INST] ", STRUCTURE, i))
            pieces += _system(messages[0]) if first and i == first else []
            pieces += [*as_given(message, i), Piece(" [/INST]", STRUCTURE, i)]
        else:
            pieces += [Piece(" ", CONTENT, i, apart=True)] if message.text else []
            pieces += [*as_given(message, i), *ending(message, i, "</s>")]
    return pieces


def mistral(
    messages: Sequence[Message], tools: Tools, add_generation_prompt: bool, *, name: str, is_v7: bool = False
) -> list[Piece]:
    """`<s>[INST]user[/INST]answer</s>` with tools in front of the last user message, calls and their results.

    The system message stands in front of the last user message's text; in v7 in `[SYSTEM_PROMPT]` where it was said.

    Args:
        messages, tools, add_generation_prompt: as in every format.
        name: the format's name.
        is_v7: write v7 instead of v3.

    Raises:
        DataError: D07, roles out of order, a call's id that is not nine letters or digits, calls and text in one
            message (v7 writes both).
    """
    check_turns(name, messages, takes_tools=True)
    first = 1 if messages and messages[0].role == "system" else 0
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    pieces = [token("<s>", -1)]
    if first and is_v7:
        pieces += [token("[SYSTEM_PROMPT]", 0), *as_given(messages[0], 0), token("[/SYSTEM_PROMPT]", 0)]
    waiting: list[str | None] = []  # ids of calls whose results have not come
    for i, message in enumerate(messages[first:], first):
        if message.role == "user":
            if tools and i == last_user:
                pieces += _between("[AVAILABLE_TOOLS]", to_json([_described(tool) for tool in tools]), i)
            pieces.append(token("[INST]", i))
            pieces += _system(messages[0]) if first and not is_v7 and i == last_user else []
            pieces += [*as_given(message, i), token("[/INST]", i)]
        elif message.role == "tool":
            pieces += _result(message, i, waiting.pop(0) if waiting else None, name, is_v7)
        else:
            calls = _calls(message, i, name, is_v7)
            waiting = [call.id for call in calls_of(message)]
            # mistral-common takes blanks off an answer's end
            pieces += said(message, i, message.text.rstrip(" "), 0)
            pieces += [*calls, *ending(message, i, "</s>")]
    return pieces


def _system(message: Message) -> list[Piece]:
    return [*as_given(message, 0), Piece("\n\n", STRUCTURE, 0)] if message.text else []


def _between(first: str, text: str, turn: int) -> list[Piece]:
    return [token(first, turn), Piece(text, STRUCTURE, turn), token(f"[/{first[1:]}", turn)]


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the keys that mistral-common writes, in its order."""
    function = tool.get("function", tool)
    keys = {"name": "", "description": "", "parameters": {}}
    return {"type": "function", "function": {key: function.get(key, empty) for key, empty in keys.items()}}


def _calls(message: Message, turn: int, name: str, with_text: bool) -> list[Piece]:
    if not message.tool_calls:
        return []
    if message.text and not with_text:
        raise DataError(
            "D07",
            f"turn {turn + 1} has tool_calls and text; the chat format {name!r} writes one or the other in a message",
            fix="leave the text out, or use mistral_v7 where the model was made with it",
        )
    written = []
    for function, arguments, id in calls_of(message):
        call = {"name": function, "arguments": arguments}
        if id is not None:
            call["id"] = _checked(id, turn, name)
        written.append(call)
    return [token("[TOOL_CALLS]", turn, CONTENT), Piece(to_json(written), CONTENT, turn)]


def _result(message: Message, turn: int, id: str | None, name: str, is_v7: bool) -> list[Piece]:
    """What a tool said; the call it answers is the one that it names, else the next that waits for a result."""
    id = message.tool_call_id if message.tool_call_id is not None else id
    if id is None:
        raise DataError(
            "D07",
            f"turn {turn + 1} says what a tool answered, but neither it nor a call before it has an id; "
            f"the chat format {name!r} writes one",
            fix="give the call an id, and the tool's message that id as tool_call_id",
        )
    id = _checked(id, turn, name)
    if is_v7:
        return [
            token("[TOOL_RESULTS]", turn), Piece(id, STRUCTURE, turn), token("[TOOL_CONTENT]", turn),
            *as_given(message, turn), token("[/TOOL_RESULTS]", turn),
        ]  # fmt: skip
    try:
        content = json.loads(message.text) if message.text else {}
    except json.JSONDecodeError:
        content = message.text
    return [
        token("[TOOL_RESULTS]", turn), Piece('{"content": ', STRUCTURE, turn), Piece(to_json(content), CONTENT, turn),
        Piece(f', "call_id": {to_json(id)}}}', STRUCTURE, turn), token("[/TOOL_RESULTS]", turn),
    ]  # fmt: skip


def _checked(id: str, turn: int, name: str) -> str:
    if _CALL_ID.fullmatch(id) is None:
        raise DataError(
            "D07",
            f"turn {turn + 1} has the tool call id {id!r}; the chat format {name!r} takes nine letters or digits",
            fix="rename the ids, in the calls and in the tools' messages alike",
        )
    return id


def _shown(message: Message) -> str | None:
    if message.role == "tool":
        return None
    return message.text.rstrip(" ") if message.role == "assistant" else message.text


_V3_CONTROL = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
               "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
_V7_CONTROL = (*_V3_CONTROL, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")

FORMATS = (
    ChatFormat("mistral_v1", mistral_v1, ("<s>", "</s>"), ("</s>",), alone=True),
    *(
        ChatFormat(name, write, control, ("</s>",), shown=_shown, takes_tools=True, alone=True)
        for name, write, control in (
            ("mistral_v3", partial(mistral, name="mistral_v3"), _V3_CONTROL),
            ("mistral_tekken", partial(mistral, name="mistral_tekken"), _V3_CONTROL),
            ("mistral_v7", partial(mistral, name="mistral_v7", is_v7=True), _V7_CONTROL),
        )
    ),
)
