"""Fixtures that every package's tests share."""

import os
from collections.abc import Callable
from functools import partial
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


# Runs of the recipe finetune, each made once for all files of tests. What they need imports torch, other tests do not.


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """A user's folder for the recipe finetune; see recipe_runs.py."""
    from recipe_runs import make_finetune_workplace

    return make_finetune_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="session")
def unbroken(workplace, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a run from beginning to end by one process, and what was said."""
    from recipe_runs import dataset_of, run_recipe

    output = tmp_path_factory.mktemp("one") / "out"
    return output, run_recipe(workplace, output, dataset_of(workplace / "val.jsonl", key="dataset_val"))


@pytest.fixture(scope="session")
def unbroken_two(workplace, tmp_path_factory) -> Path:
    """The same by two processes that share each step's rows."""
    from recipe_runs import run_recipe

    output = tmp_path_factory.mktemp("two") / "out"
    run_recipe(workplace, output, "gradient_accumulation_steps=1", nproc=2)
    return output


@pytest.fixture
def fails(workplace, tmp_path, capfd) -> Callable[..., str]:
    """Runs the workplace's recipe with overrides and expects an error; see `assert_fails` of recipe_runs.py."""
    from recipe_runs import assert_fails

    return partial(assert_fails, workplace, tmp_path / "out", capfd)
