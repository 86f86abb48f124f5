"""Fixtures that every package's tests share."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers, goldens, checkpoints and data; the test is skipped where there is none."""
    folder = Path(os.environ.get("TORCHMASK_ASSETS", REPO.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no test assets at {folder}; TORCHMASK_ASSETS names their folder")
    return folder
