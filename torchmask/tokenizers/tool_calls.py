"""The assistant's calls in the shape in which chat formats write them."""

import json
from typing import Any, NamedTuple

from torchmask.messages import Message


class ToolCall(NamedTuple):
    """One call.

    Attributes:
        name: the function's.
        arguments: an object; the text that was given where it is not JSON of one.
        id: as given, None where there is none.
    """

    name: str
    arguments: Any
    id: str | None


def calls_of(message: Message) -> list[ToolCall]:
    """The calls that a message makes, with or without OpenAI's `function` around name and arguments."""
    result = []
    for call in message.tool_calls:
        function = with_parsed_arguments(call).get("function", call)
        if "function" not in call:
            function = with_parsed_arguments(call)
        result.append(ToolCall(function.get("name", ""), function.get("arguments", {}), call.get("id")))
    return result


def with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, where they were JSON text of one."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except json.JSONDecodeError:
        return call
    if not isinstance(value, dict):
        return call
    parsed = {**function, "arguments": value}
    return {**call, "function": parsed} if "function" in call else parsed


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as Hugging Face's templates and mistral-common write it: other scripts as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
