"""Components: a dict with `_component_` (what to call) and the arguments of the call.

The recipe may pass arguments of its own when it builds one (the tokenizer to a dataset, the parameters to an
optimizer). It says so where the field is declared, so that a check can tell a forgotten argument from one that the
recipe brings:

    dataset: Component = component("tokenizer")                    # built as instantiate(cfg.dataset, tokenizer)
    lr_scheduler: Component | None = component("optimizer", "num_steps=", default=None)
"""

import ast
import dataclasses
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from torchmask.config import signatures
from torchmask.config.annotations import fits, plain_kinds
from torchmask.config.document import WORDS_FOR_BOOLEANS, Node
from torchmask.config.signatures import Parameter
from torchmask.config.trust import Trust, check_dotpath, current_trust, import_component
from torchmask.errors import ConfigError

Component = dict[str, Any]
"""A call to be made later: `_component_` names what is called, the other keys are its arguments."""

_NO_DEFAULT = object()
_RESERVED = ("_component_",)


def component(*given: str, default: Any = _NO_DEFAULT) -> Any:
    """A field of a recipe's Config that holds a component, with the arguments that the recipe itself will pass.

    Args:
        given: as in the call: `"tokenizer"` for a positional argument, `"num_steps="` for a keyword.
        default: a component or None; without it the key is required.
    """
    metadata = {"given": given}
    if default is _NO_DEFAULT:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def instantiate(component: Component, *args: Any, **kwargs: Any) -> Any:
    """Calls what `_component_` names with the component's arguments; components among those are built first.

    Args:
        component: dict with `_component_`.
        args: passed before the component's own arguments.
        kwargs: added to the component's own arguments.

    Raises:
        ConfigError: C06, C07 for a name that is unknown or not allowed, C08 for arguments that do not fit.
    """
    return prepare(component, *args, **kwargs)()


def prepare(component: Component, *args: Any, **kwargs: Any) -> partial[Any]:
    """The call that `instantiate` would make, not made yet: its function, `args` and the component's own arguments.

    Raises:
        ConfigError: as `instantiate`.
    """
    dotpath = component.get("_component_")
    if not isinstance(dotpath, str):
        raise ConfigError("C06", f"no `_component_` in {component!r}")
    target = import_component(dotpath, current_trust())
    own = {key: _build(value) for key, value in component.items() if key not in _RESERVED}
    twice = sorted(own.keys() & kwargs.keys())
    if twice:
        raise ConfigError("C08", f"{dotpath}: {', '.join(twice)} is passed by the recipe itself", where=dotpath)
    try:
        inspect.signature(target).bind(*args, **own, **kwargs)
    except TypeError as error:
        raise ConfigError(
            "C08", f"{error}; accepted are {_names(_runtime_parameters(target))}", where=dotpath
        ) from error
    except ValueError:  # a builtin without a signature: the call itself will tell
        pass
    return partial(target, *args, **own, **kwargs)


def _build(value: Any) -> Any:
    if isinstance(value, dict):
        if "_component_" in value:
            return instantiate(value)
        return {key: _build(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_build(item) for item in value]
    return value


def check_component(node: Node, trust: Trust, *, path: str, given: Sequence[str] = ()) -> list[ConfigError]:
    """Everything that is wrong with a component, its nested ones included; text arguments get their text back.

    `node` is changed in one way: where the signature says `str`, a scalar becomes the text that was written.

    Args:
        node: the component.
        trust: what may be named.
        path: its key, for messages.
        given: what the recipe passes, as in `component`.
    """
    problems: list[ConfigError] = []
    for key, child in node.value.items():
        problems += _check_nested(child, trust, path=f"{path}.{key}")
    name = node.value["_component_"]
    if not isinstance(name.value, str):
        return [
            *problems,
            ConfigError("C06", f"`_component_` wants a dotted path, got {name.value!r}", where=name.place),
        ]
    if "${" in name.value:
        return problems
    try:
        definition = check_dotpath(name.value, trust, where=name.place)
        parameters = definition.parameters if definition else None
        if parameters is None:
            parameters = _runtime_parameters(import_component(name.value, trust, where=name.place))
    except ConfigError as error:
        return [*problems, error]
    if parameters is None:
        return problems
    return problems + _check_arguments(node, parameters, name.value, path=path, given=given)


def _check_nested(node: Node, trust: Trust, *, path: str) -> list[ConfigError]:
    if isinstance(node.value, dict):
        if "_component_" in node.value:
            return check_component(node, trust, path=path)
        return [p for key, child in node.value.items() for p in _check_nested(child, trust, path=f"{path}.{key}")]
    if isinstance(node.value, list):
        return [p for i, child in enumerate(node.value) for p in _check_nested(child, trust, path=f"{path}.{i}")]
    return []


def _check_arguments(
    node: Node, parameters: Sequence[Parameter], dotpath: str, *, path: str, given: Sequence[str]
) -> list[ConfigError]:
    problems: list[ConfigError] = []
    positional = [p for p in parameters if p.kind == signatures.POSITIONAL]
    num_given = len([name for name in given if not name.endswith("=")])
    from_recipe = {p.name for p in positional[:num_given]} | {name[:-1] for name in given if name.endswith("=")}
    by_name = {p.name: p for p in parameters if p.kind in (signatures.POSITIONAL, signatures.KEYWORD_ONLY)}
    takes_any = any(p.kind == signatures.VAR_KEYWORD for p in parameters)
    settable = [name for name in by_name if name not in from_recipe]
    place = node.value["_component_"].place
    for key, child in node.value.items():
        if key in _RESERVED:
            continue
        where = f"{child.place}: {path}.{key}"
        if key in from_recipe:
            problems.append(ConfigError("C08", f"the recipe passes {key!r} to {dotpath} itself", where=where))
        elif key in by_name:
            problems += _check_type(child, by_name[key], dotpath, where=where)
        elif not takes_any:
            near = get_close_matches(key, settable, n=1)
            fix = (f"did you mean {near[0]!r}? " if near else "") + f"accepted are {', '.join(settable) or 'none'}"
            problems.append(ConfigError("C08", f"{dotpath} takes no argument {key!r}", where=where, fix=fix))
    missing = [name for name in settable if not by_name[name].has_default and name not in node.value]
    if missing:
        message = f"{dotpath} needs {', '.join(repr(name) for name in missing)}"
        problems.append(ConfigError("C08", message, where=f"{place}: {path}", fix=f"add {path}.{missing[0]}=..."))
    if num_given > len(positional) and not any(p.kind == signatures.VAR_POSITIONAL for p in parameters):
        message = f"the recipe passes {', '.join(given)} to it, {dotpath} takes {len(positional)} positional arguments"
        problems.append(ConfigError("C08", message, where=f"{place}: {path}"))
    unknown = [name[:-1] for name in given if name.endswith("=") and name[:-1] not in by_name]
    if unknown and not takes_any:
        message = f"the recipe passes {', '.join(unknown)} to it, {dotpath} takes {_names(parameters)}"
        problems.append(ConfigError("C08", message, where=f"{place}: {path}"))
    return problems


def _check_type(node: Node, parameter: Parameter, dotpath: str, *, where: str) -> list[ConfigError]:
    kinds = plain_kinds(parameter.annotation) if parameter.annotation is not None else None
    is_reference = isinstance(node.value, str) and "${" in node.value
    if kinds is None or is_reference:
        return []
    if "bool" in kinds and "str" not in kinds and isinstance(node.value, str):
        node.value = WORDS_FOR_BOOLEANS.get(node.value.lower(), node.value)
    if "str" in kinds and node.text is not None and not fits(node.value, kinds - {"str"}):
        node.value = node.text  # `0123`, `on` and `1e3` stay what was written
    if fits(node.value, kinds):
        return []
    assert parameter.annotation is not None
    wanted = ast.unparse(parameter.annotation)
    shown = node.text if node.text is not None else node.plain()
    return [ConfigError("C03", f"{dotpath} wants {wanted} for {parameter.name!r}, got {shown!r}", where=where)]


def _runtime_parameters(target: Any) -> tuple[Parameter, ...] | None:
    """The same from a real object, for names that only exist at run time."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    kinds: dict[Any, str] = {
        inspect.Parameter.KEYWORD_ONLY: signatures.KEYWORD_ONLY,
        inspect.Parameter.VAR_POSITIONAL: signatures.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD: signatures.VAR_KEYWORD,
    }
    return tuple(
        Parameter(p.name, kinds.get(p.kind, signatures.POSITIONAL), p.default is not p.empty)
        for p in signature.parameters.values()
    )


def _names(parameters: Sequence[Parameter] | None) -> str:
    return ", ".join(p.name for p in parameters or ()) or "no arguments"
