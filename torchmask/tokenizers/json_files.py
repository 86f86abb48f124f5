"""JSON files of a tokenizer's folder."""

import json
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file.

    Raises:
        ConfigError: C10, the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("C10", f"not valid JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ConfigError("C10", f"expected a JSON object, found {type(value).__name__}", where=str(path))
    return value
