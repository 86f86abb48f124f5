"""Numbers that more than one layer has to agree on."""

from enum import IntEnum

IGNORE_INDEX = -100
"""The label of a slot that predicts nothing (torch's own default for `ignore_index`)."""


class ExitCode(IntEnum):
    """What the process tells the shell, Slurm or Kubernetes about how a run ended."""

    DONE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    WEIGHTS = 4
    DIVERGED = 5
    OUT_OF_MEMORY = 6
    ENVIRONMENT = 7
    WORKER_LOST = 8
    STOPPED = 75  # EX_TEMPFAIL: saved on request, start it again and it goes on
    INTERRUPTED = 130
