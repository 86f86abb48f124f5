"""Rows of a prompt and an answer -> conversations, and what all formats share.

A format is a function of a row. It checks what it reads and names the JSON path of what is wrong, because no later
stage can: a `messages` column that is a string, or a null content, would otherwise be trained on as if it were text.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torchmask.data.rows import Row, RowError, show_value
from torchmask.errors import ConfigError
from torchmask.messages import Message

ColumnMap = Mapping[str, str]

ALPACA_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's prompt for rows with an input (tatsu-lab/stanford_alpaca, train.py, `prompt_input`)."""

ALPACA_PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The same for rows without one (`prompt_no_input`)."""

LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "messages": ("chat_dataset", ("messages",)),
    "ShareGPT": ("chat_dataset", ("conversations",)),
    "Alpaca": ("alpaca_dataset", ("instruction", "output")),
    "instruct": ("instruct_dataset", ("input", "output")),
    "prompt-completion": ("instruct_dataset", ("prompt", "completion")),
    "SQuAD": ("squad_dataset", ("context", "question", "answers")),
    "text": ("text_completion_dataset", ("text",)),
    "segments": ("segments_dataset", ("segments",)),
    "tokens": ("tokenized_dataset", ("input_ids",)),
}
"""Known layouts: the builder for it and the columns it needs."""


@dataclass(frozen=True)
class Conversation:
    """What a format makes of a row.

    Attributes:
        messages: the turns, in order.
        tools: descriptions of the tools the assistant may call, in OpenAI's shape; None = none.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


Format = Callable[[Row], Conversation]


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each `{name}` of `values` put in; other braces, and braces in the values, stay as they are.

    >>> fill('{question} Reply as {"answer": ...}', {"question": "Why {question}?"})
    'Why {question}? Reply as {"answer": ...}'
    """
    return _placeholders(tuple(values)).sub(lambda match: values[match[1]], template)


@cache
def _placeholders(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"\{(" + "|".join(map(re.escape, names)) + r")\}")


def check_template(template: str, names: tuple[str, ...]) -> str:
    """The template, once every `{name}` is known to be in it.

    Raises:
        ConfigError: one is missing (C09).
    """
    missing = [name for name in names if "{" + name + "}" not in template]
    if missing:
        message = f"prompt_template does not contain {{{missing[0]}}}: {template[:80]!r}"
        raise ConfigError("C09", message, fix=f"it needs {', '.join('{' + n + '}' for n in names)}")
    return template


def instruct_format(row: Row, *, column_map: ColumnMap | None = None) -> Conversation:
    """A user's `input` and the assistant's `output`; `prompt` and `completion` where the row has these instead."""
    names = ("input", "output")
    if not column_map and "input" not in row.values and {"prompt", "completion"} <= row.values.keys():
        names = ("prompt", "completion")
    prompt, answer = columns(row, names, column_map)
    return Conversation([Message("user", prompt), _answer(answer, row, names[1], column_map)])


def alpaca_format(row: Row, *, column_map: ColumnMap | None = None, prompt_template: str | None = None) -> Conversation:
    """Alpaca's `instruction`, optional `input` and `output`, in the published prompts.

    LLaMA-Factory's optional `history`, earlier questions and answers in pairs, and `system` come in front; an earlier
    question is an instruction without input.

    Args:
        row: the row.
        column_map: expected name -> name in the source.
        prompt_template: in place of both published prompts; `{instruction}` and `{input}` are put in.

    Raises:
        RowError: a column is missing (D04), not a text, or a history of no pairs (D08); an answer is empty (D06).
    """
    instruction, answer = columns(row, ("instruction", "output"), column_map)
    context = _optional(row, "input", column_map)
    system = _optional(row, "system", column_map)
    messages = [Message("system", system)] if system else []
    for question, reply in _history(row, column_map):
        messages += [Message("user", _alpaca_prompt(question, "", prompt_template)), reply]
    prompt = _alpaca_prompt(instruction, context, prompt_template)
    return Conversation([*messages, Message("user", prompt), _answer(answer, row, "output", column_map)])


def _alpaca_prompt(instruction: str, context: str, template: str | None) -> str:
    template = template or (ALPACA_PROMPT if context else ALPACA_PROMPT_NO_INPUT)
    return fill(template, {"instruction": instruction, "input": context})


def _optional(row: Row, name: str, column_map: ColumnMap | None) -> str:
    """The text of a column that need not be there; "" where it is not."""
    column = (column_map or {}).get(name, name)
    return "" if row.values.get(column) is None else text_at(row.values[column], column, row)


def _history(row: Row, column_map: ColumnMap | None) -> list[tuple[str, Message]]:
    """LLaMA-Factory's earlier questions and answers."""
    column = (column_map or {}).get("history", "history")
    pairs = row.values.get(column)
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list | tuple):
        message = f"{column} is {show_value(pairs)}, expected a list of [question, answer]"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    found = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            message = f"{column}[{i}] is {show_value(pair)}, expected [question, answer]"
            raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
        question, reply = (text_at(text, f"{column}[{i}][{k}]", row) for k, text in enumerate(pair))
        found.append((question, _answer(reply, row, f"{column}[{i}][1]", None)))
    return found


def with_system_column(conversation: Conversation, row: Row, column_map: ColumnMap | None) -> Conversation:
    """The conversation with the row's `system` text in front; unchanged where it begins with a system message."""
    messages = conversation.messages
    system = "" if messages and messages[0].role == "system" else _optional(row, "system", column_map)
    return replace(conversation, messages=[Message("system", system), *messages]) if system else conversation


def with_system_prompt(conversation: Conversation, prompt: str | None) -> Conversation:
    """The conversation with `prompt` as its only system message; unchanged where `prompt` is None."""
    if prompt is None:
        return conversation
    others = [message for message in conversation.messages if message.role != "system"]
    return replace(conversation, messages=[Message("system", prompt), *others])


def columns(row: Row, names: tuple[str, ...], column_map: ColumnMap | None) -> list[str]:
    """The texts of the columns `names`, renamed by `column_map`.

    Raises:
        RowError: a column is missing (D04) or not a text (D08).
    """
    wanted = [(column_map or {}).get(name, name) for name in names]
    if any(column not in row.values for column in wanted):
        raise unknown_layout(row, names, column_map)
    return [text_at(row.values[column], column, row) for column in wanted]


def text_at(value: Any, path: str, row: Row) -> str:
    """The value, once it is known to be a text that can be encoded.

    Raises:
        RowError: it is something else (D08), or holds half of a surrogate pair (D02).
    """
    if not isinstance(value, str):
        message = f"{path} is {show_value(value)}, expected a text"
        raise RowError("D08", "wrong_type", message, where=row.where, fix="mend the row")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        message = f"{path} holds half of a surrogate pair ({value[error.start]!r} at character {error.start})"
        raise RowError("D02", "invalid_utf8", message, where=row.where, fix="mend the escape in the file") from None
    return value


def unknown_layout(row: Row, wanted: tuple[str, ...], column_map: ColumnMap | None) -> RowError:
    """The error for columns that are not there: those found, the layouts known, the nearest one."""
    renamed = [(column_map or {}).get(name, name) for name in wanted]
    missing = [column for column in renamed if column not in row.values] or renamed
    found = ", ".join(row.values) or "none"
    message = f"missing column {' and '.join(map(repr, missing))}; columns found: {found}"
    message += f"; layouts tried: {', '.join(LAYOUTS)}"
    return RowError("D04", "missing_column", message, where=row.where, fix=_nearest_layout(row, wanted))


def _nearest_layout(row: Row, wanted: tuple[str, ...]) -> str:
    have = row.values.keys()
    for layout, (builder, needed) in sorted(LAYOUTS.items(), key=lambda item: -len(item[1][1])):
        if set(needed) <= have:
            return f"the columns fit {layout}: use {builder}"
    under = next((key for key, value in row.values.items() if is_list_of_objects(value)), None)
    if under is not None:
        return f"if the rows are the list under {under!r}, set field: {under}"
    example = ", ".join(f"{name}: YOUR_COLUMN" for name in wanted)
    return f"name your columns: column_map: {{{example}}}"


def is_list_of_objects(value: Any) -> bool:
    """Whether a value could be rows or turns, judged by its first ten."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value[:10])


def _answer(text: str, row: Row, name: str, column_map: ColumnMap | None) -> Message:
    if not text.strip():
        column = (column_map or {}).get(name, name)
        message = f"{column} is empty: there is nothing to learn from the row"
        raise RowError("D06", "empty_answer", message, where=row.where, fix="fill it in or remove the row")
    return Message("assistant", text)
