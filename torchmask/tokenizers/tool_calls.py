"""The assistant's calls in the shape in which chat formats write them."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from torchmask.errors import DataError
from torchmask.messages import Message


class ToolCall(NamedTuple):
    """One call.

    Attributes:
        name: the function's.
        arguments: an object.
        id: as given, None where there is none.
    """

    name: str
    arguments: dict[str, Any]
    id: str | None


def calls_of(message: Message) -> list[ToolCall]:
    """The calls that a message makes, with or without OpenAI's `function` around name and arguments.

    What `check_arguments` refuses must be out of them.
    """
    result = []
    for call in message.tool_calls:
        parsed = with_parsed_arguments(call)
        function = parsed.get("function", parsed)
        result.append(ToolCall(function.get("name", ""), function["arguments"], call.get("id")))
    return result


def with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, where they were JSON text of one or nothing at all."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        return call
    parsed = {**function, "arguments": {} if arguments is None else json.loads(arguments)}
    return {**call, "function": parsed} if "function" in call else parsed


def check_arguments(messages: Sequence[Message]) -> None:
    """Refuses calls that would teach a model to write what is no call.

    Raises:
        DataError: D08, arguments that are neither an object nor JSON text of one.
    """
    for i, message in enumerate(messages):
        for k, call in enumerate(message.tool_calls):
            in_call = "function" in call
            arguments = call.get("function", call).get("arguments")
            try:
                value = json.loads(arguments) if isinstance(arguments, str) else arguments
                found = f"JSON of {type(value).__name__}" if isinstance(arguments, str) else type(value).__name__
            except (ValueError, RecursionError) as error:
                value, found = False, f"not valid JSON ({error})"
            if arguments is None or isinstance(value, dict):
                continue
            raise DataError(
                "D08",
                f"messages[{i}].tool_calls[{k}]{'.function' * in_call}.arguments is {found}, expected an object or "
                f"JSON text of one: {str(arguments)[:60]!r}",
                fix="mend the row; a call without arguments has {}",
            )


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON as Hugging Face's templates and mistral-common write it: other scripts as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
