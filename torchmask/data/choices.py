"""The one way to refuse a name that is not among the valid ones."""

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
