"""What callers may get wrong about the messages they give, told by turn before any format looks at them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchmask.errors import DataError
from torchmask.messages import Message


def check_messages(messages: Sequence[Message]) -> None:
    """Refuses what is no conversation in `Message`s.

    Raises:
        DataError: D08, a message, a content, a part, a reasoning or a call of the wrong type.
    """
    if isinstance(messages, Message | str | Mapping):
        raise _wrong("the conversation", messages, "a list of Message", "put the message into a list")
    for i, message in enumerate(messages):
        turn = f"turn {i + 1} of {len(messages)}"
        if not isinstance(message, Message):
            fix = "make a Message of it: Message(role, content); Message(**row) where a dict has no other keys"
            raise _wrong(turn, message, "a Message", fix)
        if not isinstance(message.role, str):
            raise _wrong(f"the role of {turn}", message.role, "a text", "name the role: system, user, assistant, tool")
        if not isinstance(message.content, str):
            _check_parts(message.content, f"{turn} ({message.role})")
        if message.reasoning is not None and not isinstance(message.reasoning, str):
            _check_part(message.reasoning, f"the reasoning of {turn}")
        if message.tool_calls or message.tool_calls != []:
            _check_calls(message.tool_calls, f"{turn} ({message.role})")


def _check_parts(content: Any, whose: str) -> None:
    if not isinstance(content, list | tuple):
        fix = "give the message a text; '' is an empty one, and None is one beside tool_calls"
        raise _wrong(f"the content of {whose}", content, "a text or a list of parts", fix)
    for k, part in enumerate(content):
        _check_part(part, f"part {k + 1} of the content of {whose}")


def _check_part(part: Any, what: str) -> None:
    fix = 'write it as {"type": "text", "text": ...}; only text can be tokenised'
    if not isinstance(part, Mapping):
        raise _wrong(what, part, "an object with a text", fix)
    if not isinstance(part.get("text"), str):
        found = f"has {part['text']!r} as its text"[:60] if "text" in part else f"has no text ({', '.join(part)})"
        raise DataError("D08", f"{what} {found}", fix=fix)


def _check_calls(calls: Any, whose: str) -> None:
    fix = 'write calls as [{"type": "function", "function": {"name": ..., "arguments": {...}}}]; [] is none'
    if not isinstance(calls, list | tuple):
        raise _wrong(f"tool_calls of {whose}", calls, "a list", fix)
    for k, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _wrong(f"call {k + 1} of {whose}", call, "an object with a function's name and arguments", fix)


def _wrong(what: str, found: Any, expected: str, fix: str) -> DataError:
    return DataError("D08", f"{what} is {str(found)[:60]!r} ({type(found).__name__}), expected {expected}", fix=fix)
