"""YAML as a tree of nodes that remember where they were written and how.

PyYAML's composer gives the marks; its constructor is not used, because it turns `0123` into 83 and `on` into True
before anybody knows that the field is text. Scalars follow YAML 1.2's core rules here (`true` and `false` are the only
booleans, `2e-5` is a number, `0123` is text), and the text itself is kept beside the value for fields that want text.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from torchmask.errors import ConfigError

COMMAND_LINE = "command line"
MAX_NODES = 100_000  # aliases multiply: nine lines of YAML can spell a billion nodes
WORDS_FOR_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}  # text, except where a boolean is wanted

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_BASED_INTEGER = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_TAG_PREFIX = "tag:yaml.org,2002:"
_CORE_TAGS = {_TAG_PREFIX + name for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_UNTAGGED = "torchmask:plain"
_MERGE = _TAG_PREFIX + "merge"


class _Loader(yaml.SafeLoader):
    """A composer that leaves plain scalars alone: SafeLoader would call `on` a boolean and `2e-5` a text."""

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _UNTAGGED
        return super().resolve(kind, value, implicit)


@dataclass
class Node:
    """One value of a configuration.

    Args:
        value: a scalar, a list of nodes, or a dict of nodes by key.
        place: `file:line` of the key (of the value, in a list), or `command line`.
        text: a scalar as it was written; None for lists and dicts.
    """

    value: Any
    place: str
    text: str | None = None

    def plain(self) -> Any:
        """The same tree as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, path: Sequence[str]) -> "Node | None":
        """The node at a path of keys (and indices of lists), or None."""
        node = self
        for part in path:
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[part]
            elif isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
                node = node.value[int(part)]
            else:
                return None
        return node

    def drop(self, path: Sequence[str]) -> None:
        """Removes the entry at a path, so that one mistake is reported once."""
        parent = self.at(path[:-1])
        if parent is not None and isinstance(parent.value, dict):
            parent.value.pop(path[-1], None)

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], "Node"]]:
        """Every node below this one and itself, with its path."""
        yield path, self
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.walk((*path, key))
        elif isinstance(self.value, list):
            for index, node in enumerate(self.value):
                yield from node.walk((*path, str(index)))


def as_node(value: Any, place: str) -> Node:
    """A plain value as a tree whose every node has the same place."""
    if isinstance(value, dict):
        return Node({key: as_node(item, place) for key, item in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([as_node(item, place) for item in value], place)
    return Node(value, place, str(value))


def core_scalar(text: str) -> Any:
    """The value of an unquoted scalar.

    >>> [core_scalar(text) for text in ("2e-5", "0123", "on", "true", "null", "7")]
    [2e-05, '0123', 'on', True, None, 7]
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if _BASED_INTEGER.fullmatch(text):
        return int(text, 0)
    if text.lower() in _SPECIAL_FLOAT:
        return _SPECIAL_FLOAT[text.lower()]
    # `0123` and `1_000` without a point or an exponent are not floats: the first is a text that looks like a number
    if _FLOAT.fullmatch(text) and any(sign in text for sign in ".eE"):
        return float(text.replace("_", ""))
    return text


def read_yaml(path: Path) -> Node:
    """The tree of a YAML file.

    Raises:
        ConfigError: C10 for syntax, tabs and duplicate keys (with file:line:column), C11 for an unreadable file,
            C14 for a tag that would build Python objects.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("C10", f"not UTF-8 text (byte {error.start})", where=str(path)) from error
    except OSError as error:
        raise ConfigError("C11", f"cannot be read: {error.strerror}", where=str(path)) from error
    return compose(text, source=str(path))


def compose(text: str, *, source: str) -> Node:
    """The tree of a YAML text; `source` is the file's name, or `command line` (then places carry no line)."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, source) from error
    except yaml.YAMLError as error:  # control characters
        raise ConfigError("C10", f"not YAML: {str(error).splitlines()[0]}", where=source) from error
    if root is None:
        return Node({}, _place(source, 1))
    return _Converter(source).convert(root, line=1)


def _place(source: str, line: int) -> str:
    return source if source == COMMAND_LINE else f"{source}:{line}"


def _syntax_error(error: Any, text: str, source: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    problem = " ".join(filter(None, (error.context, error.problem)))
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\\t" in problem or "\t" in line[: len(line) - len(line.lstrip())]:
        problem = "a tab where YAML wants spaces"
    where = source if source == COMMAND_LINE or mark is None else f"{source}:{mark.line + 1}:{mark.column + 1}"
    excerpt = f"{mark.line + 1} | {line.strip()[:80]}" if line else None
    fix = "indent with spaces" if problem.startswith("a tab") else "see the line above for a bracket, quote or colon"
    return ConfigError("C10", f"not valid YAML: {problem}", where=where, excerpt=excerpt, fix=fix)


class _Converter:
    """Turns PyYAML's nodes into ours, once per text."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self.open: list[int] = []  # ids of the collections around the node at hand: an alias to one of them has no end

    def convert(self, node: Any, *, line: int) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise ConfigError("C10", f"more than {MAX_NODES} values (aliases?)", where=self.source)
        self._check_tag(node)
        place = _place(self.source, line)
        if isinstance(node, yaml.ScalarNode):
            is_text = node.tag in (_TAG_PREFIX + "str", _MERGE)
            return Node(node.value if is_text else core_scalar(node.value), place, node.value)
        if id(node) in self.open:
            raise ConfigError("C10", "an alias to a value that contains it", where=self._column(node))
        self.open.append(id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node)
        else:
            value = [self.convert(item, line=item.start_mark.line + 1) for item in node.value]
        self.open.pop()
        return Node(value, place)

    def _mapping(self, node: Any) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE:
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    converted = self.convert(source, line=line).value
                    if not isinstance(converted, dict):
                        raise ConfigError("C10", "`<<` wants a mapping", where=self._column(key_node))
                    merged = converted | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("C10", "a key has to be one word", where=self._column(key_node))
            self._check_tag(key_node)
            if key_node.value in entries:
                raise ConfigError(
                    "C10",
                    f"duplicate key {key_node.value!r}, first written at {entries[key_node.value].place}",
                    where=self._column(key_node),
                    fix="keep one of the two",
                )
            entries[key_node.value] = self.convert(value_node, line=line)
        return merged | entries

    def _check_tag(self, node: Any) -> None:
        if node.tag not in _CORE_TAGS and node.tag not in (_UNTAGGED, _MERGE):
            raise ConfigError(
                "C14",
                f"the tag {node.tag.replace(_TAG_PREFIX, '!!')!r} is refused: a configuration holds plain values only",
                where=self._column(node),
                fix="write the value itself; code is named with `_component_`",
            )

    def _column(self, node: Any) -> str:
        if self.source == COMMAND_LINE:
            return self.source
        return f"{self.source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
