"""Errors a user can cause: what was given, where, what to do; one class for each exit code.

Every error has a stable id (documented in docs/errors.md) and is a `ValueError`, so library users need not know these
classes. The command line prints `str(error)` after `error[ID]` and exits with the class's code; anything that is not a
`TorchmaskError` is a bug of ours and exits with 1 and a traceback.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torchmask.constants import ExitCode


class TorchmaskError(ValueError):
    """An error with a place, a message and a cure.

    Args:
        id: stable code such as `D01`; the letter names the area, docs/errors.md explains each.
        message: what was found and what was expected, with values.
        where: `file:line`, a configuration key or a tensor's name.
        fix: what to do; one line for each way out.
        excerpt: the offending line of the file, shown under the message.

    >>> print(DataError("D01", "not valid JSON: unterminated string", where="train.jsonl:8", fix="mend the line"))
    train.jsonl:8: not valid JSON: unterminated string
      fix: mend the line
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(
        self, id: str, message: str, *, where: str | None = None, fix: str | None = None, excerpt: str | None = None
    ) -> None:
        self.id, self.message, self.where, self.fix, self.excerpt = id, message, where, fix, excerpt
        lines = [f"{where}: {message}" if where else message]
        lines += [f"    {excerpt}"] if excerpt else []
        lines += [f"  fix: {fix}"] if fix else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Callable[..., "TorchmaskError"], tuple[Any, ...]]:
        # Exceptions pickle as `cls(*args)`, and ours take other arguments than they print.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[TorchmaskError], args: tuple[Any, ...], values: dict[str, Any]) -> TorchmaskError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(values)
    return error


class ConfigError(TorchmaskError):
    """A configuration, a command line or a combination of options that cannot be run."""

    exit_code = ExitCode.CONFIG


class ConfigProblems(ConfigError):
    """Every problem of a configuration, reported together.

    >>> one = ConfigError("C01", "unknown key 'lrr'", where="my.yaml:3", fix="did you mean 'lr'?")
    >>> print(ConfigProblems([one]))
    my.yaml:3: unknown key 'lrr'
      fix: did you mean 'lr'?
    """

    def __init__(self, problems: Sequence[TorchmaskError]) -> None:
        assert problems
        super().__init__(problems[0].id, "\n".join(str(p) for p in problems))
        self.problems = list(problems)


class DataError(TorchmaskError):
    """A data file, row or conversation that cannot be used."""

    exit_code = ExitCode.DATA


class WeightsError(TorchmaskError):
    """Weights, a model folder or a checkpoint that cannot be used."""

    exit_code = ExitCode.WEIGHTS


class DivergedError(TorchmaskError):
    """The loss or a gradient is not finite."""

    exit_code = ExitCode.DIVERGED


class OutOfMemory(TorchmaskError):
    """The device or the host has no memory left."""

    exit_code = ExitCode.OUT_OF_MEMORY


class EnvironmentFault(TorchmaskError):
    """The machine is not as needed: disk, permission, network, Hub, a missing extra or device."""

    exit_code = ExitCode.ENVIRONMENT


class WorkerLost(TorchmaskError):
    """A process of a distributed run was killed or timed out."""

    exit_code = ExitCode.WORKER_LOST


class StopRequested(TorchmaskError):
    """The run was asked to stop (signal), has saved what there was to save and can be started again."""

    exit_code = ExitCode.STOPPED
