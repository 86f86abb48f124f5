"""Rows that hold whole conversations -> messages: OpenAI's `messages` and ShareGPT's `conversations`.

What rows say themselves of what is trained (`weight`, `train`, `train_detail`, flags of parts) is kept in the messages.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torchmask.data.formats import (
    ColumnMap,
    Conversation,
    is_list_of_objects,
    text_at,
    unknown_layout,
    with_system_column,
)
from torchmask.data.reasoning import TYPES, read_reasoning, reasoning_part
from torchmask.data.row_flags import read_flags, read_train_detail
from torchmask.data.rows import Row, RowError, show_value
from torchmask.messages import ROLES, Message, said_weight

_OPENAI_ROLES = {role: role for role in ROLES} | {"developer": "system", "function": "tool", "ipython": "tool"}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def openai_format(row: Row, *, column_map: ColumnMap | None = None) -> Conversation:
    """OpenAI's `messages` of `role` and `content`, with `tool_calls`, and `weight` 0 for an answer not to learn.

    `train: false` and torchtune's `masked: true` say the same. `tools` may hold the tools' descriptions, `system` a
    system prompt for rows whose messages begin with none.
    """
    column = (column_map or {}).get("messages", "messages")
    messages = openai_messages(row, column, column_map)
    conversation = check_order(Conversation(messages, tools_of(row, column_map)), row, column)
    return with_system_column(conversation, row, column_map)


def openai_messages(row: Row, column: str, column_map: ColumnMap | None = None) -> list[Message]:
    """The messages of one column, in whatever order they are."""
    turns = _turns(row, column, "messages", column_map)
    return [_openai_message(turn, f"{column}[{i}]", row) for i, turn in enumerate(turns)]


def sharegpt_format(row: Row, *, column_map: ColumnMap | None = None) -> Conversation:
    """ShareGPT's `conversations` of `from` and `value`: system, human, gpt, function_call, observation, tool.

    `tools` and `system` are as in `openai_format`.
    """
    column = (column_map or {}).get("conversations", "conversations")
    turns = _turns(row, column, "conversations", column_map)
    messages = [_sharegpt_message(turn, f"{column}[{i}]", row) for i, turn in enumerate(turns)]
    conversation = check_order(Conversation(messages, tools_of(row, column_map)), row, column)
    return with_system_column(conversation, row, column_map)


def chat_format(row: Row, *, column_map: ColumnMap | None = None) -> Conversation:
    """Whichever of the two a row is: told by the keys of its first turn, whatever its column is called.

    A `prompt` and a `completion` that are lists of messages (TRL's) are a conversation too.
    """
    names = column_map or {}
    if is_prompt_of_messages(row, column_map):
        return prompt_completion_format(row, column_map=column_map)
    candidates = (names.get("messages", "messages"), names.get("conversations", "conversations"))
    column = next((c for c in candidates if c in row.values), None)
    if column is None:
        raise unknown_layout(row, ("messages", "conversations"), column_map)
    turns = row.values[column]
    first = turns[0] if isinstance(turns, list) and turns else {}
    is_sharegpt = isinstance(first, Mapping) and "from" in first and "role" not in first
    rest = {key: value for key, value in names.items() if key in ("tools", "system")}
    if is_sharegpt:
        return sharegpt_format(row, column_map={**rest, "conversations": column})
    return openai_format(row, column_map={**rest, "messages": column})


def prompt_completion_format(row: Row, *, column_map: ColumnMap | None = None) -> Conversation:
    """TRL's `prompt` and `completion` as lists of messages: answers in the completion are trained, nothing else is.

    Raises:
        RowError: columns that are missing (D04) or no lists of messages (D08); roles out of order (D07).
    """
    names = column_map or {}
    columns = [names.get(name, name) for name in ("prompt", "completion")]
    if any(column not in row.values for column in columns):
        raise unknown_layout(row, ("prompt", "completion"), column_map)
    prompt = openai_messages(row, columns[0])
    for message in prompt:
        message.masked, message.train, message.weight = True, None, None
    messages = prompt + openai_messages(row, columns[1])
    return check_order(Conversation(messages, tools_of(row, column_map)), row, columns[1])


def is_prompt_of_messages(row: Row, column_map: ColumnMap | None = None) -> bool:
    """Whether a row is TRL's prompt and completion as messages."""
    names = column_map or {}
    return all(is_list_of_objects(row.values.get(names.get(name, name))) for name in ("prompt", "completion"))


def _turns(row: Row, column: str, name: str, column_map: ColumnMap | None) -> list[Mapping[str, Any]]:
    if column not in row.values:
        raise unknown_layout(row, (name,), column_map)
    turns = row.values[column]
    if not isinstance(turns, list):
        message = f"{column} is {show_value(turns)}, expected a list of turns"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    if not turns:
        message = f"{column} is an empty conversation"
        raise RowError("D06", "empty_conversation", message, where=row.where, fix="remove the row")
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            message = f"{column}[{i}] is {show_value(turn)}, expected an object"
            raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    return turns


def _field(turn: Mapping[str, Any], key: str, path: str, row: Row) -> Any:
    if key not in turn:
        message = f"{path} has no {key!r}; keys found: {', '.join(map(str, turn)) or 'none'}"
        raise RowError("D04", "missing_column", message, where=row.where, fix=f"give the turn a {key!r}")
    return turn[key]


def _role(found: Any, known: Mapping[str, str], path: str, row: Row) -> str:
    if not isinstance(found, str):
        message = f"{path} is {show_value(found)}, expected a role"
        raise RowError("D08", "wrong_type", message, where=row.where, fix=f"choose one of {', '.join(known)}")
    if found not in known:
        message = f"{path} is the unknown role {found!r}"
        raise RowError("D07", "bad_roles", message, where=row.where, fix=f"choose one of {', '.join(known)}")
    return known[found]


def _openai_message(turn: Mapping[str, Any], path: str, row: Row) -> Message:
    role = _role(_field(turn, "role", path, row), _OPENAI_ROLES, f"{path}.role", row)
    calls = _tool_calls(turn.get("tool_calls"), f"{path}.tool_calls", row) if role == "assistant" else []
    content = turn.get("content") if calls else _field(turn, "content", path, row)
    if calls and content is None:
        content = ""  # OpenAI's own form of an answer that only calls a tool
    content, thought = _content(content, f"{path}.content", row, is_answer=role == "assistant")
    message = Message(role, content, tool_calls=calls, **_of_turn(turn, path, row))
    said = read_reasoning(turn, message.text, path, row, is_answer=role == "assistant")
    if said and thought:
        raise RowError("D08", "wrong_type", f"{path} has reasoning in its content and beside it", where=row.where,
                       fix="say it once")  # fmt: skip
    message.reasoning = said or thought
    message.train_detail = read_train_detail(turn, message.text, path, row)
    return message


def _sharegpt_message(turn: Mapping[str, Any], path: str, row: Row) -> Message:
    speaker = _field(turn, "from", path, row)
    role = _role(speaker, _SHAREGPT_ROLES, f"{path}.from", row)
    text = text_at(_field(turn, "value", path, row), f"{path}.value", row)
    thought = read_reasoning(turn, text, path, row, is_answer=role == "assistant")
    if speaker != "function_call":
        detail = read_train_detail(turn, text, path, row)
        return Message(role, text, train_detail=detail, reasoning=thought, **_of_turn(turn, path, row))
    calls = _parse_json(text, f"{path}.value", row)
    calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    calls = _tool_calls(calls, f"{path}.value", row)
    return Message(role, "", tool_calls=calls, reasoning=thought, **_of_turn(turn, path, row))


def _content(
    content: Any, path: str, row: Row, *, is_answer: bool
) -> tuple[str | list[dict[str, Any]], str | dict[str, Any] | None]:
    """A text, or a list of text parts `{"type": "text", "text": ...}` (torchtune writes the text under `content`).

    The first part of an answer may be its reasoning, which is told apart.
    """
    if not isinstance(content, list):
        return text_at(content, path, row), None
    parts: list[dict[str, Any]] = []
    thought: str | dict[str, Any] | None = None
    for i, part in enumerate(content):
        here = f"{path}[{i}]"
        if not isinstance(part, Mapping):
            message = f"{here} is {show_value(part)}, expected a content part"
            raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
        if i == 0 and is_answer and part.get("type") in TYPES:
            thought = reasoning_part(part, here, row)
            continue
        if part.get("type", "text") != "text":
            message = f"{here} is of type {part['type']!r}; only text can be trained on"
            raise RowError("D08", "wrong_type", message, where=row.where, fix="remove the part or the row")
        read_flags(part, here, row)
        key = "text" if "text" in part else "content"
        parts.append({**part, "type": "text", "text": text_at(part.get(key), f"{here}.{key}", row)})
    return parts, thought


def _tool_calls(calls: Any, path: str, row: Row) -> list[dict[str, Any]]:
    """Checked calls in OpenAI's shape; arguments stay as written, text or object."""
    if calls is None:
        return []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            found = show_value(call) if function is None else "a function without a name"
            message = f"{path}[{i}] is {found}, expected a call with a function's name and arguments"
            raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    return [dict(call) for call in (calls if isinstance(calls, list) else [calls])]


def _parse_json(text: str, path: str, row: Row) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{path} is not valid JSON ({error}): {text[:40]!r}"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row") from None


def _of_turn(turn: Mapping[str, Any], path: str, row: Row) -> dict[str, Any]:
    """What a turn says of itself beside its role and text."""
    said = read_flags(turn, path, row)
    own = said_weight(said.get("masked"), said.pop("train", None), said.get("weight"))
    said["masked"] = None if own is None else own == 0
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            said[key] = text_at(turn[key], f"{path}.{key}", row)
    return said


def tools_of(row: Row, column_map: ColumnMap | None) -> list[dict[str, Any]] | None:
    """The row's tools in OpenAI's shape, from a list or its JSON text; bare functions are wrapped."""
    column = (column_map or {}).get("tools", "tools")
    tools = row.values.get(column)
    if isinstance(tools, str):
        tools = _parse_json(tools, column, row) if tools.strip() else None
    if not tools:
        return None
    if not is_list_of_objects(tools):
        message = f"{column} is {show_value(tools)}, expected a list of tools"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def check_order(conversation: Conversation, row: Row, column: str) -> Conversation:
    """The conversation, once its turns are in an order that can be trained on.

    System messages may stand anywhere; several answers in a row are one turn in parts (an answer, then a tool call).
    """
    messages = conversation.messages
    roles = [message.role for message in messages]
    spoken = [(i, role) for i, role in enumerate(roles) if role != "system"]
    order = f"roles seen: {', '.join(roles)}"
    fix = "after system messages comes the user; user and assistant take turns, tools answer the assistant"
    if "assistant" not in roles:
        message = f"{column} has no assistant turn ({order})"
        raise RowError("D06", "no_assistant_turn", message, where=row.where, fix="remove the row")
    if spoken[0][1] != "user":
        message = f"{column}[{spoken[0][0]}]: the {spoken[0][1]} speaks first ({order})"
        raise RowError("D07", "bad_roles", message, where=row.where, fix=fix)
    for (_, before), (i, role) in pairwise(spoken):
        if before == role == "user" or (role == "tool" and before == "user"):
            what = "two user turns in a row" if role == "user" else "a tool answers the user"
            raise RowError("D07", "bad_roles", f"{column}[{i}]: {what} ({order})", where=row.where, fix=fix)
    for i, turn in enumerate(messages):
        if turn.role == "assistant" and not turn.text.strip() and not turn.tool_calls and turn.own_weight != 0:
            message = f"{column}[{i}]: the assistant's answer is empty (turn {i + 1} of {len(messages)})"
            raise RowError("D06", "empty_answer", message, where=row.where, fix="fill it in or remove the row")
    return conversation
