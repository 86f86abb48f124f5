"""Signatures of components read from their source, so that a wrong argument is found without importing torch.

`import torch` alone takes longer than everything else a configuration check does. A dotpath such as
`torch.optim.AdamW` is followed through `from x import y` in the packages' own files to the class or function, and its
parameters are read from the syntax tree. What cannot be followed (names made at run time) is not guessed: `find`
returns None and the caller imports the module if it may.
"""

import ast
import functools
import importlib.machinery
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

POSITIONAL, KEYWORD_ONLY, VAR_POSITIONAL, VAR_KEYWORD = "positional", "keyword-only", "*", "**"
_MAX_HOPS = 12  # re-exports followed before giving up; real packages need two or three


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, how it is passed, whether it may be left out, and its annotation if it has one."""

    name: str
    kind: str
    has_default: bool
    annotation: ast.expr | None = None


@dataclass(frozen=True)
class Definition:
    """A class or function found in a source file.

    Args:
        module: dotted name of the module that defines it.
        name: its name there (`Class.method` for a method).
        parameters: without `self` and `cls`; None where they cannot be read (a base class out of reach).
    """

    module: str
    name: str
    parameters: tuple[Parameter, ...] | None


@dataclass(frozen=True)
class _Module:
    name: str
    path: Path
    is_package: bool


def module_file(name: str, *, folders: tuple[str, ...] = ()) -> Path | None:
    """The source file of a module, found without importing it or its parents; None if there is none.

    Args:
        name: dotted name.
        folders: searched before `sys.path` for the first part of the name.
    """
    module = _locate(name, folders)
    return module.path if module else None


def find(dotpath: str, *, folders: tuple[str, ...] = ()) -> Definition | None:
    """The definition behind a dotpath, or None if the sources do not say.

    Args:
        dotpath: `package.module.Name`, re-exports included.
        folders: searched before `sys.path` for the first part of the name.
    """
    return _follow(dotpath, folders, 0)


def may_define(module: str, name: str, *, folders: tuple[str, ...] = ()) -> bool:
    """Whether importing `module` could bring `name`: it is bound there, or names are made at run time."""
    located = _locate(module, folders)
    if located is None:
        return False
    for node in ast.walk(_parse(located.path)):
        if isinstance(node, ast.Name) and (node.id in ("globals", "vars", "exec", "setattr") or node.id == name):
            return True
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in ("__getattr__", name):
            return True
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if name in bound or "*" in bound:
                return True
    return False


def imported_module(module: str, name: str, *, folders: tuple[str, ...] = ()) -> str | None:
    """The module that `import ...` binds to `name` in `module`, or None: `os` for (`torch`, `os`)."""
    located = _locate(module, folders)
    for node in _statements(_parse(located.path)) if located else ():
        for alias in node.names if isinstance(node, ast.Import) else ():
            if name == (alias.asname or alias.name.split(".")[0]):
                return alias.name if alias.asname else name
    return None


def public_names(module: str, *, folders: tuple[str, ...] = ()) -> list[str]:
    """Names that a module defines or imports, for suggestions."""
    located = _locate(module, folders)
    if located is None:
        return []
    names = [name for node in _statements(_parse(located.path)) for name in _bound_names(node)]
    if located.is_package:
        names += [entry.stem for entry in located.path.parent.iterdir() if entry.suffix == ".py" or entry.is_dir()]
    return sorted({name for name in names if not name.startswith("_")})


@functools.cache
def _locate(name: str, folders: tuple[str, ...]) -> _Module | None:
    search: list[str] | None = [*folders, *sys.path]
    spec = None
    parts = name.split(".")
    for index in range(len(parts)):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: index + 1]), search)
        if spec is None:
            spec = _editable_spec(parts[0]) if index == 0 else None
        if spec is None:
            return None
        search = list(spec.submodule_search_locations) if spec.submodule_search_locations is not None else []
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return _Module(name, Path(spec.origin), spec.submodule_search_locations is not None)


def _editable_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """A top-level package that a finder of its own provides (editable installs); finding it imports nothing."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if finder is not importlib.machinery.PathFinder and find_spec is not None:
            spec = find_spec(name, None)
            if spec is not None:
                return spec
    return None


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module that run at import, `if` and `try` bodies included, functions and classes not entered."""
    for node in getattr(tree, "body", []):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node)
            for extra in ("orelse", "finalbody"):
                yield from _statements(ast.Module(body=getattr(node, extra, []), type_ignores=[]))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler)


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return []


def _follow(dotpath: str, folders: tuple[str, ...], hops: int) -> Definition | None:
    parts = dotpath.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = _locate(".".join(parts[:cut]), folders)
        if module is not None:
            return _find_in(module, parts[cut:], folders, hops)
    return None


def _find_in(module: _Module, names: list[str], folders: tuple[str, ...], hops: int) -> Definition | None:
    if hops > _MAX_HOPS or len(names) > 2:
        return None
    found = None
    stars: list[str] = []
    for node in _statements(_parse(module.path)):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, module)
            stars += [source] if any(alias.name == "*" for alias in node.names) else []
            for alias in node.names:
                if (alias.asname or alias.name) == names[0] and not found:
                    found = _follow(".".join([source, alias.name, *names[1:]]), folders, hops + 1)
        elif isinstance(node, ast.FunctionDef) and [node.name] == names:
            found = Definition(module.name, node.name, _with_taken_options(node, module, folders, hops))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):  # `new_name = old_name`
            if [ast.unparse(target) for target in node.targets] == [names[0]] and node.value.id != names[0]:
                found = _find_in(module, [node.value.id, *names[1:]], folders, hops + 1)
        elif isinstance(node, ast.ClassDef) and node.name == names[0]:
            found = _class_definition(node, module, names, folders, hops)
    for source in stars if found is None else []:
        found = found or _follow(".".join([source, *names]), folders, hops + 1)
    return found


def _absolute(node: ast.ImportFrom, module: _Module) -> str:
    if not node.level:
        return node.module or ""
    base = module.name.split(".")
    base = base[: len(base) - node.level + (1 if module.is_package else 0)]
    return ".".join([*base, node.module] if node.module else base)


def _class_definition(
    node: ast.ClassDef, module: _Module, names: list[str], folders: tuple[str, ...], hops: int
) -> Definition | None:
    if len(names) == 1:
        return Definition(module.name, node.name, _constructor(node, module, folders, hops))
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == names[1]:
            decorators = [decorator.id for decorator in item.decorator_list if isinstance(decorator, ast.Name)]
            if "classmethod" in decorators or "staticmethod" in decorators:
                parameters = _function_parameters(item, skip_first="classmethod" in decorators)
                return Definition(module.name, f"{node.name}.{item.name}", parameters)
    return None


def _constructor(
    node: ast.ClassDef, module: _Module, folders: tuple[str, ...], hops: int
) -> tuple[Parameter, ...] | None:
    """Parameters of a class: its own `__init__`, a dataclass's fields, or those of its first base that has them."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _function_parameters(item, skip_first=True)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return _dataclass_parameters(node, module, folders, hops)
    bases = [ast.unparse(base) for base in node.bases]
    if not bases or bases == ["object"]:
        return ()
    for base in bases:
        definition = _base(base, module, folders, hops)
        if definition is None or definition.parameters is None:
            return None
        if definition.parameters or base == bases[-1]:
            return definition.parameters
    return None


def _base(name: str, module: _Module, folders: tuple[str, ...], hops: int) -> Definition | None:
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    return _find_in(module, [name], folders, hops + 1) if "." not in name else _follow(name, folders, hops + 1)


def _dataclass_parameters(
    node: ast.ClassDef, module: _Module, folders: tuple[str, ...], hops: int
) -> tuple[Parameter, ...] | None:
    parameters: dict[str, Parameter] = {}
    keyword_only = any("kw_only=True" in ast.unparse(decorator) for decorator in node.decorator_list)
    for base in reversed([ast.unparse(base) for base in node.bases]):
        if base in ("object", "Protocol", "ABC", "abc.ABC") or base.startswith("Generic"):
            continue
        definition = _base(base, module, folders, hops)
        if definition is None or definition.parameters is None:
            return None
        parameters.update({parameter.name: parameter for parameter in definition.parameters})
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        annotation, default = ast.unparse(item.annotation), item.value
        if "ClassVar" in annotation or (default is not None and "init=False" in ast.unparse(default)):
            continue
        has_default = default is not None
        if isinstance(default, ast.Call) and ast.unparse(default.func).split(".")[-1] == "field":
            has_default = any(keyword.arg in ("default", "default_factory") for keyword in default.keywords)
        kind = KEYWORD_ONLY if keyword_only else POSITIONAL
        parameters[item.target.id] = Parameter(item.target.id, kind, has_default, item.annotation)
    return tuple(parameters.values())


def _with_taken_options(
    node: ast.FunctionDef, module: _Module, folders: tuple[str, ...], hops: int
) -> tuple[Parameter, ...] | None:
    """The parameters of a function; with `@takes(Options)` the fields of that dataclass in place of the second one.

    So are the data set builders written (`torchmask.data.builder_options`).
    """
    parameters = _function_parameters(node, skip_first=False)
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).split(".")[-1] == "takes":
            options = _base(ast.unparse(decorator.args[0]), module, folders, hops) if decorator.args else None
            if parameters is None or options is None or options.parameters is None:
                return None
            shared = [replace(parameter, kind=KEYWORD_ONLY) for parameter in options.parameters]
            parameters = (parameters[0], *parameters[2:], *shared)
    return parameters


def _function_parameters(node: ast.FunctionDef, *, skip_first: bool) -> tuple[Parameter, ...] | None:
    if any(ast.unparse(decorator).split(".")[-1].startswith("wraps") for decorator in node.decorator_list):
        return None
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first_default = len(positional) - len(args.defaults)
    parameters = [
        Parameter(arg.arg, POSITIONAL, index >= first_default, arg.annotation) for index, arg in enumerate(positional)
    ]
    parameters = parameters[1:] if skip_first else parameters
    if args.vararg:
        parameters.append(Parameter(args.vararg.arg, VAR_POSITIONAL, True))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        parameters.append(Parameter(arg.arg, KEYWORD_ONLY, default is not None, arg.annotation))
    if args.kwarg:
        parameters.append(Parameter(args.kwarg.arg, VAR_KEYWORD, True))
    return tuple(parameters)
