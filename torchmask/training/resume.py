"""Choosing the checkpoint to go on from, and making sure that it belongs to this run."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchmask.errors import ConfigError, WeightsError
from torchmask.modules import Decoder
from torchmask.training.checkpoint import (
    checkpoint_dir,
    find_checkpoints,
    load_state,
    load_tensors,
    restore_rng,
    verify,
)
from torchmask.training.distributed import model_tensors
from torchmask.training.optim import Optimizer
from torchmask.training.run import Run


def choose_checkpoint(run: Run, choice: bool | str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, verified by rank 0; collective.

    Args:
        choice: False = none; True = the newest of the run's folder that is whole (damaged ones are told of and passed
            over), None if there is none yet; a path = that one.
        say: tells people.

    Raises:
        WeightsError: the named checkpoint, or every one in the folder, is missing or damaged.
    """
    if choice is False:
        return None
    candidates = find_checkpoints(run.checkpoints_dir)[::-1] if choice is True else [Path(str(choice)).expanduser()]
    if not candidates:
        say(f"no checkpoint in {run.checkpoints_dir} yet: starting from the beginning")
        return None
    first_whole, problem = 0, None
    if run.is_main:
        first_whole, problem = _first_whole(candidates, say)
    chosen = int(run.agree(float(first_whole))[0])  # the other ranks add 0
    if chosen == len(candidates):
        raise problem or WeightsError("W04", "no checkpoint is whole; rank 0 tells which", where=str(run.output_dir))
    if run.is_main:
        _set_aside_later_ones(run, load_state(candidates[chosen])["step"], say)
    run.barrier()
    return candidates[chosen]


def _set_aside_later_ones(run: Run, step: int, say: Callable[[str], None]) -> None:
    """Renames the run's checkpoints after `step`: they are damaged, or of a course that is not taken any more.

    Left where they are they would count as the newest ones, and the good ones of the new course would be deleted.
    """
    for later in sorted(run.checkpoints_dir.glob("step-*")):
        if later != checkpoint_dir(run, step) and later.name > checkpoint_dir(run, step).name:
            aside = later.with_name(f"stale-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
            say(f"{later.name} is after the step resumed from: kept as {aside.name}, delete it when you like")


def _first_whole(candidates: list[Path], say: Callable[[str], None]) -> tuple[int, WeightsError | None]:
    problems: list[WeightsError] = []
    for i, candidate in enumerate(candidates):
        try:
            verify(candidate)
        except WeightsError as error:
            problems.append(error)
            continue
        for problem in problems:
            say(f"WARNING {problem.where}: {problem.message}; going back to {candidate.name}")
        return i, None
    if len(problems) == 1:
        return len(candidates), problems[0]
    return len(candidates), WeightsError(
        "K12",
        "no checkpoint is whole: " + "; ".join(f"{Path(str(p.where)).name}: {p.message}" for p in problems),
        where=str(candidates[0].parent),
        fix="restore one of them from a copy, or start again with another output_dir",
    )


def check_belongs(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's state, if everything that must not change has not.

    Args:
        facts: what was saved under the same names in `state["facts"]`, as this run has it.

    Raises:
        ConfigError: a setting that decides the result differs; all are shown, saved beside wanted.
        WeightsError: the training data differs.
    """
    state = load_state(folder)
    saved = state["facts"]
    differing = sorted(name for name in facts if saved.get(name) != facts[name])
    if differing == ["data"]:
        raise WeightsError(
            "D18",
            f"the training data changed since the checkpoint: fingerprint {saved.get('data')}, now {facts['data']}",
            where=str(folder),
            fix="resume with the same rows, tokenizer and packing; or start a new run from this one's weights",
        )
    if differing:
        pairs = [pair for name in differing for pair in _differences(name, saved.get(name), facts[name])]
        rows = [f"    {name}: the checkpoint has {before!r}, this run {now!r}" for name, before, now in pairs]
        raise ConfigError(
            "K09",
            "the checkpoint was made with other settings:\n" + "\n".join(rows),
            where=str(folder),
            fix="set them back, or start a new run in another output_dir",
        )
    return state


def load_checkpoint(run: Run, folder: Path, model: Decoder, optimizer: Optimizer) -> None:
    """Weights, optimizer and random states as they were when the checkpoint was saved; collective.

    Raises:
        WeightsError: K09, a tensor is missing or has another shape.
    """
    load_tensors(run, folder, "model", model_tensors(model))
    table = optimizer.state_dict()
    load_tensors(run, folder, "optim", table)
    optimizer.load_state_dict(table)
    restore_rng(run, folder)


def _differences(name: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """The settings below a name that differ, with both values."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [(name, before, now)]
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [found for key in keys for found in _differences(f"{name}.{key}", before.get(key), now.get(key))]
