"""Which rows each optimizer step trains on, from one integer.

Rows are permuted by (seed, epoch); optimizer step b of an epoch owns the global batch of rows [b G, (b + 1) G), rank r
its r-th share, in micro-batches. So a run resumes from its step number alone, on any number of ranks that keeps G.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from torchmask.errors import ConfigError, DataError, DivergedError
from torchmask.training.run import Run, ranks_share

_FILLER = -1


class Rows(Protocol):
    """A packed dataset, as far as the order of training is concerned."""

    def __len__(self) -> int: ...

    def row_order(self, epoch: int, seed: int) -> npt.NDArray[Any]:
        """A permutation of the rows."""


@dataclass(frozen=True)
class StepPlan:
    """How many steps a run has and what each consists of.

    Attributes:
        global_batch: G, rows an optimizer step.
        batch_size: rows a micro-batch.
        steps_per_epoch: optimizer steps; the last one of an epoch may be short of rows.
        num_steps: of the whole run.
    """

    global_batch: int
    batch_size: int
    steps_per_epoch: int
    num_steps: int
    seed: int

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that a step (from 0) belongs to."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether a step (from 0) is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0


def plan_steps(
    rows: Rows,
    run: Run,
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    epochs: int,
    max_steps_per_epoch: int | None,
    seed: int,
    global_batch: int | None = None,
) -> StepPlan:
    """The plan of a run.

    Args:
        global_batch: of the run that is resumed; the ranks share it, whatever `gradient_accumulation_steps` says.

    Raises:
        ConfigError: the ranks cannot share `global_batch` in micro-batches of `batch_size`.
        DataError: there are no rows.
    """
    if len(rows) == 0:
        raise DataError("D05", "the packed dataset has no rows", fix="look at the ledger above: what was dropped, why")
    if global_batch is None:
        global_batch = batch_size * gradient_accumulation_steps * run.world_size
    elif global_batch % (batch_size * run.world_size):
        valid = [n for n in range(1, global_batch + 1) if global_batch % n == 0 and global_batch // n % batch_size == 0]
        raise ConfigError(
            "K08",
            f"the run had {global_batch} rows a step; {run.world_size} processes with batch_size {batch_size} cannot "
            "share them equally",
            where="batch_size",
            fix=f"with this batch_size use {' or '.join(map(str, valid))} processes, or change batch_size"
            if valid
            else f"set batch_size to a divisor of {max(global_batch // run.world_size, 1)}",
        )
    steps_per_epoch = -(-len(rows) // global_batch)
    if max_steps_per_epoch is not None:
        steps_per_epoch = min(steps_per_epoch, max_steps_per_epoch)
    return StepPlan(global_batch, batch_size, steps_per_epoch, epochs * steps_per_epoch, seed)


def step_rows(rows: Rows, plan: StepPlan, step: int, run: Run) -> list[list[int]]:
    """This rank's micro-batches of row numbers for one optimizer step; -1 stands for a filler row without targets.

    Fillers make the last, short batch of an epoch as long as the others on every rank, so that no rank runs ahead.
    """
    first = step % plan.steps_per_epoch * plan.global_batch
    order = rows.row_order(plan.epoch(step), plan.seed)
    ids = order[first : first + plan.global_batch].tolist()
    return _micro_batches(ids, plan.global_batch, plan.batch_size, run)


def validation_rows(rows: Rows, batch_size: int, run: Run) -> Iterator[list[int]]:
    """This rank's micro-batches over all rows, in order, the last ones filled up."""
    together = batch_size * run.world_size
    for first in range(0, len(rows), together):
        ids = list(range(first, min(first + together, len(rows))))
        yield from _micro_batches(ids, together, batch_size, run)


def _micro_batches(ids: Sequence[int], total: int, batch_size: int, run: Run) -> list[list[int]]:
    filled = [*ids, *[_FILLER] * (total - len(ids))]
    share = ranks_share(filled, run)
    batches = [list(share[i : i + batch_size]) for i in range(0, len(share), batch_size)]
    if run.world_size == 1:  # nobody waits for us: leave out what would compute nothing
        batches = [b for b in batches if any(i != _FILLER for i in b)]
    return batches


def due(done: int, every: int | None, otherwise: bool) -> bool:
    """Whether something that happens every so many steps happens after step `done`; `otherwise` where it never does.

    >>> due(10, 5, False), due(11, 5, True), due(11, None, True)
    (True, False, True)
    """
    return done % every == 0 if every else otherwise


def check_finite(loss: float, grad_norm: float, *, step: int) -> None:
    """Stops a run before an update that would spoil its weights.

    Args:
        loss: of all ranks, so that all stop at the same step.
        grad_norm: before clipping.
        step: counted from 1.

    Raises:
        DivergedError: R01, one of the two is not finite.
    """
    if not math.isfinite(loss + grad_norm):
        raise DivergedError(
            "R01",
            f"loss {loss:g}, gradient norm {grad_norm:g} at step {step}; the weights were not updated",
            fix="lower optimizer.lr, warm up longer, or look at this step's rows; the last checkpoint stands",
        )
