"""What an annotation in a component's source says about the plain values of a configuration.

Only what is certain is used: an annotation with a name that is not known here is not checked at all.
"""

import ast
from collections.abc import Sequence
from typing import Any

_KINDS = {
    "int": {"int"},
    "float": {"float", "int"},
    "bool": {"bool"},
    "str": {"str"},
    "None": {"None"},
    "Path": {"str"},
    "PathLike": {"str"},
    "list": {"list"},
    "List": {"list"},
    "tuple": {"list"},
    "Tuple": {"list"},
    "Sequence": {"list"},
    "dict": {"dict"},
    "Dict": {"dict"},
    "Mapping": {"dict"},
    "Tensor": set[str](),
}


def plain_kinds(annotation: ast.expr) -> set[str] | None:
    """The kinds of plain values that an annotation accepts, or None if it says something that is not known here."""
    if isinstance(annotation, ast.Constant):
        if annotation.value is None:
            return {"None"}
        if isinstance(annotation.value, str):
            try:
                return plain_kinds(ast.parse(annotation.value, mode="eval").body)
            except SyntaxError:
                return None
        return None
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _union([annotation.left, annotation.right])
    if isinstance(annotation, ast.Name | ast.Attribute):
        return _KINDS.get(ast.unparse(annotation).split(".")[-1])
    if not isinstance(annotation, ast.Subscript):
        return None
    outer = ast.unparse(annotation.value).split(".")[-1]
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if outer == "Union":
        return _union(inner)
    if outer == "Optional":
        kinds = plain_kinds(inner[0])
        return kinds | {"None"} if kinds is not None else None
    if outer == "Literal":
        return {"=" + str(item.value) for item in inner if isinstance(item, ast.Constant)}
    return _KINDS.get(outer)


def _union(members: Sequence[ast.expr]) -> set[str] | None:
    kinds = [plain_kinds(member) for member in members]
    return set().union(*[kind for kind in kinds if kind is not None]) if None not in kinds else None


def fits(value: Any, kinds: set[str]) -> bool:
    """Whether a plain value is one of the kinds.

    >>> fits(3, {"float", "int"}), fits("a", {"=a", "=b"}), fits(True, {"int"})
    (True, True, False)
    """
    if isinstance(value, str | int) and not isinstance(value, bool) and f"={value}" in kinds:
        return True
    if value is None:
        return "None" in kinds
    return type(value).__name__ in kinds
