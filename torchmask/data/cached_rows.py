"""The rows of a packed data set beside the samples that they are of, so that a second start plans nothing.

What a `PackedDataset` works out from its samples is a tree of small objects with flat arrays at its leaves. The tree is
written as JSON and the arrays as mapped columns; classes are named in it and come from a fixed list, so reading it can
make nothing else. An object of any other kind means that the rows are simply worked out again.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.data.cache import cached_arrays
from torchmask.data.eos import EosPolicy
from torchmask.data.fingerprints import plain, version_facts
from torchmask.data.fragments import Fragments, Targets
from torchmask.data.layout import Layout, RowOptions
from torchmask.data.mapped import Arrays
from torchmask.data.plan import Plan
from torchmask.data.segments import Segments
from torchmask.errors import EnvironmentFault

_log = logging.getLogger("torchmask.cache")
_CLASSES: dict[str, type] = {c.__name__: c for c in (EosPolicy, Fragments, Layout, Plan, RowOptions, Segments)}
_UNWRITABLE = ("K02", "K05")


class _Unknown(Exception):
    """A value that is not written down."""


class _Later:
    """Stands for an object that is made when something is asked of it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = self._make()
        return getattr(self._made, name)


def kept_with_samples(init: Callable[..., None]) -> Callable[..., None]:
    """`PackedDataset.__init__` that reads what it would work out, where the samples lie in the cache."""

    @functools.wraps(init)
    def build_or_read(self: Any, samples: Any, **options: Any) -> None:
        home = getattr(samples, "home", None)
        if home is None:
            init(self, samples, **options)
            return
        bound = inspect.signature(init).bind(self, samples, **options)
        bound.apply_defaults()
        given = {key: value for key, value in bound.arguments.items() if key not in ("self", "samples")}
        facts = {
            "kind": "rows",
            "samples": home.name,
            "options": {key: plain(value, key) for key, value in given.items()},
            **version_facts(),
        }

        def build() -> tuple[Arrays, dict[str, Any]]:
            init(self, samples, **options)
            arrays: Arrays = {}
            return arrays, {"state": _freeze(vars(self), arrays, samples), "rows": len(self)}

        try:
            entry = cached_arrays(build, facts, root=home.parent.parent)
        except _Unknown as error:
            _log.info("these rows are not kept: %s", error)
            return
        except EnvironmentFault as error:
            if error.id not in _UNWRITABLE:
                raise
            _log.warning("the rows are not kept: %s", error)
            init(self, samples, **options)
            return
        vars(self).clear()
        vars(self).update(_thaw(entry.header["state"], entry.arrays, samples))

    return build_or_read


def _freeze(value: Any, arrays: Arrays, samples: Any) -> Any:
    """A value as JSON; its arrays go into `arrays`, each once."""
    if value is samples:
        return {"samples": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return {"array": _column(value, arrays)}
    if isinstance(value, _Later):
        value = value._make()
    if isinstance(value, Targets):
        return {"targets": value._train_terminated}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _freeze(item, arrays, samples) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_freeze(item, arrays, samples) for item in value]}
    if type(value).__name__ in _CLASSES:
        state = value._asdict() if hasattr(value, "_asdict") else vars(value)
        return {"class": type(value).__name__, "state": _freeze(state, arrays, samples)}
    raise _Unknown(type(value).__name__)


def _column(value: npt.NDArray[Any], arrays: Arrays) -> str:
    """The column's name; an array that is there already, by identity or as the same memory, is not written twice."""
    for name, other in arrays.items():
        if other is value or (other.__array_interface__ == value.__array_interface__ and len(value)):
            return name
    name = f"c{len(arrays)}"
    arrays[name] = value
    return name


def _thaw(value: Any, arrays: Arrays, samples: Any) -> Any:
    """What `_freeze` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = [(k, v) for k, v in value.items() if k != "state"]
    if kind == "samples":
        return samples
    if kind == "array":
        return arrays[content]
    if kind == "targets":
        return _Later(lambda: Targets(samples, train_terminated=content))
    if kind == "dict":
        return {key: _thaw(item, arrays, samples) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_thaw(item, arrays, samples) for item in content]
        return items if kind == "list" else tuple(items)
    cls, state = _CLASSES[content], _thaw(value["state"], arrays, samples)
    if hasattr(cls, "_fields"):
        return cls(**state)
    made: Any = object.__new__(cls)
    made.__dict__.update(state)
    return made
