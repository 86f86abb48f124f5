"""Command-line overrides: `a.b=value`, `~a.b`, and `component=dotpath`, which drops the old component's arguments."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from torchmask.config.document import COMMAND_LINE, Node, compose, core_scalar
from torchmask.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_DOTPATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_FORM = "write key=value, section.key=value or ~key"


def parse_value(text: str) -> Node:
    """The value after the `=`: lists, dicts and quoted text as YAML, everything else one scalar as it stands.

    Not all of it is parsed as YAML on purpose: `prompt=Question: why?` is text, not a mapping.
    """
    if text[:1] in ("[", "{", '"', "'", "!"):
        node = compose(text, source=COMMAND_LINE)
        return Node(node.value, COMMAND_LINE, node.text)
    return Node(core_scalar(text), COMMAND_LINE, text)


def apply_overrides(
    root: Node, overrides: Sequence[str], *, component_keys: Sequence[str] = (), text_keys: Sequence[str] = ()
) -> list[ConfigError]:
    """Changes `root` in place and returns what could not be applied.

    Whole components are replaced first, whatever the order on the command line, so that
    `optimizer.lr=0.1 optimizer=torch.optim.SGD` keeps the learning rate.

    Args:
        root: the configuration.
        overrides: as typed.
        component_keys: top-level keys that hold a component even where the file does not name one.
        text_keys: keys that hold text: what is typed is kept, brackets, quotation marks and all.
    """
    problems: list[ConfigError] = []
    parsed: list[tuple[int, str, Node | None]] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if override.startswith("~") and _KEY.fullmatch(override[1:]):
            parsed.append((1, override[1:], None))
        elif not equals or not _KEY.fullmatch(key):
            problems.append(ConfigError("C04", f"{override!r} is not an override", where=COMMAND_LINE, fix=_FORM))
        else:
            try:
                is_text = key in text_keys and core_scalar(text) is not None
                value = Node(text, COMMAND_LINE, text) if is_text else parse_value(text)
            except ConfigError as error:
                problems.append(error)
                continue
            is_component = key in component_keys or "_component_" in _mapping_at(root, key)
            replaces = is_component and isinstance(value.value, str) and bool(_DOTPATH.fullmatch(value.value))
            if replaces:
                value = Node({"_component_": value}, COMMAND_LINE)
            parsed.append((0 if replaces else 1, key, value))
    for _, key, new in sorted(parsed, key=lambda entry: entry[0]):
        problem = _delete(root, key) if new is None else _set(root, key, new)
        problems += [problem] if problem else []
    return problems


def _mapping_at(root: Node, key: str) -> dict[str, Node]:
    node: Node | None = root
    for part in key.split("."):
        node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
    return node.value if node is not None and isinstance(node.value, dict) else {}


def _set(root: Node, key: str, value: Node) -> ConfigError | None:
    *parents, last = key.split(".")
    node = root
    for part in parents:
        if isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
            node = node.value[int(part)]
            continue
        if not isinstance(node.value, dict):
            node.value, node.text = {}, None  # `packing: null` in the file, `packing.max_seq_len=8` typed
        node = node.value.setdefault(part, Node({}, COMMAND_LINE))
    if isinstance(node.value, list):
        if not last.isdecimal() or int(last) >= len(node.value):
            size = len(node.value)
            return ConfigError("C04", f"{key!r}: the list has {size} items, 0 to {size - 1}", where=COMMAND_LINE)
        node.value[int(last)] = value
        return None
    if not isinstance(node.value, dict):
        node.value, node.text = {}, None
    node.value[last] = value
    return None


def _delete(root: Node, key: str) -> ConfigError | None:
    *parents, last = key.split(".")
    siblings = _mapping_at(root, ".".join(parents)) if parents else root.value
    if last in siblings:
        del siblings[last]
        return None
    near = get_close_matches(last, list(siblings), n=1)
    fix = f"did you mean '~{'.'.join([*parents, near[0]])}'?" if near else None
    return ConfigError("C04", f"'~{key}' removes a key that is not there", where=COMMAND_LINE, fix=fix)
