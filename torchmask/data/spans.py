"""Span rules: which characters of a message's text a rule selects, and what becomes of the tokens that cover them.

A rule looks at the text that the template made of a message, in the one rendering there is, so that a template which
rewrites a text (Qwen's line breaks around thinking) and the calls that it writes for `tool_calls` are seen as the model
sees them. Blanks that the template puts around a text are not looked at. `chars` and `part` speak of the message's own
text instead, and are carried over to the rendering.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torchmask.data.choices import WEIGHT_RANGE, choose, is_number, is_weight
from torchmask.data.json_places import find_values, parse_path
from torchmask.errors import ConfigError
from torchmask.messages import ROLES, Message

Range = tuple[int, int]
KINDS = ("regex", "json_path", "between", "fence", "tag", "chars", "part")
REASONING = "reasoning"
_BELONGS = {"group": ("regex",), "quotes": ("json_path",), "inclusive": ("between", "fence", "tag")}
_LISTS = str | list | tuple


@dataclass(frozen=True)
class SpanRule:
    """Selects characters of messages, and says whether they are trained, at what weight, and whether they are seen.

    Exactly one of `regex`, `json_path`, `between`, `fence`, `tag`, `chars` and `part` is given, and at least one of
    `train`, `weight` and `visible`.

    Args:
        regex: every match; with named groups in the pattern, what these matched instead.
        group: the named group to take, where a pattern has several.
        json_path: the value at a path such as `$.answer` or `$.items[0].name`; the text is JSON, or has JSON in it.
        quotes: whether a JSON string's quotes belong to it.
        between: `[start, end]`: the text between two markers; `end` may be None, the end of the message.
        fence: the inside of code fences of a language, `json`; `any` for all of them.
        tag: elements `<think> ... </think>`, tags included.
        inclusive: whether markers, fence lines or tags belong to the span; None = for `tag` only.
        chars: `[start, end]` characters of the message's own text, counted as Python slices are.
        part: a part of a message's content, by its index or its `name`; `reasoning` = what `Message.reasoning` says.
        train: True or False; `only` = trained, and the rest of the message is not. Rules with `only` that follow each
            other train what any of them selects.
        weight: scales the loss of the tokens; 0 is not trained.
        visible: False = no later token may attend to these; True = they may, whatever an earlier rule said.
        roles: messages that the rule looks at; None = the assistant's, and all where it only hides.
        name: the rule's name in reports and metrics; None = the name of its part, or its kind.

    Raises:
        ConfigError: a value of another type (C03); none or several kinds, nothing to do, options that belong to
            another kind or contradict each other, a pattern or path that cannot be read (C09); an unknown role (C06).
    """

    regex: str | None = None
    group: str | None = None
    json_path: str | None = None
    quotes: bool = False
    between: Sequence[str | None] | None = None
    fence: str | None = None
    tag: str | None = None
    inclusive: bool | None = None
    chars: Sequence[int | None] | None = None
    part: int | str | None = None
    train: bool | Literal["only"] | None = None
    weight: float | None = None
    visible: bool | None = None
    roles: tuple[str, ...] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = f"has {' and '.join(given)}" if given else "selects nothing"
            raise ConfigError("C09", f"a span rule {found}", fix=f"give it exactly one of {', '.join(KINDS)}")
        self._check_types()
        for key in ("roles", "between", "chars"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, (value,) if isinstance(value, str) else tuple(value))
        for role in self.roles or ():
            choose(f"roles of the span rule {self.label!r}", role, ROLES)
        self._check_say()
        self._check_kind(given[0])

    def _check_types(self) -> None:
        """Each field by itself; YAML writes `no` and `0` where false is meant."""
        flag = "true or false"
        wanted: dict[str, tuple[str, bool]] = {
            **{key: ("a text that is not empty", isinstance(getattr(self, key), str) and getattr(self, key) != "")
               for key in ("regex", "group", "json_path", "fence", "tag", "name")},
            **{key: (flag, isinstance(getattr(self, key), bool)) for key in ("quotes", "inclusive", "visible")},
            "train": ("true, false or only", isinstance(self.train, bool) or self.train == "only"),
            "weight": ("a number; 0 is not trained", is_number(self.weight)),
            "part": ("the index of a part or its name", _is_part(self.part)),
            "roles": ("a list of roles that is not empty", bool(self.roles) and isinstance(self.roles, _LISTS)),
            "between": ("[start, end]", isinstance(self.between, _LISTS)),
            "chars": ("[start, end]", isinstance(self.chars, _LISTS)),
        }  # fmt: skip
        for key, (what, is_right) in wanted.items():
            value = getattr(self, key)
            if value is not None and not is_right:
                where = f"a span rule of the kind {self._kind!r}"
                raise ConfigError("C03", f"{where} has {key}={value!r}", fix=f"give {key} {what}")

    def _check_say(self) -> None:
        where = f"the span rule {self.label!r}"
        if self.weight is not None and not is_weight(self.weight):
            fix = f"give a finite number: {WEIGHT_RANGE}"
            raise ConfigError("C09", f"{where} has weight={self.weight!r}", fix=fix)
        if self.train is not None and self.weight is not None and bool(self.train) != bool(self.weight):
            said = str(self.train).lower()
            raise ConfigError("C09", f"{where} has train={said} and weight={self.weight}", fix="leave one out")
        if self.train is None and self.weight is None and self.visible is None:
            raise ConfigError("C09", f"{where} says nothing of what it selects", fix="give it train, weight or visible")

    def _check_kind(self, kind: str) -> None:
        where = f"the span rule {self.label!r}"
        for key, kinds in _BELONGS.items():
            if getattr(self, key) not in (None, False) and kind not in kinds:
                message = f"{where} has {key}={getattr(self, key)!r}, which means nothing for {kind}"
                raise ConfigError("C09", message, fix=f"leave it out; {key} belongs to {' and '.join(kinds)}")
        if self.inclusive is not None and kind not in _BELONGS["inclusive"]:
            fix = f"leave it out; inclusive belongs to {' and '.join(_BELONGS['inclusive'])}"
            raise ConfigError("C09", f"{where} has inclusive=false, which means nothing for {kind}", fix=fix)
        if self.regex is not None:
            try:
                groups = re.compile(self.regex).groupindex
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError("C09", f"{where}: {self.regex!r} is no pattern: {error}", fix="mend it") from None
            if self.group is not None and self.group not in groups:
                fix = f"named groups of the pattern: {', '.join(groups) or 'none'}"
                raise ConfigError("C09", f"{where}: no group {self.group!r} in {self.regex!r}", fix=fix)
        if self.json_path is not None:
            parse_path(self.json_path)
        if self.between is not None:
            self._check_between(where, list(self.between))
        if self.chars is not None:
            self._check_chars(where, list(self.chars))

    def _check_between(self, where: str, markers: list[Any]) -> None:
        fix = "write between: ['<a>', '</a>'], or ['Answer:', null] for what goes on to the end"
        if len(markers) != 2:
            raise ConfigError("C09", f"{where}: between is {markers}", fix="write between: [start, end]")
        if not (isinstance(markers[0], str) and markers[0]):
            raise ConfigError("C09", f"{where}: between needs a start marker, got {markers[0]!r}", fix=fix)
        if markers[1] is not None and not (isinstance(markers[1], str) and markers[1]):
            raise ConfigError("C09", f"{where}: between has the end marker {markers[1]!r}", fix=fix)

    def _check_chars(self, where: str, places: list[Any]) -> None:
        if len(places) != 2:
            raise ConfigError("C09", f"{where}: chars is {places}", fix="write chars: [start, end]")
        if not all(place is None or (isinstance(place, int) and not isinstance(place, bool)) for place in places):
            fix = "give whole numbers, or null for the text's beginning or end"
            raise ConfigError("C03", f"{where}: chars is {places}", fix=fix)
        start, end = places[0] or 0, places[1]
        if end == 0 or (end is not None and (start < 0) == (end < 0) and start >= end):
            fix = "give a start before the end; -1 is the last character, null the end"
            raise ConfigError("C09", f"{where}: chars is {places}, which selects nothing of any text", fix=fix)

    @classmethod
    def of(cls, value: "SpanRule | Mapping[str, Any]") -> "SpanRule":
        """The rule that YAML or a caller means.

        Raises:
            ConfigError: an unknown key (C06), or as for the class.

        >>> SpanRule.of({"tag": "think", "weight": 0.1}).label
        'tag'
        """
        if isinstance(value, SpanRule):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError("C03", f"a span rule is {value!r}", fix="write it as {json_path: $.answer, train: true}")
        known = [field.name for field in fields(cls)]
        for key in value:
            choose("a key of a span rule", key, known)
        return cls(**dict(value))

    @property
    def _kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def label(self) -> str:
        """Its name; else the name of the part that it selects, or its kind."""
        return self.name or (self.part if isinstance(self.part, str) else self._kind)

    @property
    def own_weight(self) -> float | None:
        """What it makes of the tokens' weight; None where it only hides."""
        if self.train is False:
            return 0.0
        if self.weight is not None:
            return float(self.weight)
        return 1.0 if self.train else None

    def looks_at(self, role: str) -> bool:
        """Whether messages of a role are searched."""
        if self.roles is not None:
            return role in self.roles
        return self.own_weight is None or role == "assistant"

    @cached_property
    def _steps(self) -> tuple[str | int | None, ...]:
        return parse_path(self.json_path or "$")

    @cached_property
    def _pattern(self) -> "re.Pattern[str]":
        if self.regex is not None:
            return re.compile(self.regex)
        if self.between is not None:
            start, end = self.between
            rest = f"(?P<end>{re.escape(end)})" if end else r"(?P<end>\Z)"
            return re.compile(f"(?P<begin>{re.escape(str(start))})(?P<inner>.*?){rest}", re.DOTALL)
        if self.tag is not None:
            tag = re.escape(self.tag)
            return re.compile(rf"(?P<begin><{tag}(?:\s[^<>]*)?>)(?P<inner>.*?)(?P<end></{tag}>)", re.DOTALL)
        # A fence as Markdown has it: indented or not, of backticks or tildes, as long at its end as at its beginning;
        # the first word after it is the language.
        language = "" if self.fence == "any" else rf"[ \t]*(?i:{re.escape(self.fence or '')})(?![^\s{{,:;])"
        return re.compile(
            rf"^[ \t]*(?P<begin>(?P<mark>`{{3,}}(?!`)|~{{3,}}(?!~)){language}[^\n`]*\n)(?P<inner>.*?)"
            r"(?P<end>^[ \t]*(?P=mark))",
            re.DOTALL | re.MULTILINE,
        )

    def find(self, text: str) -> list[Range]:
        """Character ranges of `text` that the rule selects, for all kinds but `chars` and `part`; none is empty.

        >>> SpanRule(json_path="$.answer", train=True).find('{"answer": "Paris"}')
        [(12, 17)]
        >>> SpanRule(tag="think", train=False).find("<think>a</think>b")
        [(0, 16)]
        """
        if self.json_path is not None:
            inside = [(s, e) if self.quotes or not is_text else (s + 1, e - 1)
                      for s, e, is_text in find_values(text, self._steps)]  # fmt: skip
            return [(s, e) for s, e in inside if s < e]
        found = self._pattern.finditer(text)
        if self.regex is not None:
            groups: list[str | int] = [self.group] if self.group else [*self._pattern.groupindex] or [0]
            return [match.span(group) for match in found for group in groups if match.start(group) < match.end(group)]
        whole = self.tag is not None if self.inclusive is None else self.inclusive
        first, last = ("begin", "end") if whole else ("inner", "inner")
        return [(m.start(first), m.end(last)) for m in found if m.start(first) < m.end(last)]

    def find_own(self, message: Message) -> list[Range]:
        """Character ranges of the message's own text, for `chars` and `part`."""
        size = len(message.text)
        if self.chars is not None:
            start, stop, _ = slice(*self.chars).indices(size)
            return [(start, stop)] if start < stop else []
        parts = part_ranges(message)
        if isinstance(self.part, str):
            chosen = [place for part, place in parts if self.part in (part.get("name"), part.get("type"))]
        else:
            parts = parts[: len(parts) - bool(message.reasoning_text)]
            at = int(self.part or 0)
            chosen = [parts[at][1]] if -len(parts) <= at < len(parts) else []
        return [(start, end) for start, end in chosen if start < end]


def part_ranges(message: Message) -> list[tuple[Mapping[str, Any], Range]]:
    """The parts of a message and the characters of its own text that each is; a plain text has one part.

    Reasoning is the last, under its name and with characters counted on from the text's (`Message.reasoning_text`).
    """
    ranges: list[tuple[Mapping[str, Any], Range]] = []
    at = 0
    for part in [{"text": message.content}] if isinstance(message.content, str) else message.content:
        ranges.append((part, (at, at + len(part["text"]))))
        at += len(part["text"])
    if message.reasoning_text:
        flags = message.reasoning if isinstance(message.reasoning, Mapping) else {}
        ranges.append(({**flags, "type": REASONING, "name": REASONING}, (at, at + len(message.reasoning_text))))
    return ranges


def speaks_in_part(message: Message) -> bool:
    """Whether a part of the message may have its own say, so that characters have to be looked at."""
    if not isinstance(message.content, str) or not message.visible or message.train_detail:
        return True
    return message.reasoning is not None and not isinstance(message.reasoning, str)


def _is_part(value: Any) -> bool:
    return value != "" if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)


class NamedRule(NamedTuple):
    """A rule and the name it has among all of a policy."""

    name: str
    rule: SpanRule


def name_rules(rules: Sequence[SpanRule], taken: Sequence[str]) -> tuple[NamedRule, ...]:
    """The rules with names that differ: `tag`, `tag#2`, ...

    Raises:
        ConfigError: a rule is named as something else already is (C09).
    """
    seen: dict[str, int] = dict.fromkeys(taken, 1)
    named = []
    for rule in rules:
        label = rule.label
        if rule.name is not None and rule.name in taken:
            fix = "give it another name"
            raise ConfigError("C09", f"a span rule is named {rule.name!r}, which means something else", fix=fix)
        seen[label] = seen.get(label, 0) + 1
        named.append(NamedRule(label if seen[label] == 1 else f"{label}#{seen[label]}", rule))
    return tuple(named)
