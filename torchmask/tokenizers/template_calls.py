"""Tool calls in what a chat template writes: each located, so that an answer's end is looked for behind all of them.

A template may write a message in several parts, each with an end of its own, as gpt-oss's does with thinking and the
call that follows it. What a call is written as is the template's affair; that it is there shows by a mark put into it.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from torchmask.errors import DataError
from torchmask.tokenizers.shield import Shield
from torchmask.tokenizers.tool_calls import to_json

_Messages = Sequence[dict[str, Any]]


def ends_of_calls(
    messages: _Messages, render: Callable[[_Messages], str], text: str, shield: Shield, *, where: str
) -> dict[int, int | None]:
    """By message that has calls: a place in `text` behind which its last call goes on or ends; None = not to be found.

    Marks are put into the functions' names and the names of their arguments; for templates that look into either, into
    one of them; for those that write neither, into the calls' ids.

    Args:
        messages: as the template is given them.
        render: what it makes of messages.
        text: what it makes of these.
        shield: of this conversation.
        where: the folder, for messages.

    Raises:
        DataError: D07, the template leaves calls of a message out.
    """
    calls = [(i, k) for i, message in enumerate(messages) for k in range(len(message.get("tool_calls", ())))]
    mark_of = {call: shield.fresh() for call in calls}
    of_mark = {mark: call for call, mark in mark_of.items()}
    any_mark = re.compile("[" + "".join(of_mark) + "]")
    found: dict[tuple[int, int], int] = {}
    marked_once: set[tuple[int, int]] = set()
    for parts in (("name", "arguments"), ("name",), ("arguments",), ("id",)):
        if len(found) == len(calls):
            break
        marked = _marked(messages, mark_of, parts)
        try:
            with_marks = render(marked)
        except DataError:
            continue
        if any_mark.sub("", with_marks) != text:
            continue
        marked_once |= {of_mark[mark] for mark in any_mark.findall(json.dumps(marked, ensure_ascii=False, default=str))}
        for num_before, match in enumerate(any_mark.finditer(with_marks)):
            # Only a call's first mark counts: headers of results repeat the function's name.
            found.setdefault(of_mark[match[0]], match.start() - num_before)
    lost = next((call[0] for call in calls if call not in found and call in marked_once), None)
    if lost is not None:
        places = [found.get(call) for call in calls if call[0] == lost]
        raise DataError(
            "D07",
            f"turn {lost + 1} has {len(places)} tool_calls, of which the chat template writes "
            f"{len(places) - places.count(None)}",
            where=where,
            fix="make each call in a message of its own, or use a chat_format with tools",
        )
    ends: dict[int, int | None] = {}
    for call in calls:
        end, before = found.get(call), ends.get(call[0], 0)
        ends[call[0]] = None if end is None or before is None else max(before, end)
    return ends


def with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls' arguments as JSON text, as some templates expect them."""

    def change(function: dict[str, Any], _: int) -> dict[str, Any]:
        return {**function, "arguments": to_json(function.get("arguments", {}))}

    return _with_functions(message, change)


def without_empty_content(message: dict[str, Any]) -> dict[str, Any]:
    """The message with None for a content that is empty beside calls, as OpenAI's API has it."""
    return {**message, "content": None} if "tool_calls" in message and message["content"] == "" else message


def _marked(messages: _Messages, marks: dict[tuple[int, int], str], parts: Sequence[str]) -> list[dict[str, Any]]:
    """The messages with each call's mark at the end of these parts of it."""
    result = []
    for i, message in enumerate(messages):

        def change(function: dict[str, Any], k: int, turn: int = i) -> dict[str, Any]:
            return _marked_function(function, marks[turn, k], parts)

        marked = _with_functions(message, change)
        if "id" in parts and "tool_calls" in message:
            marked["tool_calls"] = [
                {**call, "id": call["id"] + marks[i, k]} if isinstance(call.get("id"), str) else call
                for k, call in enumerate(marked["tool_calls"])
            ]
        result.append(marked)
    return result


def _marked_function(function: dict[str, Any], mark: str, parts: Sequence[str]) -> dict[str, Any]:
    marked = dict(function)
    if "name" in parts and isinstance(function.get("name"), str):
        marked["name"] += mark
    arguments = function.get("arguments")
    if "arguments" in parts and isinstance(arguments, str):
        marked["arguments"] = arguments + mark
    elif "arguments" in parts and isinstance(arguments, dict):
        marked["arguments"] = {key + mark: value for key, value in arguments.items()}
    return marked


def _with_functions(message: dict[str, Any], change: Callable[[dict[str, Any], int], dict[str, Any]]) -> dict[str, Any]:
    """The message with changed functions in its calls, which have OpenAI's `function` around them or have not."""
    if "tool_calls" not in message:
        return message
    calls = []
    for k, call in enumerate(message["tool_calls"]):
        changed = change(call.get("function", call), k)
        calls.append({**call, "function": changed} if "function" in call else changed)
    return {**message, "tool_calls": calls}
