"""Where the values of a JSON text are, by character position.

The standard library's decoder says what a text means but not where a value stands in it, and searching for the value's
text would find other places too. This scanner visits a text once and keeps the places of the values on the way to a
path. It takes what `json.loads` takes of standard JSON: no NaN, no comments.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from torchmask.errors import ConfigError

_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>-?\d+|\*)\]|\[(?P<quoted>'[^']*'|\"[^\"]*\")\]")
_BLANK = re.compile(r"[ \t\n\r]*")
_LITERAL = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null")
_TEXT = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_MAX_CANDIDATES = 64
_MAX_DEPTH = 200

Step = str | int | None
"""A key, an index, or None for every item."""


class Place(NamedTuple):
    """Characters `[start, end)` of a value; a string's include its quotes, and `is_text` says that it has them."""

    start: int
    end: int
    is_text: bool


class NotJson(ValueError):
    """The text is no JSON from this position on."""


def parse_path(path: str) -> tuple[Step, ...]:
    """The steps of `$.a.b[0]['c d'][*]`.

    Raises:
        ConfigError: not a path of this kind (C09).

    >>> parse_path("$.a[0]['c d'][*]")
    ('a', 0, 'c d', None)
    """
    steps: list[Step] = []
    at = 1
    if not path.startswith("$"):
        raise ConfigError("C09", f"json_path {path!r} does not begin with $", fix="write it as $.answer or $.items[0]")
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None:
            raise ConfigError("C09", f"json_path {path!r} cannot be read at {path[at:]!r}",
                              fix="write it as $.answer, $.items[0].name, $['a key'] or $.items[*]")  # fmt: skip
        if match["name"] is not None:
            steps.append(match["name"])
        elif match["quoted"] is not None:
            steps.append(match["quoted"][1:-1])
        else:
            steps.append(None if match["index"] == "*" else int(match["index"]))
        at = match.end()
    return tuple(steps)


def find_values(text: str, steps: tuple[Step, ...]) -> list[Place]:
    """Places of the values at a path, in the text if it is JSON, else in the objects and arrays that stand in it.

    Of keys that are written twice the last counts, as for `json.loads`.

    >>> text = 'Here: {"a": [1, {"b": "x"}]}'
    >>> [text[start:end] for start, end, _ in find_values(text, ("a", 1, "b"))]
    ['"x"']
    """
    try:
        start = _blank(text, 0)
        value, end = _value(text, start, 0)
        if _blank(text, end) == len(text):
            return list(_follow(value, steps))
    except NotJson:
        pass
    return [place for value in _embedded(text) for place in _follow(value, steps)]


class _Value(NamedTuple):
    place: Place
    items: "dict[str, _Value] | list[_Value] | None"


def _follow(value: _Value, steps: tuple[Step, ...]) -> Iterator[Place]:
    if not steps:
        yield value.place
        return
    step, rest = steps[0], steps[1:]
    match value.items, step:
        case dict() as items, str() if step in items:
            yield from _follow(items[step], rest)
        case list() as items, int() if -len(items) <= step < len(items):
            yield from _follow(items[step], rest)
        case dict() as items, None:
            for item in items.values():
                yield from _follow(item, rest)
        case list() as items, None:
            for item in items:
                yield from _follow(item, rest)


def _embedded(text: str) -> Iterator[_Value]:
    """The outermost objects and arrays of a text that is not JSON as a whole."""
    at = 0
    for _ in range(_MAX_CANDIDATES):
        match = re.compile(r"[{\[]").search(text, at)
        if match is None:
            return
        try:
            value, at = _value(text, match.start(), 0)
            yield value
        except NotJson:
            at = match.start() + 1


def _blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _value(text: str, at: int, depth: int) -> tuple[_Value, int]:
    if at >= len(text) or depth > _MAX_DEPTH:
        raise NotJson
    first = text[at]
    if first == '"':
        _, end = _string(text, at)
        return _Value(Place(at, end, True), None), end
    if first == "{":
        return _object(text, at, depth)
    if first == "[":
        return _array(text, at, depth)
    literal = _LITERAL.match(text, at)
    if literal is None:
        raise NotJson
    return _Value(Place(at, literal.end(), False), None), literal.end()


def _string(text: str, at: int) -> tuple[str, int]:
    match = _TEXT.match(text, at)
    if match is None:
        raise NotJson
    return json.loads(match[0]), match.end()


def _object(text: str, start: int, depth: int) -> tuple[_Value, int]:
    items: dict[str, _Value] = {}
    at = _blank(text, start + 1)
    if text[at : at + 1] == "}":
        return _Value(Place(start, at + 1, False), items), at + 1
    while True:
        if text[at : at + 1] != '"':
            raise NotJson
        key, at = _string(text, at)
        at = _blank(text, at)
        if text[at : at + 1] != ":":
            raise NotJson
        items[key], at = _value(text, _blank(text, at + 1), depth + 1)
        at = _blank(text, at)
        if text[at : at + 1] == "}":
            return _Value(Place(start, at + 1, False), items), at + 1
        if text[at : at + 1] != ",":
            raise NotJson
        at = _blank(text, at + 1)


def _array(text: str, start: int, depth: int) -> tuple[_Value, int]:
    items: list[_Value] = []
    at = _blank(text, start + 1)
    if text[at : at + 1] == "]":
        return _Value(Place(start, at + 1, False), items), at + 1
    while True:
        item, at = _value(text, at, depth + 1)
        items.append(item)
        at = _blank(text, at)
        if text[at : at + 1] == "]":
            return _Value(Place(start, at + 1, False), items), at + 1
        if text[at : at + 1] != ",":
            raise NotJson
        at = _blank(text, at + 1)
