"""What a run leaves on record about itself: config.yaml (what was asked for) and run.json (where, with what)."""

import json
import os
import platform
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from torchmask import __version__
from torchmask.training.run import Run

_SECRET_KEY = re.compile(r"(?i)(?:^|_)(?:token|secret|password|api_key)$")
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
HIDDEN = "***"


def write_record(run: Run, config: Mapping[str, Any]) -> None:
    """Writes config.yaml, which runs again as it is, and run.json; rank 0 only, readable by their owner only."""
    if not run.is_main:
        return
    config = without_secrets(config)
    _write(run.output_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    facts = {
        "argv": [_PASSWORD_IN_URL.sub(f"{HIDDEN}@", a) for a in sys.argv[1:]],
        "host": socket.gethostname(),
        "world_size": run.world_size,
        "device": str(run.device),
        "versions": {"torchmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    _write(run.output_dir / "run.json", json.dumps(facts, indent=2) + "\n")


def without_secrets(value: Any, key: str = "") -> Any:
    """A copy in which values of secret-looking keys, and passwords in addresses, are hidden.

    >>> without_secrets({"api_key": "k", "max_tokens": 5, "url": "https://me:pw@host/x"})
    {'api_key': '***', 'max_tokens': 5, 'url': 'https://***@host/x'}
    """
    if isinstance(value, Mapping):
        return {k: without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v, key) for v in value]
    if isinstance(value, str):
        return HIDDEN if _SECRET_KEY.search(key) else _PASSWORD_IN_URL.sub(f"{HIDDEN}@", value)
    return value


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as f:
        f.write(text)
