"""What rows say themselves of what is learned from them, in the words of other frameworks.

| framework | says it with |
|---|---|
| OpenAI | `weight` 0 or 1 on messages |
| Axolotl | `train` and `train_detail` on messages and parts; `segments` of `text` and `label` |
| TRL | `input_ids` with `completion_mask`, `assistant_masks` or `labels`; `prompt` and `completion` (chat_formats.py) |
| torchtune | `masked` on messages |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.constants import IGNORE_INDEX
from torchmask.data.choices import WEIGHT_RANGE, is_number, is_weight
from torchmask.data.formats import ColumnMap, Conversation, is_list_of_objects, text_at, unknown_layout
from torchmask.data.rows import Row, RowError, show_value
from torchmask.messages import Message

FLAGS = ("masked", "train", "weight", "visible")
_LARGEST_ID = 2**31 - 1


def read_flags(item: Mapping[str, Any], path: str, row: Row) -> dict[str, Any]:
    """Those of `masked`, `train`, `weight` and `visible` that a message, part or range has, checked.

    Raises:
        RowError: a flag of another type, or flags that contradict each other (D08).
    """
    found = {key: item[key] for key in FLAGS if item.get(key) is not None}
    for key, value in found.items():
        if key == "weight":
            if not is_number(value):
                raise _wrong(f"{path}.weight is {show_value(value)}, expected a number; 0 is not trained", row)
            if not is_weight(value):
                raise _wrong(f"{path}.weight is {show_value(value)}, expected a weight: {WEIGHT_RANGE}", row)
        elif not isinstance(value, bool):
            raise _wrong(f"{path}.{key} is {show_value(value)}, expected true or false", row)
    says = {key: bool(value) != (key == "masked") for key, value in found.items() if key != "visible"}
    if len(set(says.values())) > 1:
        shown = " and ".join(f"{key}={show_value(found[key]).removeprefix('the number ')}" for key in says)
        raise _wrong(f"{path} says {shown}, which contradict each other", row)
    return found


def read_train_detail(turn: Mapping[str, Any], text: str, path: str, row: Row) -> list[dict[str, Any]]:
    """Axolotl's `train_detail`: character ranges with `begin_offset`, `end_offset` and flags.

    `end_offset` is the last character of a range.

    Raises:
        RowError: not such a list, or a range outside the text (D08).
    """
    details = turn.get("train_detail")
    if not details:
        return []
    if not is_list_of_objects(details):
        raise _wrong(f"{path}.train_detail is {show_value(details)}, expected a list of ranges", row)
    ranges = []
    for i, detail in enumerate(details):
        here = f"{path}.train_detail[{i}]"
        begin, end = detail.get("begin_offset"), detail.get("end_offset")
        if not (isinstance(begin, int) and isinstance(end, int)) or isinstance(begin, bool) or isinstance(end, bool):
            raise _wrong(f"{here} needs whole numbers begin_offset and end_offset", row)
        if not 0 <= begin <= end or begin >= max(len(text), 1) or end > len(text):
            raise _wrong(f"{here} is {begin} to {end}, outside a text of {len(text)} characters", row)
        ranges.append({"begin_offset": begin, "end_offset": end, **read_flags(detail, here, row)})
    return ranges


def segments_format(row: Row, *, column_map: ColumnMap | None = None) -> Conversation:
    """Axolotl's `segments` of `text` and `label`: texts one after the other, those with `label: true` are trained.

    A trained segment is an assistant's message and any other one a user's; `weight`, `train` and `visible` work too.

    Raises:
        RowError: the column is missing (D04) or no list of segments (D08).
    """
    column = (column_map or {}).get("segments", "segments")
    if column not in row.values:
        raise unknown_layout(row, ("segments",), column_map)
    segments = row.values[column]
    if not is_list_of_objects(segments):
        raise _wrong(f"{column} is {show_value(segments)}, expected a list of segments", row)
    messages = []
    for i, segment in enumerate(segments):
        here = f"{column}[{i}]"
        label = segment.get("label")
        if not isinstance(label, bool):
            raise _wrong(f"{here}.label is {show_value(label)}, expected true or false", row)
        text = text_at(segment.get("text"), f"{here}.text", row)
        messages.append(Message("assistant" if label else "user", text, **read_flags(segment, here, row)))
    return Conversation([message for message in messages if message.text])


def split_responses(text: str, response: str, instruction: str | None) -> list[Message]:
    """A text cut at templates, as TRL's completion-only collator means it: what follows `response` is the answer.

    With `instruction` a text has several answers, each of which ends where the next instruction begins; without one
    the answer is what follows the last `response`. Found are characters, not ids, so a tokenizer that merges a
    template with its neighbours changes nothing.

    >>> [(m.role, m.text) for m in split_responses("#Q: a #A: b #Q: c #A: d", "#A:", "#Q:")]
    [('user', '#Q: a #A:'), ('assistant', ' b '), ('user', '#Q: c #A:'), ('assistant', ' d')]
    """
    messages: list[Message] = []
    at = 0
    while True:
        begin = text.find(response, at) if instruction else text.rfind(response)
        if begin < 0:
            messages.append(Message("user", text[at:]))
            break
        begin += len(response)
        end = text.find(instruction, begin) if instruction else -1
        messages.append(Message("user", text[at:begin]))
        messages.append(Message("assistant", text[begin : len(text) if end < 0 else end]))
        if end < 0:
            break
        at = end
    return [message for message in messages if message.text]


@dataclass(frozen=True)
class ReadyRow(Conversation):
    """A row that brought its ids and says itself which are trained.

    Attributes:
        tokens: [n] ids.
        trained: [n] which are targets; None = nothing is said, so all are.
        weights: [n] or None.
    """

    tokens: Sequence[int] = ()
    trained: npt.NDArray[np.bool_] | None = None
    weights: Sequence[float] | None = None


def ready_format(row: Row, *, column_map: ColumnMap | None = None) -> ReadyRow:
    """`input_ids` with `labels`, `completion_mask`, `assistant_masks` and `weights`, as far as the row has them.

    A token is trained where all of them say so; `labels` are the ids themselves or -100, not shifted. Tokens that
    `attention_mask` leaves out are padding and are taken off.

    Raises:
        RowError: no `input_ids` (D04), lists of other types or lengths, labels that are other ids (D08).
    """
    names = {name: (column_map or {}).get(name, name) for name in ("input_ids", "labels", "completion_mask",
             "assistant_masks", "attention_mask", "weights")}  # fmt: skip
    if names["input_ids"] not in row.values:
        raise unknown_layout(row, ("input_ids",), column_map)
    ids = _numbers(row, names["input_ids"], None)
    size = len(ids)
    said = {
        name: _numbers(row, column, size, fractions=name == "weights")
        for name, column in names.items()
        if row.values.get(column) is not None
    }
    kept = said["attention_mask"] != 0 if "attention_mask" in said else np.ones(size, np.bool_)
    trained: npt.NDArray[np.bool_] | None = None
    if "labels" in said:
        labels = said["labels"]
        other = np.flatnonzero((labels != IGNORE_INDEX) & (labels != ids) & kept)
        if len(other):
            at = int(other[0])
            raise _wrong(
                f"{names['labels']}[{at}] is {int(labels[at])} where {names['input_ids']}[{at}] is {int(ids[at])}; "
                f"expected the same id or {IGNORE_INDEX}",
                row,
                fix="labels are not shifted: the label of a token is the token",
            )
        trained = labels != IGNORE_INDEX
    for name in ("completion_mask", "assistant_masks"):
        if name in said:
            trained = said[name] != 0 if trained is None else trained & (said[name] != 0)
    weights = said["weights"][kept].tolist() if "weights" in said else None
    messages = [Message("assistant", "")] if kept.any() else []
    return ReadyRow(
        messages, None, ids[kept].astype(np.int64).tolist(), None if trained is None else trained[kept], weights
    )


def _numbers(row: Row, column: str, size: int | None, *, fractions: bool = False) -> npt.NDArray[Any]:
    values = row.values[column]
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.zeros((0, 0))
    allowed = "iubf" if fractions else "iub" if size is not None else "iu"
    if array.ndim != 1 or (array.size and array.dtype.kind not in allowed):
        raise _wrong(f"{column} is {show_value(values)}, expected a list of numbers", row)
    if size is not None and len(array) != size:
        raise _wrong(f"{column} has {len(array)} entries for {size} ids", row)
    if size is None and array.size and not 0 <= array.min() <= array.max() <= _LARGEST_ID:
        found = int(array.min()) if array.min() < 0 else int(array.max())
        raise _wrong(f"{column} holds {found}, expected ids from 0 to {_LARGEST_ID}", row)
    if fractions:
        bad = next((i for i, value in enumerate(array.tolist()) if not is_weight(value)), None)
        if bad is not None:
            raise _wrong(f"{column}[{bad}] is {array[bad]}, expected a weight: {WEIGHT_RANGE}", row)
    return array


def _wrong(message: str, row: Row, *, fix: str = "mend the row") -> RowError:
    return RowError("D08", "wrong_type", message, where=row.where, fix=fix)
