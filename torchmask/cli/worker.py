"""What a worker of a distributed run tells its launcher: that it started, and how it ended.

Through files in a folder of the launcher's, because exit codes alone do not carry a message, and because after a signal
torch's agent no longer tells the exit codes.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER_VARIABLE = "TORCHMASK_LAUNCH_DIR"


@dataclass(frozen=True)
class WorkerEnding:
    """How one worker ended: `ended` is in seconds since the epoch, None while it runs; `attempt` counts restarts."""

    rank: int
    pid: int
    attempt: int
    ended: float | None = None
    exit_code: int = 0
    id: str = ""
    text: str = ""
    is_echo: bool = False


def is_worker() -> bool:
    """Whether this process was started by torchmask's launcher."""
    return FOLDER_VARIABLE in os.environ and "RANK" in os.environ


def leave_start() -> None:
    """Tells the launcher this worker's process id."""
    _write(_this_worker())


def leave_ending(exit_code: int, id: str = "", text: str = "", *, is_echo: bool = False) -> None:
    """Tells the launcher how this worker ended."""
    start = _this_worker()
    ending = WorkerEnding(start.rank, start.pid, start.attempt, time.time(), exit_code, id, text, is_echo)
    _write(ending)


def read_endings(folder: Path, *, attempt: int | None = None) -> list[WorkerEnding]:
    """What the workers of an attempt (by default the last one) left, by rank."""
    found = [WorkerEnding(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank-*.json")]
    wanted = max((ending.attempt for ending in found), default=0) if attempt is None else attempt
    return sorted((ending for ending in found if ending.attempt == wanted), key=lambda ending: ending.rank)


def _this_worker() -> WorkerEnding:
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return WorkerEnding(rank=int(os.environ["RANK"]), pid=os.getpid(), attempt=attempt)


def _write(ending: WorkerEnding) -> None:
    path = Path(os.environ[FOLDER_VARIABLE]) / f"rank-{ending.rank:05d}-{ending.attempt}.json"
    partial = path.with_suffix(f".{ending.pid}")
    try:
        partial.write_text(json.dumps(ending.__dict__), encoding="utf-8")
        partial.replace(path)
    except OSError:  # the launcher is gone, or the disk is full: the exit code still says what it can
        pass
