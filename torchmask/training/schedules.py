"""Learning-rate schedules: pure functions of the step, in units of the peak learning rate.

One shape says them all: a linear warm-up, a plateau at the peak, a decay to a floor. Nothing is remembered between
calls, so a resumed run needs the step and nothing else (torch's LRScheduler keeps counters, and a resume that forgets
them restarts the warm-up).

The factor at `step` is the one used *for* update number `step`, counted from 0. The first warm-up update uses
`1 / num_warmup_steps`, not 0: an update at learning rate 0 is a batch wasted. The floor is reached at `num_steps`, one
past the last update, for the same reason.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torchmask.errors import ConfigError

DECAY_SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "sqrt": lambda progress: 1.0 - math.sqrt(progress),  # "1-sqrt" of Haegele et al. 2024, arXiv:2405.18392
    }
)
"""How the height above the floor falls from 1 to 0 while the decay's progress goes from 0 to 1."""

DEFAULT_DECAY_RATIO = 0.1  # share of a WSD run spent decaying: 10 to 20 % suffices (same paper, section 4)


@dataclass(frozen=True)
class Schedule:
    """A warm-up, a plateau and a decay; call it with a step for the factor of the peak learning rate.

    Args:
        name: what people read in the run's header.
        num_steps: updates of the whole run.
        num_warmup_steps: updates before the peak is held.
        num_decay_steps: updates of the decay, which ends at `num_steps`; 0 means none.
        decay_shape: a key of `DECAY_SHAPES`.
        floor: the factor at the end and ever after.

    >>> schedule = linear_schedule(num_steps=6, num_warmup_steps=2)
    >>> [schedule(step) for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    name: str
    num_steps: int
    num_warmup_steps: int = 0
    num_decay_steps: int = 0
    decay_shape: str = "linear"
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """The factor for update number `step` (from 0); the floor for steps past the end."""
        if step < self.num_warmup_steps:
            return (step + 1) / self.num_warmup_steps
        decayed_steps = step - (self.num_steps - self.num_decay_steps)
        if self.num_decay_steps == 0 or decayed_steps <= 0:
            return 1.0
        progress = min(decayed_steps / self.num_decay_steps, 1.0)
        return self.floor + (1.0 - self.floor) * DECAY_SHAPES[self.decay_shape](progress)

    def __str__(self) -> str:
        parts = [f"{self.name} over {self.num_steps:,} steps"]
        if self.num_warmup_steps:
            parts.append(f"{self.num_warmup_steps:,} of them warm-up")
        if self.num_decay_steps:
            parts.append(f"{self.num_decay_steps:,} decay to {self.floor:g} of the peak")
        return ", ".join(parts)


def cosine_schedule(
    *, num_steps: int, num_warmup_steps: int = 0, warmup_ratio: float | None = None, min_lr_ratio: float = 0.0
) -> Schedule:
    """Warm-up, then half a cosine from the peak to `min_lr_ratio` of it.

    At every step from the end of the warm-up on, the value is that of transformers' `get_cosine_schedule_with_warmup`
    at the same step; during warm-up it is transformers' value one step later (theirs starts with an update at 0).

    Raises:
        ConfigError: C09 when the numbers contradict each other, C13 when one is out of range.
    """
    num_warmup = _warmup_steps(num_steps, num_warmup_steps, warmup_ratio)
    _check_ratio("min_lr_ratio", min_lr_ratio)
    return Schedule("cosine", num_steps, num_warmup, num_steps - num_warmup, "cosine", min_lr_ratio)


def linear_schedule(
    *, num_steps: int, num_warmup_steps: int = 0, warmup_ratio: float | None = None, min_lr_ratio: float = 0.0
) -> Schedule:
    """Warm-up, then a straight line from the peak to `min_lr_ratio` of it.

    Raises:
        ConfigError: C09 when the numbers contradict each other, C13 when one is out of range.
    """
    num_warmup = _warmup_steps(num_steps, num_warmup_steps, warmup_ratio)
    _check_ratio("min_lr_ratio", min_lr_ratio)
    return Schedule("linear", num_steps, num_warmup, num_steps - num_warmup, "linear", min_lr_ratio)


def wsd_schedule(
    *,
    num_steps: int,
    num_warmup_steps: int = 0,
    warmup_ratio: float | None = None,
    num_decay_steps: int | None = None,
    decay_ratio: float | None = None,
    decay_shape: str = "linear",
    min_lr_ratio: float = 0.0,
) -> Schedule:
    """Warm-up, the peak held (stable), and a decay over the last steps (arXiv:2404.06395).

    Args:
        num_decay_steps: updates of the decay; or
        decay_ratio: its share of `num_steps`. With neither, the last 10 %.
        decay_shape: `linear`, `sqrt` (one minus the root of the progress) or `cosine`.

    Raises:
        ConfigError: C09 when the numbers contradict each other, C13 when one is out of range.
    """
    num_warmup = _warmup_steps(num_steps, num_warmup_steps, warmup_ratio)
    _check_ratio("min_lr_ratio", min_lr_ratio)
    if decay_shape not in DECAY_SHAPES:
        raise ConfigError(
            "C06", f"no decay called {decay_shape!r}", where="lr_scheduler.decay_shape", fix=f"one of {_shape_names()}"
        )
    if num_decay_steps is not None and decay_ratio is not None:
        raise _both_given("num_decay_steps", num_decay_steps, "decay_ratio", decay_ratio)
    if num_decay_steps is None:
        ratio = DEFAULT_DECAY_RATIO if decay_ratio is None else decay_ratio
        _check_ratio("decay_ratio", ratio)
        num_decay = _share(ratio, num_steps)
        if decay_ratio is None:
            num_decay = min(num_decay, num_steps - num_warmup)  # a default must not contradict what was asked
    else:
        _check_count("num_decay_steps", num_decay_steps, minimum=0)
        num_decay = num_decay_steps
    if num_warmup + num_decay > num_steps:
        raise ConfigError(
            "C09",
            f"{num_warmup} warm-up and {num_decay} decay steps do not fit into {num_steps} steps",
            where="lr_scheduler",
            fix="make the warm-up or the decay shorter, or train for longer",
        )
    return Schedule("wsd", num_steps, num_warmup, num_decay, decay_shape, min_lr_ratio)


def constant_schedule(*, num_steps: int, num_warmup_steps: int = 0, warmup_ratio: float | None = None) -> Schedule:
    """Warm-up, then the peak to the end.

    Raises:
        ConfigError: C09 when the warm-up is longer than the run, C13 when a number is out of range.
    """
    return Schedule("constant", num_steps, _warmup_steps(num_steps, num_warmup_steps, warmup_ratio))


def _warmup_steps(num_steps: int, num_warmup_steps: int, warmup_ratio: float | None) -> int:
    _check_count("num_steps", num_steps, minimum=1)
    _check_count("num_warmup_steps", num_warmup_steps, minimum=0)
    if warmup_ratio is not None:
        if num_warmup_steps:
            raise _both_given("num_warmup_steps", num_warmup_steps, "warmup_ratio", warmup_ratio)
        _check_ratio("warmup_ratio", warmup_ratio)
        return _share(warmup_ratio, num_steps)
    if num_warmup_steps > num_steps:
        raise ConfigError(
            "C09",
            f"{num_warmup_steps} warm-up steps, but the run has {num_steps} steps",
            where="lr_scheduler.num_warmup_steps",
            fix=f"at most {num_steps}; or set warmup_ratio (0.03, say) instead, which follows the run's length",
        )
    return num_warmup_steps


def _share(ratio: float, num_steps: int) -> int:
    # Rounded up, as transformers does; the small number keeps 0.07 * 100 = 7.000000000000001 at 7.
    return math.ceil(ratio * num_steps - 1e-9)


def _check_count(name: str, value: int, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError("C13", f"{name} is {value!r}, expected a whole number >= {minimum}", where="lr_scheduler")


def _check_ratio(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:  # NaN fails both comparisons
        raise ConfigError("C13", f"{name} is {value!r}, expected a number from 0 to 1", where="lr_scheduler")


def _both_given(one: str, one_value: float, other: str, other_value: float) -> ConfigError:
    return ConfigError(
        "C09",
        f"{one} = {one_value} and {other} = {other_value} say the same thing twice",
        where="lr_scheduler",
        fix=f"keep {one} or {other}",
    )


def _shape_names() -> str:
    return ", ".join(sorted(DECAY_SHAPES))
