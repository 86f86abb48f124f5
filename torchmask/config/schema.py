"""A recipe's Config class, read from the recipe's source without importing the recipe.

Importing a recipe imports torch. Its Config needs only dataclasses, typing and torchmask.config, so those statements
(imports of light modules, constants, functions, classes) are executed on their own. What fails there is left out, and
if that leaves no Config, the recipe is imported after all.
"""

import ast
import copy
import dataclasses
import importlib.util
import inspect
import io
import sys
import tokenize
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError

_LIGHT_MODULES = (
    *(
        "dataclasses",
        "typing",
        "enum",
        "collections",
        "pathlib",
        "math",
        "__future__",
        "difflib",
        "os",
        "re",
        "functools",
    ),
    *("torchmask.config", "torchmask.errors", "torchmask.constants", "torchmask.lora"),
    *("torchmask.data.pack_options", "torchmask.data.stream_options"),
)


@dataclass(frozen=True)
class Field:
    """One field of a Config: what the file may say, and what the recipe's author says about it.

    Args:
        name: the key.
        required: whether it has no default.
        annotation: as written, for messages.
        meaning: the comment at the field, without the `#`; empty if there is none.
        is_component: declared as `Component`.
        given: what the recipe passes when it builds the component.
        section: the fields below, for a nested dataclass.
        items: the fields of each item, for a list of a dataclass.
        default: of a component: what is built when nothing is said, or None.
    """

    name: str
    required: bool
    annotation: str
    meaning: str = ""
    is_component: bool = False
    given: tuple[str, ...] = ()
    section: dict[str, "Field"] | None = None
    items: dict[str, "Field"] | None = None
    default: dict[str, Any] | None = None


@dataclass(frozen=True)
class Schema:
    """The Config class of a recipe and its fields by name."""

    config_class: type
    fields: dict[str, Field] = field(default_factory=dict)


def read_schema(recipe: Path) -> Schema:
    """The schema of the recipe in a Python file; torch is not imported unless its Config cannot be had otherwise.

    Raises:
        ConfigError: C11 if the file cannot be read or has no `Config` dataclass.
    """
    try:
        source = recipe.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(recipe))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("C11", f"the recipe cannot be read: {error}", where=str(recipe)) from error
    except SyntaxError as error:
        raise ConfigError("C11", f"not valid Python: {error.msg}", where=f"{recipe}:{error.lineno}") from error
    config_class = _execute_light_part(tree, recipe)
    if config_class is None:
        config_class = getattr(load_recipe(recipe), "Config", None)
    if not isinstance(config_class, type) or not dataclasses.is_dataclass(config_class):
        raise ConfigError(
            "C11",
            "a recipe needs a frozen dataclass `Config` and a function `main(cfg)`",
            where=str(recipe),
            fix="copy a built-in one with `torchmask cp finetune my_recipe.py`",
        )
    return schema_of(config_class, tree=tree, source=source)


def schema_of(config_class: type, *, tree: ast.Module, source: str) -> Schema:
    """The schema of a Config class whose source is at hand."""
    return Schema(config_class, _fields(config_class, _Source(tree, source)))


def load_recipe(recipe: Path) -> types.ModuleType:
    """The recipe's module, executed from its file; its folder is importable as for `python recipe.py`."""
    name = f"torchmask_recipe_{recipe.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(recipe):
        return loaded
    spec = importlib.util.spec_from_file_location(name, recipe)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    if str(recipe.parent) not in sys.path:
        sys.path.append(str(recipe.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _execute_light_part(tree: ast.Module, recipe: Path) -> type | None:
    name = f"torchmask_schema_{recipe.stem}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # typing.get_type_hints looks names up there
    for statement in tree.body:
        light = _light(statement)
        if light is None:
            continue
        code = compile(ast.Module(body=[light], type_ignores=[]), str(recipe), "exec")
        try:
            exec(code, module.__dict__)
        except Exception:  # needs something heavy; whoever uses the name will fail the same way
            continue
    config_class = module.__dict__.get("Config")
    if not isinstance(config_class, type) or not dataclasses.is_dataclass(config_class):
        return None
    try:
        for part in _dataclasses_in(config_class):
            typing.get_type_hints(part)
    except Exception:  # an annotation names something heavy
        return None
    return config_class


def _dataclasses_in(config_class: type) -> list[type]:
    found = [config_class]
    for hint in typing.get_type_hints(config_class).values():
        for part in (_section_class(hint), _item_class(hint)):
            found += _dataclasses_in(part) if part else []
    return found


def _light(statement: ast.stmt) -> ast.stmt | None:
    """The statement if running it costs nothing and touches nothing, else None."""
    if isinstance(statement, ast.Import):
        return statement if all(_is_light(alias.name) for alias in statement.names) else None
    if isinstance(statement, ast.ImportFrom):
        return statement if not statement.level and _is_light(statement.module or "") else None
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        calls = any(isinstance(node, ast.Call) for node in ast.walk(statement))
        return None if calls or statement.value is None else statement
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return _without_annotations(statement)
    return None


def _is_light(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in _LIGHT_MODULES)


def _without_annotations(statement: ast.stmt) -> ast.stmt:
    """A copy whose functions have no annotations: they may name torch types, and nothing here reads them."""
    stripped = copy.deepcopy(statement)
    for function in ast.walk(stripped):
        if isinstance(function, ast.FunctionDef):
            function.returns = None
            args = function.args
            for argument in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]:
                if argument is not None:
                    argument.annotation = None
    return stripped


def _section_class(hint: Any) -> type | None:
    """The nested dataclass of a field's type (`Packing` or `Packing | None`), or None."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for member in members:
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def _item_class(hint: Any) -> type | None:
    """The dataclass of a list of them (`list[Source]`), or None."""
    return _section_class(typing.get_args(hint)[0]) if typing.get_origin(hint) is list else None


class _Source:
    """A Python file's classes and comments."""

    def __init__(self, tree: ast.Module, text: str) -> None:
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.comments = _comments(text)

    def of(self, config_class: type) -> "_Source":
        """The file that holds a class: this one, or that of a section which several recipes share."""
        if config_class.__name__ in self.classes:
            return self
        try:
            text = inspect.getsource(sys.modules[config_class.__module__])
        except (KeyError, OSError, TypeError):
            return self
        return _Source(ast.parse(text), text)


def _fields(config_class: type, source: _Source) -> dict[str, Field]:
    source = source.of(config_class)
    node = source.classes.get(config_class.__name__)
    written: dict[str, ast.AnnAssign] = {}
    for statement in node.body if node else []:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            written[statement.target.id] = statement
    hints = typing.get_type_hints(config_class)
    fields = {}
    for entry in dataclasses.fields(config_class):
        if not entry.init:
            continue
        item = written.get(entry.name)  # None for a field of a base class from elsewhere
        annotation = (
            ast.unparse(item.annotation) if item else getattr(hints[entry.name], "__name__", str(hints[entry.name]))
        )
        section, item_class = _section_class(hints[entry.name]), _item_class(hints[entry.name])
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else None
        missing = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        fields[entry.name] = Field(
            name=entry.name,
            required=missing or entry.default == "???",
            annotation=annotation,
            meaning=_meaning(item, source.comments) if item else "",
            is_component="Component" in annotation.replace("|", " ").split() or "given" in entry.metadata,
            given=tuple(entry.metadata.get("given", ())),
            section=_fields(section, source) if section else None,
            items=_fields(item_class, source) if item_class else None,
            default=default if isinstance(default, dict) and "_component_" in default else None,
        )
    return fields


def _comments(source: str) -> dict[int, tuple[bool, str]]:
    """Comments by line: whether the line holds nothing else, and the text without `#`."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (not token.line[: token.start[1]].strip(), token.string.lstrip("# ").strip())
    return comments


def _meaning(item: ast.AnnAssign, comments: dict[int, tuple[bool, str]]) -> str:
    for line in (item.end_lineno or item.lineno, item.lineno):
        if line in comments:
            return comments[line][1]
    above: list[str] = []
    line = item.lineno - 1
    while line in comments and comments[line][0]:
        above.insert(0, comments[line][1])
        line -= 1
    return " ".join(above)
