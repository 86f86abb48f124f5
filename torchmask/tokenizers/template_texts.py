"""Where messages' own texts are in what a chat template writes, found with marks around them in further renderings.

Searching for the texts themselves would find other places, too: a user may quote what was answered.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torchmask.errors import DataError
from torchmask.tokenizers.shield import Shield
from torchmask.tokenizers.turns import Span, Turn, marked_text, ways_to_mark

_Messages = Sequence[dict[str, Any]]
_Render = Callable[[_Messages], str]
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_Place = tuple[int, str]  # a message, and the key of a text in it
_Parts = dict[_Place, tuple[int, int]]  # which characters of a text
_Found = dict[_Place, tuple[list[int], list[int]]]  # where the marks in front of and behind a part are


def find_texts(messages: _Messages, render: _Render, text: str, shield: Shield, *, reasoning_key: str) -> list[Turn]:
    """Turns with the places of content and reasoning in `text`, where the template writes them as they were given.

    Marks stand around the whole text, or inside the blanks at its ends for templates that strip these. Of an answer
    whose beginning is dropped (its thinking) the rest is located, with a span whose `offset` is -1.

    Args:
        messages: as the template is given them.
        render: what it makes of messages.
        text: what it makes of these.
        shield: of this conversation.
        reasoning_key: the key of reasoning in a message, empty where the template reads none.
    """
    turns = [Turn(None) for _ in messages]
    names = ("content", *([reasoning_key] if reasoning_key else ()))
    places = [(i, name) for i, message in enumerate(messages) for name in names if message.get(name) is not None]
    if not places:
        return turns
    texts: list[str] = [messages[i][name] for i, name in places]
    ways = ways_to_mark(texts)
    # Beside calls, a mark where nothing is left of the text without its thinking makes a line of its own.
    calls = [bool(messages[i].get("tool_calls")) for i, _ in places]
    ways += [[(-1, -1) if has else part for part, has in zip(way, calls)] for way in ways] if any(calls) else []
    for parts in ways:
        found = _marked_places(messages, render, text, shield, dict(zip(places, parts, strict=True)))
        if found is not None:
            break
    else:
        return turns  # the template looks into the texts, and the marks are in its way
    if parts != ways[0]:
        better = [dict(zip(places, way, strict=True)) for way in ways[:2]]
        chosen, found = _widened(messages, render, text, shield, dict(zip(places, parts, strict=True)), better, found)
        parts = list(chosen.values())
    tails: _Parts = {}
    for (i, name), content, (begin, end) in zip(places, texts, parts, strict=True):
        starts, ends = found[i, name]
        if len(starts) == len(ends) == 1 and text[starts[0] : ends[0]] == content[begin:end]:
            span = Span(starts[0], ends[0], begin)
            turns[i] = replace(turns[i], content=span) if name == "content" else replace(turns[i], reasoning=span)
        elif name == "content" and len(ends) == 1 and not starts and messages[i]["role"] == "assistant":
            tails[i, name] = _common_end(content[:end], text[: ends[0]])
    for _ in range(2):
        for (i, name), span in _kept_ends(messages, render, text, shield, tails).items():
            turns[i] = replace(turns[i], content=span)
            del tails[i, name]
        # What a template takes apart and writes again may look kept as a whole.
        tails = {(i, name): _behind_tags(messages[i][name], end) for (i, name), (_, end) in tails.items()}
    return turns


def _widened(
    messages: _Messages,
    render: _Render,
    text: str,
    shield: Shield,
    parts: _Parts,
    ways: Sequence[_Parts],
    found: _Found,
) -> tuple[_Parts, _Found]:
    """The parts with those of better ways for the roles of which the template takes them, and where they are.

    One that strips the user's texts may leave a tool's as they are.
    """
    for role in dict.fromkeys(message["role"] for message in messages):
        for way in ways:
            wider = {place: way[place] if messages[place[0]]["role"] == role else parts[place] for place in parts}
            if wider == parts:
                break
            places = _marked_places(messages, render, text, shield, wider)
            if places is not None:
                parts, found = wider, places
                break
    return parts, found


def _kept_ends(messages: _Messages, render: _Render, text: str, shield: Shield, tails: _Parts) -> dict[_Place, Span]:
    """Where these ends of texts are, without the blanks in front of them."""
    found = _marked_places(messages, render, text, shield, tails) if tails else None
    result: dict[_Place, Span] = {}
    for (i, name), (starts, ends) in (found or {}).items():
        begin, end = tails[i, name]
        if len(starts) == len(ends) == 1 and text[starts[0] : ends[0]] == messages[i][name][begin:end]:
            result[i, name] = Span(starts[0], ends[0], -1)
    return result


def _marked_places(messages: _Messages, render: _Render, text: str, shield: Shield, parts: _Parts) -> _Found | None:
    """Where in `text` the beginnings and the ends of these parts are; None where marks change what is written."""
    marks = {place: (shield.fresh(), shield.fresh()) for place in parts}
    any_mark = re.compile("[" + "".join(first + last for first, last in marks.values()) + "]")
    marked = [dict(message) for message in messages]
    for (i, name), part in parts.items():
        marked[i][name] = marked_text(messages[i][name], *part, *marks[i, name])
    try:
        with_marks = render(marked)
    except DataError:
        return None
    if any_mark.sub("", with_marks) != text:
        return None
    positions: dict[str, list[int]] = {mark: [] for pair in marks.values() for mark in pair}
    for num_before, match in enumerate(any_mark.finditer(with_marks)):
        positions[match[0]].append(match.start() - num_before)
    return {place: (positions[first], positions[last]) for place, (first, last) in marks.items()}


def _common_end(content: str, written: str) -> tuple[int, int]:
    """The part of `content` with which both texts end, from its first character that is neither blank nor in a tag.

    Tags end alike: the token in front of an answer and the one behind its thinking have a character in common.
    """
    size = 0
    while size < min(len(content), len(written)) and content[-1 - size] == written[-1 - size]:
        size += 1
    begin = len(content) - size
    begin = next((tag.end() for tag in _TAG.finditer(content) if tag.start() < begin < tag.end()), begin)
    return len(content) - len(content[begin:].lstrip()), len(content)


def _behind_tags(content: str, end: int) -> tuple[int, int]:
    """The part of `content[:end]` behind the last tag in it, from its first character that is not blank."""
    begin = max((tag.end() for tag in _TAG.finditer(content, 0, end)), default=0)
    return end - len(content[begin:end].lstrip()), end
