"""A configuration file, overrides and a recipe's Config class become one checked, typed, frozen object.

All problems are collected and reported together, each with the file and line (or "command line") it comes from. Types
are OmegaConf's business (a structured config of the recipe's dataclass); this module adds the places, the near names
and the components.
"""

import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from torchmask.config.components import check_component
from torchmask.config.document import COMMAND_LINE, WORDS_FOR_BOOLEANS, Node, as_node, core_scalar, read_yaml
from torchmask.config.files import missing_files
from torchmask.config.interpolation import resolve_ours
from torchmask.config.overrides import apply_overrides
from torchmask.config.schema import Field, Schema, read_schema
from torchmask.config.trust import Trust
from torchmask.errors import ConfigError, ConfigProblems, TorchmaskError

MoreChecks = Callable[[Node, bool], list[TorchmaskError]]
"""`(configuration, is_good)` -> further problems; `is_good`: none was found so far, and references are resolved."""


@dataclass(frozen=True)
class Checked:
    """A configuration without problems.

    Args:
        values: plain dicts, lists and scalars, references resolved.
        instance: the same as an instance of the schema's Config class; None if only the real recipe can make it.
    """

    values: dict[str, Any]
    instance: Any

    def as_config(self, config_class: type) -> Any:
        """The values as an instance of `config_class` (the recipe's own, once it is imported)."""
        if isinstance(self.instance, config_class):
            return self.instance
        return OmegaConf.to_object(_structured(config_class, _escaped(self.values)))


def load_config(
    config: Path,
    *,
    recipe: Path,
    overrides: Sequence[str] = (),
    trust: Trust | None = None,
    check_files: bool = False,
    more_checks: MoreChecks | None = None,
) -> Checked:
    """The checked configuration of one run. Imports neither the recipe nor torch if that can be avoided.

    Args:
        config: the YAML file.
        recipe: the recipe's Python file.
        overrides: as typed on the command line.
        trust: what components may be beyond torchmask's and torch's own.
        check_files: also report files and folders that are named and do not exist.
        more_checks: what layers above this one know of the values.

    Raises:
        ConfigProblems: everything that is wrong, together.
        ConfigError: a file that cannot be read at all.
    """
    schema = read_schema(recipe)
    root = read_yaml(config)
    if not isinstance(root.value, dict):
        raise ConfigError("C10", "a configuration is a mapping of keys to values", where=root.place)
    trust = trust or Trust()
    components = [name for name, field in schema.fields.items() if field.is_component]
    texts = _text_keys(schema.fields)
    problems: list[TorchmaskError] = [*apply_overrides(root, overrides, component_keys=components, text_keys=texts)]
    problems += _check_keys(root, schema.fields, path="", config=config)
    problems += resolve_ours(root, folder=config.absolute().parent)
    problems += _check_components(root, schema.fields, trust, path="")
    problems += _drop_wrong_types(schema, root)
    problems += _drop_wrong_references(schema, root)
    if problems:
        problems += more_checks(root, False) if more_checks else ()
    else:
        checked, problems = _finish(schema, root, trust, check_files=check_files, more_checks=more_checks)
        if not problems:
            return checked
    raise ConfigProblems(sorted(problems, key=_reading_order))


def _finish(
    schema: Schema, root: Node, trust: Trust, *, check_files: bool, more_checks: MoreChecks | None
) -> tuple[Checked, list[TorchmaskError]]:
    """Resolves references, runs the Config's own checks and, if asked, looks for the files."""
    merged = _structured(schema.config_class, root.plain())
    values = typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True, enum_to_str=True))
    resolved = _with_values(root, values)
    problems: list[TorchmaskError] = []
    if any(node.text is not None and "${" in node.text for _, node in root.walk()):
        problems += _check_components(resolved, schema.fields, trust, path="")
    instance = None
    try:
        instance = OmegaConf.to_object(merged)
    except ConfigProblems as error:
        problems += [_placed(problem, root) for problem in error.problems]
    except ConfigError as error:
        problems.append(_placed(error, root))
    except NameError:  # the Config's own check needs a heavy import: the real recipe runs it again
        pass
    if check_files:
        output_dir = values.get("output_dir")
        problems += missing_files(resolved, output_dir=output_dir if output_dir else None)
    problems += more_checks(resolved, not problems) if more_checks else ()
    return Checked(values, instance), problems


def _escaped(value: Any) -> Any:
    """The same values where a resolved `${` is not a reference again."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _structured(config_class: type, values: dict[str, Any]) -> DictConfig:
    """The values as a structured config; a dict that is given replaces the default one.

    OmegaConf would join the two, and a new optimizer would get the arguments of the default one.
    """
    structured = OmegaConf.structured(config_class)
    with read_write(structured):
        for key, value in values.items():
            if isinstance(value, dict) and key in structured and OmegaConf.get_type(structured, key) is dict:
                structured[key] = {}
    merged = OmegaConf.merge(structured, values)
    assert isinstance(merged, DictConfig)
    return merged


def _check_keys(root: Node, fields: dict[str, Field], *, path: str, config: Path) -> list[TorchmaskError]:
    """Unknown and missing keys, sections included; scalars of text fields get their text back."""
    problems: list[TorchmaskError] = []
    for key, node in list(root.value.items()):
        full = f"{path}{key}"
        field = fields.get(key)
        if field is None:
            near = get_close_matches(key, list(fields), n=1)
            fix = f"did you mean '{path}{near[0]}'?" if near else f"known are {', '.join(sorted(fields))}"
            problems.append(ConfigError("C01", f"unknown key '{full}'", where=node.place, fix=fix))
            del root.value[key]
        elif field.section is not None and isinstance(node.value, dict):
            problems += _check_keys(node, field.section, path=f"{full}.", config=config)
        elif field.items is not None and isinstance(node.value, list):
            for i, item in _mappings(node):
                problems += _check_keys(item, field.items, path=f"{full}.{i}.", config=config)
        else:
            _fit_scalar(node, field)
            if field.default and isinstance(node.value, dict) and "_component_" not in node.value:
                # `optimizer.lr=1` alone changes the default component
                node.value = as_node(field.default, node.place).value | node.value
    missing = [field for name, field in fields.items() if field.required and name not in root.value]
    for field in missing:
        message = f"'{path}{field.name}' is required" + (f": {field.meaning}" if field.meaning else "")
        cure = f"{path}{field.name}=..." if not field.is_component else f"{path}{field.name}._component_=..."
        fix = f"add it to the file, or {cure} to the command line"
        problems.append(ConfigError("C05", message, where=str(config) if not path else root.place, fix=fix))
    return problems


def _mappings(node: Node) -> list[tuple[int, Node]]:
    """The items of a list that are mappings, with their places; the types of others are found wrong later."""
    return [(i, item) for i, item in enumerate(node.value) if isinstance(item.value, dict)]


def _text_keys(fields: dict[str, Field], path: str = "") -> list[str]:
    """The keys declared as text and nothing else (or null)."""
    keys = []
    for name, field in fields.items():
        if field.section is not None:
            keys += _text_keys(field.section, f"{path}{name}.")
        elif field.annotation in ("str", "str | None"):
            keys.append(f"{path}{name}")
    return keys


def _fit_scalar(node: Node, field: Field) -> None:
    """Chooses between a scalar's value and its text by the field's declared type."""
    if node.text is None or "${" in node.text:
        return
    members = {member.strip() for member in field.annotation.split("|")}
    if "bool" in members and "str" not in members and isinstance(node.value, str):
        node.value = WORDS_FOR_BOOLEANS.get(node.value.lower(), node.value)
    if field.is_component and isinstance(node.value, str):
        node.value, node.text = {"_component_": Node(node.value, node.place, node.text)}, None
    elif "str" in members and not isinstance(node.value, str):
        others = {"int": int, "float": float, "bool": bool, "None": type(None)}
        if not any(type(node.value) is others[member] for member in members & others.keys()):
            node.value = node.text
    elif "float" in members and isinstance(node.value, str) and isinstance(core_scalar(node.value), float | int):
        node.value = float(node.value)  # quoted


def _check_components(root: Node, fields: dict[str, Field], trust: Trust, *, path: str) -> list[TorchmaskError]:
    problems: list[TorchmaskError] = []
    for key, node in root.value.items():
        field = fields.get(key)
        if field is None:
            continue
        if field.section is not None and isinstance(node.value, dict):
            problems += _check_components(node, field.section, trust, path=f"{path}{key}.")
        elif field.items is not None and isinstance(node.value, list):
            for i, item in _mappings(node):
                problems += _check_components(item, field.items, trust, path=f"{path}{key}.{i}.")
        elif isinstance(node.value, dict) and "_component_" in node.value:
            problems += check_component(node, trust, path=f"{path}{key}", given=field.given)
        elif field.is_component and isinstance(node.value, dict):
            message = f"'{path}{key}' has no `_component_`: {field.meaning or 'it names what to build'}"
            problems.append(ConfigError("C05", message, where=node.place, fix=f"{path}{key}._component_: package.name"))
    return problems


def _drop_wrong_types(schema: Schema, root: Node) -> list[TorchmaskError]:
    """Removes values that OmegaConf does not accept for their field, and says which.

    All are tried at once; only if that fails, one by one, to find every one of them.
    """
    structured = OmegaConf.structured(schema.config_class)
    try:
        OmegaConf.merge(structured, root.plain())
        return []
    except (OmegaConfBaseException, TypeError):  # the latter for a mapping in place of a list
        pass
    problems: list[TorchmaskError] = []
    for path, node, field in _leaves(root, schema.fields):
        value: Any = node.plain()
        for key in reversed(path):
            value = [value] if key.isdecimal() else {key: value}  # of a list's items, this one alone
        try:
            OmegaConf.merge(structured, value)
        except (OmegaConfBaseException, TypeError) as error:
            problems.append(_type_problem(error, path, node, field))
            root.drop(path)
    return problems


def _drop_wrong_references(schema: Schema, root: Node) -> list[TorchmaskError]:
    """Removes values whose `${...}` leads nowhere or to a value of another type, and says which."""
    problems: list[TorchmaskError] = []
    merged = _structured(schema.config_class, root.plain())
    for path, node in list(root.walk()):
        if not isinstance(node.value, str) or "${" not in node.value:
            continue
        key = ".".join(path)
        try:
            OmegaConf.select(merged, key, throw_on_missing=True, throw_on_resolution_failure=True)
        except OmegaConfBaseException as error:
            problem = str(error).splitlines()[0]
            fix = "${a.b} names another key of this configuration, counted from its top"
            problems.append(ConfigError("C03", f"'{key}': {problem}", where=node.place, fix=fix))
            root.drop(path)
    return problems


def _reading_order(problem: TorchmaskError) -> tuple[bool, str, int]:
    """By file and line, the command line last."""
    file, _, rest = (problem.where or "").partition(":")
    line = rest.partition(":")[0].strip()
    return file == COMMAND_LINE, file, int(line) if line.isdecimal() else 0


def _leaves(
    root: Node, fields: dict[str, Field], path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Node, Field]]:
    found = []
    for key, node in root.value.items():
        field = fields.get(key)
        if field is None:
            continue
        if field.section is not None and isinstance(node.value, dict):
            found += _leaves(node, field.section, (*path, key))
        elif field.items is not None and isinstance(node.value, list) and len(_mappings(node)) == len(node.value):
            for i, item in _mappings(node):
                found += _leaves(item, field.items, (*path, key, str(i)))
        else:
            found.append(((*path, key), node, field))
    return found


def _type_problem(error: Exception, path: tuple[str, ...], node: Node, field: Field) -> ConfigError:
    name = ".".join(path)
    shown = node.text if node.text is not None else node.plain()
    if "no viable alternative" in str(error) or "mismatched input" in str(error) or "token recognition" in str(error):
        message = f"'{name}' has a '${{' that is not closed or not a reference: {shown!r}"
        return ConfigError("C03", message, where=node.place, fix="write ${other.key}, or \\${ for the signs themselves")
    meaning = f" ({field.meaning})" if field.meaning else ""
    choices = _choices(field.annotation)
    if choices:
        near = get_close_matches(str(shown), choices, n=1)
        fix = f"choose one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
        return ConfigError("C03", f"'{name}'{meaning} is {shown!r}", where=node.place, fix=fix)
    wanted = "a mapping" if field.section is not None else field.annotation
    wanted = f"a list of {', '.join(field.items)}" if field.items is not None else wanted
    return ConfigError("C03", f"'{name}'{meaning} wants {wanted}, got {shown!r}", where=node.place)


def _choices(annotation: str) -> list[str]:
    """What a `Literal[...]` annotation allows; empty for any other.

    >>> _choices("Literal['a', 'b'] | None")
    ['a', 'b']
    """
    found = re.search(r"Literal\[(.*?)\]", annotation)
    return re.findall(r"['\"](.*?)['\"]", found[1]) if found else []


def _placed(error: TorchmaskError, root: Node) -> TorchmaskError:
    """The same error with file and line, when its `where` is a key of this configuration."""
    node = root.at((error.where or "").split("."))
    if node is None or not error.where:
        return error
    where = f"{node.place}: {error.where}"
    return type(error)(error.id, error.message, where=where, fix=error.fix, excerpt=error.excerpt)


def _with_values(root: Node, values: Any) -> Node:
    """The tree with references resolved, the places kept."""
    if isinstance(root.value, dict) and isinstance(values, dict):
        children = {key: _with_values(node, values.get(key)) for key, node in root.value.items()}
        return Node(children, root.place)
    if isinstance(root.value, list) and isinstance(values, list):
        return Node([_with_values(node, value) for node, value in zip(root.value, values)], root.place)
    return as_node(values, root.place)  # a reference may lead to a whole section
