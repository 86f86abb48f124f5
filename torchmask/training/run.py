"""A run: its folder and lock, its device, its place among the ranks; one process or many behave alike.

outputs/
  config.yaml run.json metrics.jsonl logs/ checkpoints/ final/
"""

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchmask.errors import ConfigError, EnvironmentFault
from torchmask.training.seed import seed_everything
from torchmask.training.stop import StopFlag, catch_signals

LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """What every part of a recipe may ask about the run it belongs to.

    Attributes:
        mesh: of all ranks; None for a single process.
        stop: set when a signal asked the run to stop.
    """

    output_dir: Path
    device: torch.device
    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    stop: StopFlag = field(default_factory=StopFlag)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def checkpoints_dir(self) -> Path:
        """Holds one folder a checkpoint."""
        return self.output_dir / "checkpoints"

    @property
    def final_dir(self) -> Path:
        """The exported model, in Hugging Face layout."""
        return self.output_dir / "final"

    @property
    def adapter_dir(self) -> Path:
        """The exported adapters of a run with `lora`, in PEFT's layout."""
        return self.output_dir / "adapter"

    def agree(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, through one all-reduce on the CPU (no device is waited for)."""
        if self.mesh is None:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(vector)
        return vector.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, a plain value, in the order of the ranks; on all of them."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.mesh is not None:
            dist.barrier()


@contextmanager
def start_run(
    output_dir: str | Path, *, device: str = "auto", seed: int = 0, resume: bool = False, timeout_seconds: float = 600.0
) -> Iterator[Run]:
    """Joins the other ranks if there are any, takes the output folder, seeds everything; undoes it at the end.

    Args:
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`.
        resume: the folder may hold this run's earlier checkpoints.
        timeout_seconds: how long ranks wait for each other.

    Raises:
        ConfigError: the folder holds another run's checkpoints, or another process works in it.
        EnvironmentFault: the folder cannot be written, or the device is not there.
    """
    chosen = choose_device(device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mesh = None
    if "RANK" in os.environ:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        mesh = init_device_mesh(chosen.type, (world_size,)) if world_size > 1 else None
    run = Run(Path(output_dir).expanduser(), chosen, rank, world_size, mesh)
    seed_everything(seed, rank=rank)
    with catch_signals(run.stop):
        lock = _take_folder(run, resume=resume)
        try:
            yield run
            run.barrier()  # before the group is destroyed, else one rank in three aborts at exit
        finally:
            if lock is not None:
                (run.output_dir / LOCK).unlink(missing_ok=True)
                lock.close()
            if dist.is_initialized():
                dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device a name stands for; on a machine with several GPUs each rank takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError("C09", f"device is {name!r}", fix="use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise EnvironmentFault(
                "R14", f"device is {name!r}, but torch finds no CUDA device", fix="device=auto picks what is there"
            )
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= count:
            raise EnvironmentFault(
                "R14", f"device cuda:{index} asked for, there are {count}", fix="use fewer processes"
            )
        return torch.device("cuda", index)
    return device


def _take_folder(run: Run, *, resume: bool) -> IO[str] | None:
    """Rank 0 checks the folder and holds its lock file open; all ranks learn whether it may be used."""
    problem: Exception | None = None
    lock = None
    if run.is_main:
        try:
            lock = _check_and_lock(run, resume=resume)
        except (OSError, ConfigError) as error:
            problem = error
    if run.agree(float(problem is not None))[0]:
        if isinstance(problem, OSError):
            raise EnvironmentFault(
                "K05",
                f"the output folder cannot be written: {problem.strerror or problem}",
                where=str(run.output_dir.absolute()),
                fix="set output_dir to a folder you may write to",
            ) from problem
        raise problem or ConfigError("K05", "rank 0 could not take the output folder", where=str(run.output_dir))
    return lock


def _check_and_lock(run: Run, *, resume: bool) -> IO[str]:
    run.output_dir.mkdir(parents=True, exist_ok=True)
    held = sorted(p.name for p in run.checkpoints_dir.glob("step-*"))
    held += [folder.name for folder in (run.final_dir, run.adapter_dir) if folder.exists()]
    if held and not resume:
        raise ConfigError(
            "K05",
            f"the output folder already holds a run ({held[-1]}{f' and {len(held) - 1} more' if held[1:] else ''})",
            where=str(run.output_dir),
            fix="set output_dir to another folder, or resume_from_checkpoint=true to go on with this run",
        )
    lock = open(run.output_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (held open while the run lasts)
    if not _lock_is_free(lock):
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise ConfigError(
            "K06",
            f"{owner} works in this output folder",
            where=str(run.output_dir),
            fix="wait for it, or choose another output_dir",
        )
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _lock_is_free(lock: IO[str]) -> bool:
    """Takes the lock if nobody has it. The system lets go of it when its process ends, however that happens."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def any_rank(run: Run, flag: bool) -> bool:
    """Whether the flag is set on some rank; collective."""
    return run.agree(float(flag))[0] > 0


def ranks_share(total: Sequence[int], run: Run) -> Sequence[int]:
    """This rank's equal, contiguous share of a list whose length the world size divides."""
    size = len(total) // run.world_size
    return total[run.rank * size : (run.rank + 1) * size]
