import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmask.errors import ConfigError
from torchmask.training.schedules import (
    DECAY_SHAPES,
    Schedule,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    wsd_schedule,
)


@st.composite
def schedules(draw):
    num_steps = draw(st.integers(1, 400))
    num_warmup = draw(st.integers(0, num_steps))
    floor = draw(st.floats(0.0, 1.0))
    kind = draw(st.sampled_from(["cosine", "linear", "wsd", "constant"]))
    if kind == "constant":
        return constant_schedule(num_steps=num_steps, num_warmup_steps=num_warmup)
    if kind == "wsd":
        return wsd_schedule(
            num_steps=num_steps,
            num_warmup_steps=num_warmup,
            num_decay_steps=draw(st.integers(0, num_steps - num_warmup)),
            decay_shape=draw(st.sampled_from(sorted(DECAY_SHAPES))),
            min_lr_ratio=floor,
        )
    make = cosine_schedule if kind == "cosine" else linear_schedule
    return make(num_steps=num_steps, num_warmup_steps=num_warmup, min_lr_ratio=floor)


@given(schedules())
def test_factors_lie_between_the_floor_and_the_peak_after_warm_up(schedule: Schedule):
    for step in range(schedule.num_steps + 3):
        factor = schedule(step)
        assert 0.0 <= factor <= 1.0
        if step >= schedule.num_warmup_steps:
            assert factor >= schedule.floor - 1e-12


@given(schedules())
def test_the_factor_rises_to_the_peak_and_then_never_rises_again(schedule: Schedule):
    factors = [schedule(step) for step in range(schedule.num_steps + 3)]
    warmup = schedule.num_warmup_steps
    assert factors[:warmup] == sorted(factors[:warmup])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[warmup:], factors[warmup + 1 :]))
    assert max(factors) == 1.0


@given(schedules())
def test_no_step_jumps_further_than_its_phase_allows(schedule: Schedule):
    # Steepest slopes: warm-up 1 / W, linear 1 / D, cosine pi / 2D; 1 - sqrt falls by sqrt(1 / D) at first.
    decay = max(schedule.num_decay_steps, 1)
    steepest = {"linear": 1 / decay, "cosine": math.pi / 2 / decay, "sqrt": math.sqrt(1 / decay)}[schedule.decay_shape]
    bound = max(steepest, 1 / max(schedule.num_warmup_steps, 1) if schedule.num_warmup_steps else 0.0)
    for step in range(schedule.num_steps + 2):
        assert abs(schedule(step + 1) - schedule(step)) <= bound + 1e-12


@given(schedules())
def test_the_floor_is_reached_at_the_end_and_kept(schedule: Schedule):
    if schedule.num_decay_steps:
        assert schedule(schedule.num_steps) == pytest.approx(schedule.floor, abs=1e-12)
        assert schedule(schedule.num_steps + 1000) == schedule(schedule.num_steps)


@given(schedules())
def test_no_update_of_the_run_is_spent_at_learning_rate_zero(schedule: Schedule):
    assert all(schedule(step) > 0.0 for step in range(schedule.num_steps))


def test_warm_up_starts_at_one_step_of_it_and_ends_at_the_peak():
    schedule = cosine_schedule(num_steps=100, num_warmup_steps=4)
    assert [schedule(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "make"), [("cosine", cosine_schedule), ("linear", linear_schedule)])
def test_shape_is_that_of_transformers_with_warm_up_one_step_ahead(kind, make):
    import torch
    import transformers

    reference_of = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (reference,) = reference_of(optimizer, num_warmup_steps=7, num_training_steps=50).lr_lambdas
    ours = make(num_steps=50, num_warmup_steps=7)
    for step in range(60):
        theirs = reference(step + 1) if step < 7 else reference(step)
        if kind == "cosine" and step > 50:  # transformers' cosine goes up again past the end
            theirs = 0.0
        assert ours(step) == pytest.approx(theirs, abs=1e-12)


def test_wsd_holds_the_peak_until_the_decay():
    schedule = wsd_schedule(num_steps=20, num_warmup_steps=2, decay_ratio=0.25, min_lr_ratio=0.2)
    assert [schedule(step) for step in range(2, 16)] == [1.0] * 14
    assert schedule(16) == pytest.approx(0.84)
    assert schedule(20) == pytest.approx(0.2)


def test_wsd_decays_over_the_last_tenth_by_default():
    assert wsd_schedule(num_steps=200).num_decay_steps == 20
    assert wsd_schedule(num_steps=20, num_warmup_steps=20).num_decay_steps == 0


def test_warm_up_ratio_is_a_share_of_the_steps_rounded_up():
    assert cosine_schedule(num_steps=100, warmup_ratio=0.07).num_warmup_steps == 7
    assert linear_schedule(num_steps=30, warmup_ratio=0.05).num_warmup_steps == 2


@pytest.mark.parametrize("make", [cosine_schedule, linear_schedule, wsd_schedule, constant_schedule])
def test_a_warm_up_longer_than_the_run_is_a_contradiction(make):
    with pytest.raises(ConfigError, match="11 warm-up steps, but the run has 10 steps") as caught:
        make(num_steps=10, num_warmup_steps=11)
    assert caught.value.id == "C09"


def test_steps_and_ratio_together_are_refused():
    with pytest.raises(ConfigError, match="say the same thing twice") as caught:
        cosine_schedule(num_steps=10, num_warmup_steps=2, warmup_ratio=0.1)
    assert caught.value.id == "C09"
    with pytest.raises(ConfigError, match="num_decay_steps = 2 and decay_ratio"):
        wsd_schedule(num_steps=10, num_decay_steps=2, decay_ratio=0.1)


def test_warm_up_and_decay_that_overlap_are_refused():
    with pytest.raises(ConfigError, match="6 warm-up and 5 decay steps do not fit into 10 steps"):
        wsd_schedule(num_steps=10, num_warmup_steps=6, num_decay_steps=5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_steps": 0},
        {"num_steps": 10, "num_warmup_steps": -1},
        {"num_steps": 10, "warmup_ratio": 1.5},
        {"num_steps": 10, "warmup_ratio": math.nan},
        {"num_steps": 10, "min_lr_ratio": -0.1},
    ],
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError) as caught:
        cosine_schedule(**arguments)
    assert caught.value.id == "C13"


def test_an_unknown_decay_shape_names_the_known_ones():
    with pytest.raises(ConfigError, match="cosine, linear, sqrt"):
        wsd_schedule(num_steps=10, decay_shape="cubic")
