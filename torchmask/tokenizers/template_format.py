"""Chat templates of a model's own folder, with every turn located.

The template is run on shielded text (see shield.py), so each control token in its output is its own. Where turns are:

- an assistant's turn begins where the prompt that generation would be fed ends: the rendering of the messages before it
  with a generation prompt, which has to be a prefix of the whole rendering;
- other content lies between two marks, put around it for a second rendering that must otherwise equal the first;
- a turn ends at the template's end-of-turn token after its content.

A template for which this does not hold is refused; its masks would be guesses.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from torchmask.errors import DataError
from torchmask.messages import Message
from torchmask.tokenizers.folder import read_json
from torchmask.tokenizers.formats import NATIVE_FORMATS, Tools
from torchmask.tokenizers.pieces import Piece
from torchmask.tokenizers.sandbox import RefusedByTemplate, compile_template
from torchmask.tokenizers.shield import Shield, alternatives
from torchmask.tokenizers.turns import Span, Token, Turn, cut_into_pieces, in_text_order


def read_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name (`default`, `tool_use`, ...); empty where it has none."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return {"default": alone.read_text(encoding="utf-8")}
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, str):
            return {"default": template}
        if isinstance(template, list):
            return {entry["name"]: entry["template"] for entry in template}
    return {}


class TemplateFormat:
    """A folder's own chat template as a function from conversations to pieces.

    Args:
        templates: sources by name; `tool_use`, if there is one, is used when tools are given.
        bos, eos: text of these tokens, empty where there is none.
        control: every control token's text.
        writable: those that an assistant's own text may hold as tokens.
        stops: those known to end a turn.
        where: the folder, for messages.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        bos: str,
        eos: str,
        control: Sequence[str],
        writable: Sequence[str],
        stops: Sequence[str],
        where: str,
    ) -> None:
        self._sources, self._where = dict(templates), where
        self._bos, self._eos = bos, eos
        self._stops = stops
        self._writable = frozenset(writable)
        self._any_control = alternatives(control)
        self._not_writable = alternatives(text for text in control if text not in self._writable)
        self._only_writable = alternatives(writable)
        self._compiled: dict[str, Any] = {}

    def pieces(self, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool) -> list[Piece]:
        """The conversation as the template writes it; turns that are not `Message.trained` need not be located.

        Raises:
            DataError: D07, the template refuses the conversation; D14, a trained turn cannot be located.
        """
        trained = [message.trained for message in messages]
        written = json.dumps(
            [[m.content, m.tool_calls, m.name, m.tool_call_id] for m in messages] + [tools],
            ensure_ascii=False,
            default=str,
        )
        shield = Shield([written, *self._sources.values()])
        plain = [self._as_dict(message, shield) for message in messages]
        shown_tools = shield.hide(list(tools), self._any_control) if tools else None
        text = self._render(plain, shown_tools, add_generation_prompt)
        turns = [Turn(span) for span in self._mark_contents(plain, shown_tools, add_generation_prompt, text, shield)]
        tokens = self._find_tokens(text, turns, messages)
        for i, message in enumerate(messages):
            if message.role == "assistant":
                strict = trained[i] and not add_generation_prompt
                turns[i].begin = self._begin_of_answer(plain, i, shown_tools, text, turns[i], tokens, strict)
            elif (content := turns[i].content) is not None:
                turns[i].begin = content.start
            elif trained[i] and message.text.strip() and not add_generation_prompt:
                raise self._cannot_locate(i, messages, "its text is not in the rendering as it was given")
        must_end = [False] * len(messages) if add_generation_prompt else trained
        self._find_ends(turns, tokens, messages, text, must_end)
        return cut_into_pieces(text, turns, tokens, messages, shield=shield, eos=self._eos)

    @cached_property
    def end_of_turn(self) -> str | None:
        """The control token that the template writes after an answer; None if it writes none or takes no such chat."""
        answer = "\U000f0000"
        try:
            text = self._render(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], None, False
            )
        except DataError:
            return None
        after = text.partition(answer)[2]
        found = self._any_control.search(after) if self._any_control else None
        return found[0] if found else None

    @cached_property
    def _has_generation_prompt(self) -> bool:
        user = [{"role": "user", "content": "a"}]
        try:
            return self._render(user, None, True) != self._render(user, None, False)
        except DataError:
            return True

    def _as_dict(self, message: Message, shield: Shield) -> dict[str, Any]:
        """The message as templates expect it, shielded; calls with their arguments as an object."""
        hidden = self._not_writable if message.role == "assistant" else self._any_control
        result: dict[str, Any] = {"role": message.role, "content": shield.hide(message.text, hidden)}
        if message.tool_calls:
            result["tool_calls"] = [shield.hide(_parsed(call), self._any_control) for call in message.tool_calls]
        for key in ("name", "tool_call_id"):
            if getattr(message, key) is not None:
                result[key] = shield.hide(getattr(message, key), self._any_control)
        return result

    def _render(self, messages: Sequence[dict[str, Any]], tools: Tools, add_generation_prompt: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            name = next(iter(self._sources))
        if name not in self._compiled:
            self._compiled[name] = compile_template(self._sources[name], where=self._where)
        variables = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt,
                     "bos_token": self._bos, "eos_token": self._eos}  # fmt: skip
        try:
            return self._compiled[name](variables)
        except RefusedByTemplate as error:
            raise DataError(
                "D07",
                f"the chat template does not take this conversation: {error} "
                f"(roles: {', '.join(message['role'] for message in messages)})",
                where=self._where,
            ) from None

    def _mark_contents(
        self, plain: Sequence[dict[str, Any]], tools: Tools, add_generation_prompt: bool, text: str, shield: Shield
    ) -> list[Span | None]:
        """Where each message's content is in `text`, found with marks in a second rendering; None where it is not.

        Marks stand around the whole text, or inside the blanks at its ends for templates that strip these.
        """
        if not plain:
            return []
        marks = [(shield.fresh(), shield.fresh()) for _ in plain]
        any_mark = re.compile("[" + "".join(first + last for first, last in marks) + "]")
        with_marks = ""
        parts: list[tuple[int, int]] = []
        for parts in _ways_to_mark([message["content"] for message in plain]):
            marked = [
                {**message, "content": _marked(message["content"], *part, *pair)}
                for message, part, pair in zip(plain, parts, marks, strict=True)
            ]
            try:
                with_marks = self._render(marked, tools, add_generation_prompt)
            except DataError:
                continue
            if any_mark.sub("", with_marks) == text:
                break
        else:
            return [None] * len(plain)  # the template looks into the text, and the marks are in its way
        positions: dict[str, list[int]] = {mark: [] for pair in marks for mark in pair}
        for num_before, found in enumerate(any_mark.finditer(with_marks)):
            positions[found[0]].append(found.start() - num_before)
        spans: list[Span | None] = []
        for message, (begin, end), (first, last) in zip(plain, parts, marks, strict=True):
            starts, ends = positions[first], positions[last]
            once = len(starts) == len(ends) == 1 and text[starts[0] : ends[0]] == message["content"][begin:end]
            spans.append(Span(starts[0], ends[0], begin) if once else None)
        return spans

    def _find_tokens(self, text: str, turns: Sequence[Turn], messages: Sequence[Message]) -> list[Token]:
        """The control tokens of the rendering: the template's own, and those that an assistant may write itself."""
        areas: list[tuple[int, int, Any]] = []
        at = 0
        located = sorted((turn.content, m.role) for turn, m in zip(turns, messages, strict=True) if turn.content)
        for (start, end, _), role in located:
            areas += [
                (at, start, self._any_control),
                (start, end, self._only_writable if role == "assistant" else None),
            ]
            at = max(at, end)
        areas.append((at, len(text), self._any_control))
        return [
            Token(found.start(), found.end(), found[0])
            for start, end, pattern in areas
            if pattern is not None
            for found in pattern.finditer(text, start, end)
        ]

    def _begin_of_answer(
        self,
        plain: Sequence[dict[str, Any]],
        index: int,
        tools: Tools,
        text: str,
        turn: Turn,
        tokens: Sequence[Token],
        strict: bool,
    ) -> int | None:
        """Where the tokens that a model would generate for this turn begin."""
        try:
            prompt = self._render(plain[:index], tools, True)
            cause = "the prompt that generation would be fed is not how the whole conversation begins"
        except DataError as error:
            prompt, cause = None, f"the messages before it cannot be rendered alone ({error.message})"
        if prompt is None or not text.startswith(prompt):
            if strict:
                raise self._cannot_locate(index, plain, cause)
            return turn.content.start if turn.content else None
        if turn.content and not self._has_generation_prompt:
            header = [t for t in tokens if len(prompt) <= t.start < turn.content.start and t.text not in self._writable]
            if header:  # the template knows no generation prompt, but what it wrote is the turn's header all the same
                return turn.content.start
        return len(prompt)

    def _find_ends(
        self,
        turns: Sequence[Turn],
        tokens: Sequence[Token],
        messages: Sequence[Message],
        text: str,
        must_end: Sequence[bool],
    ) -> None:
        """Sets where each located turn ends."""
        stops = {self.end_of_turn, *self._stops}
        ends = [token for token in tokens if token.text in stops]
        limit = len(text)
        for begin, i in reversed(in_text_order(turns)):
            turn, answer = turns[i], messages[i].role == "assistant"
            turn.end = max(turn.content.end if turn.content else 0, begin)
            before = bisect_left(tokens, begin, key=attrgetter("start")) - 1
            if turn.end > limit or (before >= 0 and tokens[before].end > begin):
                raise self._cannot_locate(i, messages, "it overlaps what comes next to it")
            next_end = bisect_left(ends, turn.end, key=attrgetter("start"))
            if next_end < len(ends) and ends[next_end].end <= limit:
                turn.end_token = ends[next_end]
            if answer and turn.end_token is not None:
                turn.end = turn.end_token.start
            elif answer and must_end[i] and (self.end_of_turn is not None or turn.content is None):
                raise self._cannot_locate(i, messages, f"no end-of-turn token ({self.end_of_turn}) follows it")
            limit = begin

    def _cannot_locate(self, index: int, messages: Sequence[Any], cause: str) -> DataError:
        message = messages[index]
        role = message["role"] if isinstance(message, dict) else message.role
        return DataError(
            "D14",
            f"turn {index + 1} of {len(messages)} ({role}) cannot be located in what the chat template writes: {cause}",
            where=self._where,
            fix=f"use a built-in chat_format ({', '.join(NATIVE_FORMATS)}), or leave this turn untrained",
        )


def _ways_to_mark(contents: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Which part of each text to put between marks, in order of preference; an empty part at -1 means no marks."""
    whole = [(0, len(content)) for content in contents]
    stripped = [(len(content) - len(content.lstrip()), len(content.rstrip())) for content in contents]
    cores = [(begin, max(begin, end)) for begin, end in stripped]
    not_empty = [
        (begin, end) if end > begin else (-1, -1) for begin, end in stripped
    ]  # templates may test for empty text
    ways: list[list[tuple[int, int]]] = []
    for way in (whole, cores, not_empty):
        ways += [way] if way not in ways else []
    return ways


def _marked(content: str, begin: int, end: int, first: str, last: str) -> str:
    return content if begin < 0 else content[:begin] + first + content[begin:end] + last + content[end:]


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
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
