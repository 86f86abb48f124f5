"""One integer says which rows a step trains on, for any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchmask.training.run import Run
from torchmask.training.steps import plan_steps, step_rows, validation_rows


class Rows:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def row_order(self, epoch, seed):
        return np.random.default_rng((seed, epoch)).permutation(self.n)


def _rank(rank, world_size):
    return Run(Path("out"), torch.device("cpu"), rank, world_size)


def _plan(rows, run, **kwargs):
    options = {"batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2, "max_steps_per_epoch": None, "seed": 4}
    return plan_steps(rows, run, **{**options, **kwargs})


@given(num_rows=st.integers(1, 60), world_size=st.sampled_from([1, 2, 3]), batch_size=st.integers(1, 3))
def test_an_epoch_trains_on_every_row_once_and_ranks_stay_in_step(num_rows, world_size, batch_size):
    rows = Rows(num_rows)
    plan = _plan(rows, _rank(0, world_size), batch_size=batch_size)
    for epoch in range(2):
        seen = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            shares = [step_rows(rows, plan, step, _rank(r, world_size)) for r in range(world_size)]
            if world_size > 1:
                assert len({tuple(len(b) for b in share) for share in shares}) == 1, "ranks differ in micro-batches"
            seen += [i for share in shares for batch in share for i in batch if i >= 0]
        assert sorted(seen) == list(range(num_rows))


@given(num_rows=st.integers(1, 60), world_size=st.sampled_from([1, 2, 3]))
def test_validation_sees_every_row_once_whatever_the_batch(num_rows, world_size):
    seen = [
        i
        for r in range(world_size)
        for batch in validation_rows(Rows(num_rows), 4, _rank(r, world_size))
        for i in batch
        if i >= 0
    ]
    assert sorted(seen) == list(range(num_rows))


def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks():
    rows = Rows(50)
    one = _plan(rows, _rank(0, 1), batch_size=4, gradient_accumulation_steps=2)
    two = _plan(rows, _rank(0, 2), batch_size=4, gradient_accumulation_steps=1)
    assert one == two
    for step in range(one.num_steps):
        whole = [i for b in step_rows(rows, one, step, _rank(0, 1)) for i in b]
        halves = [i for r in range(2) for b in step_rows(rows, two, step, _rank(r, 2)) for i in b]
        assert [i for i in whole if i >= 0] == [i for i in halves if i >= 0]


def test_a_resumed_run_keeps_its_global_batch_on_another_number_of_ranks():
    plan = _plan(Rows(50), _rank(0, 4), batch_size=2, gradient_accumulation_steps=99, global_batch=8)
    assert plan.global_batch == 8 and len(step_rows(Rows(50), plan, 0, _rank(3, 4))) == 1


def test_a_global_batch_that_cannot_be_shared_names_the_numbers_that_can():
    with pytest.raises(ValueError, match="use 1 or 2 or 4 processes"):
        _plan(Rows(50), _rank(0, 3), batch_size=2, global_batch=8)


def test_no_rows_stop_the_run():
    with pytest.raises(ValueError, match="no rows"):
        _plan(Rows(0), _rank(0, 1))


def test_the_order_differs_between_epochs_and_seeds():
    rows = Rows(100)
    plan, other = _plan(rows, _rank(0, 1)), _plan(rows, _rank(0, 1), seed=5)
    first = step_rows(rows, plan, 0, _rank(0, 1))
    assert first != step_rows(rows, plan, plan.steps_per_epoch, _rank(0, 1))
    assert first != step_rows(rows, other, 0, _rank(0, 1))
