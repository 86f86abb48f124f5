"""Reasoning that rows hold apart from the answer: a field of the turn, or a part of its content.

It is read from a field `reasoning_content` (DeepSeek, vLLM), `reasoning` (OpenRouter) or `thinking` (gpt-oss), or
from a content part in front of the others (Anthropic, Mistral): `{"type": "thinking", "thinking": ...}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torchmask.data.formats import text_at
from torchmask.data.row_flags import read_flags
from torchmask.data.rows import Row, RowError

FIELDS = ("reasoning_content", "reasoning", "thinking")
TYPES = ("reasoning", "thinking")


def read_reasoning(turn: Mapping[str, Any], text: str, path: str, row: Row, *, is_answer: bool) -> str | None:
    """What a turn says in a field of its own of the thinking before its text; None where it says nothing.

    Args:
        turn: a turn, or a content part.
        text: the turn's text.
        path: the turn's place in the row.
        row: the row.
        is_answer: whether it is the assistant's.

    Raises:
        RowError: D08, it is no text, somebody else thinks, or it is said twice.
    """
    found: dict[str, str] = {}
    for key in FIELDS:
        value = turn.get(key)
        if value is not None and value != "":
            found[key] = text_at(value, f"{path}.{key}", row)
    if not found:
        return None
    first = next(iter(found))
    if not is_answer:
        raise _wrong(f"{path}.{first} is reasoning of somebody who is not the assistant", row)
    if len(set(found.values())) > 1:
        raise _wrong(f"{path} has different reasoning in {' and '.join(found)}", row)
    if text.lstrip().startswith("<think>"):
        raise _wrong(f"{path} has reasoning in {first} and in <think> of its text", row)
    return found[first]


def reasoning_part(part: Mapping[str, Any], path: str, row: Row) -> str | dict[str, Any]:
    """A content part of type `reasoning` or `thinking` as `Message.reasoning`.

    Raises:
        RowError: D08, it has no text; flags of other types.
    """
    key = next((key for key in ("text", part["type"], "content") if key in part), "text")
    value = part.get(key)
    if isinstance(value, Sequence) and not isinstance(value, str):  # Mistral's, a list of text parts
        here = f"{path}.{key}"
        value = "".join(
            text_at(item.get("text") if isinstance(item, Mapping) else item, f"{here}[{i}].text", row)
            for i, item in enumerate(value)
        )
    text = text_at(value, f"{path}.{key}", row)
    flags = read_flags(part, path, row)
    return {**flags, "text": text} if flags else text


def _wrong(message: str, row: Row) -> RowError:
    return RowError("D08", "wrong_type", message, where=row.where, fix="say it once, on the assistant's turn")
