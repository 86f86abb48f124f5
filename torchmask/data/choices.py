"""What options and rows may say: a name among the valid ones, a weight."""

import difflib
from collections.abc import Sequence
from typing import Any

from torchmask.errors import ConfigError


def choose(key: str, value: Any, choices: Sequence[str]) -> None:
    """Nothing, where `value` is one of the choices.

    Raises:
        ConfigError: it is not (C06); the nearest one is suggested.
    """
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    fix = f"choose one of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")
    raise ConfigError("C06", f"{key} is {value!r}", fix=fix)


def check_max_rows(value: Any) -> None:
    """Nothing, where `value` is a number of rows, or None for all.

    Raises:
        ConfigError: it is not (C13).
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigError("C13", f"max_rows is {value!r}", fix="give a whole number from 0, or null for all rows")


_LARGEST = 1e15

WEIGHT_RANGE = f"0, or from {1 / _LARGEST:g} to {_LARGEST:g} in size"


def is_number(value: Any) -> bool:
    """Whether a value is a number, which `true` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_weight(value: float) -> bool:
    """Whether a number can scale a loss in float32, and so can its product with another such number.

    >>> [is_weight(v) for v in (0, -0.5, 1e40, 1e-40, float("nan"))]
    [True, True, False, False, False]
    """
    return value == 0 or 1 / _LARGEST <= abs(value) <= _LARGEST
