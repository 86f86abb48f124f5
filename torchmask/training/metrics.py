"""What a run measures: one JSON object a step in a file, one line a step in a log, and the loggers people ask for.

metrics.jsonl is the record. Its lines are written whole and at once, so a killed run leaves at most half a line at the
end, which the resumed run drops; lines after the step it resumes from are moved to metrics.stale.jsonl, so no step is
there twice. TensorBoard, W&B and MLflow get copies: when one of them fails, the run warns and goes on without it.
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchmask.errors import EnvironmentFault, StopRequested
from torchmask.training.metric_loggers import MetricLogger

METRICS_FILE = "metrics.jsonl"
STALE_FILE = "metrics.stale.jsonl"
LOG_FILE = Path("logs") / "train.log"


class MetricsLog:
    """Writes the metrics of each step; a context manager that closes the files and loggers.

    Args:
        output_dir: the run's folder; gets metrics.jsonl and logs/train.log.
        resume_step: number of steps done by the checkpoint that the run goes on from; 0 for a new run.
        loggers: copies go here.
        warn: told once about each logger that fails.
        enabled: False on all ranks but the first: nothing is opened or written.

    Raises:
        EnvironmentFault: K05 when the files cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        resume_step: int = 0,
        loggers: Iterable[MetricLogger] = (),
        warn: Callable[[str], object] = warnings.warn,
        enabled: bool = True,
    ) -> None:
        self.path = Path(output_dir) / METRICS_FILE
        log_path = Path(output_dir) / LOG_FILE
        self._loggers = list(loggers)
        self._warn = warn
        self._last_step = resume_step
        self._enabled = enabled
        if not enabled:
            return
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            drop_stale_lines(self.path, resume_step=resume_step)
            # Unbuffered: one write a line, so that a line is in the file whole or, after a crash, cut at the end.
            self._metrics = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            self._log = open(log_path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _not_writable(error, self.path) from error

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, step: int, **values: float | torch.Tensor | None) -> None:
        """Write one step's line; every step has one, with its validation loss in it if there is one.

        Args:
            step: number of optimizer steps done, this one included (1 for the first).
            values: `loss`, `lr`, `grad_norm`, ...; Python's shortest form of the number, so an fp32 value is recovered
                bit for bit. Numbers that are not finite become null (JSON has none). None is left out.

        Raises:
            EnvironmentFault: K02 when the disk is full.
        """
        if not self._enabled:
            return
        assert step > self._last_step, f"step {step} logged after step {self._last_step}"
        self._last_step = step
        numbers = {name: _number(value) for name, value in values.items() if value is not None}
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            self._metrics.write(json.dumps(row).encode() + b"\n")
            self._log.write(f"{stamp} {format_step(step, numbers)}\n".encode())
        except OSError as error:
            raise _not_writable(error, self.path) from error
        self._copy(lambda logger: logger.log(step, numbers))

    def close(self) -> None:
        """Close the files and finish the loggers."""
        if not self._enabled:
            return
        self._copy(lambda logger: logger.close())
        self._loggers = []
        self._metrics.close()
        self._log.close()

    def _copy(self, action: Callable[[MetricLogger], None]) -> None:
        for logger in list(self._loggers):
            try:
                action(logger)
            except StopRequested:
                raise
            except Exception as error:  # whatever a service throws must not cost the run
                self._loggers.remove(logger)
                self._warn(
                    f"{type(logger).__name__} failed and is off for the rest of this run "
                    f"({type(error).__name__}: {error}); {self.path} stays complete"
                )


def drop_stale_lines(path: Path, *, resume_step: int) -> int:
    """Cut metrics.jsonl back to `resume_step`: moves later lines to metrics.stale.jsonl, drops half lines.

    Returns the number of lines moved. The file is replaced in one go, after the stale lines are safe.
    """
    if not path.exists():
        return 0
    kept, stale = bytearray(), bytearray()
    with open(path, "rb") as lines:
        for line in lines:
            step = _step_of(line)
            if step is not None:
                target = kept if step <= resume_step else stale
                target += line
    if stale:
        with open(path.with_name(STALE_FILE), "ab") as f:
            f.write(stale)
            f.flush()
            os.fsync(f.fileno())
    if len(kept) < path.stat().st_size:
        replacement = path.with_name(f".tmp-{path.name}")
        with open(replacement, "wb") as f:
            f.write(kept)
            f.flush()
            os.fsync(f.fileno())
        os.replace(replacement, path)
    return stale.count(b"\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The steps in a metrics.jsonl; half a line at the end (a run that was killed, or still writes) is left out."""
    with open(path, "rb") as lines:
        return [json.loads(line) for line in lines if _step_of(line) is not None]


def format_step(step: int, values: Mapping[str, float]) -> str:
    """One step as one line for people.

    >>> format_step(12, {"loss": 2.34567, "lr": 0.0003, "tokens_per_second_per_gpu": 12345.6})
    'step 12  loss 2.3457  lr 3.00e-04  tokens_per_second_per_gpu 12,346'
    """
    return "  ".join([f"step {step}", *(f"{name} {_text(name, value)}" for name, value in values.items())])


def token_rates(
    *, num_tokens: int, num_trained_tokens: int, num_slots: int, seconds: float, world_size: int = 1
) -> dict[str, float]:
    """Rates of one step (or of several), all counts summed over the ranks.

    Tokens, trained tokens and padding are counted apart, since a rate that counts padding rewards wasting it.

    Args:
        num_tokens: tokens of the documents, trained or not; no padding.
        num_trained_tokens: of them, those with a label.
        num_slots: positions computed, padding included.
        seconds: wall time.

    >>> token_rates(num_tokens=900, num_trained_tokens=300, num_slots=1000, seconds=2.0, world_size=2)
    {'tokens_per_second_per_gpu': 225.0, 'trained_tokens_per_second_per_gpu': 75.0, 'padding_share': 0.1}
    """
    device_seconds = max(seconds, 1e-9) * world_size
    return {
        "tokens_per_second_per_gpu": num_tokens / device_seconds,
        "trained_tokens_per_second_per_gpu": num_trained_tokens / device_seconds,
        "padding_share": round((num_slots - num_tokens) / num_slots, 6) if num_slots else 0.0,
    }


def peak_memory_gib(device: torch.device | str = "cpu") -> float:
    """Most memory held at once so far: torch's allocations on a CUDA device, else the process's resident set."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _peak_resident_bytes() / 2**30


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there starts from what the parent process held when it forked
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


def _number(value: float | torch.Tensor) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _text(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}"


def _not_writable(error: OSError, path: Path) -> EnvironmentFault:
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return EnvironmentFault(
        "K02" if full else "K05",
        f"the metrics cannot be written: {error.strerror or error}",
        where=str(path),
        fix="free some space and resume from the last checkpoint" if full else "set output_dir to a writable folder",
    )
