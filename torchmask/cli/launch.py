"""`torchmask run --nproc-per-node N ...`: torch's elastic launcher, called in this process.

In process and not as `torchrun`, because torchrun turns every exit code into 1, prints a traceback of its own for each
worker and ends with an error when it was only asked to stop. Here the worker that failed first is the one that is
reported, once, and its exit code becomes the run's. Signals are forwarded to the workers, which save and stop.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torchmask.cli import worker
from torchmask.cli.report import describe, print_text
from torchmask.cli.worker import WorkerEnding
from torchmask.constants import ExitCode
from torchmask.errors import ConfigError, WorkerLost

if TYPE_CHECKING:
    from torchmask.cli.run import Request

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
_WHERE_TO_MEET = {
    "nnodes",
    "node-rank",
    "rdzv-backend",
    "rdzv-endpoint",
    "master-addr",
    "master-port",
    "standalone",
}
"""Options that choose a rendezvous (several nodes, a port): then nothing is chosen for the user."""

SHUTDOWN_SECONDS = 120  # a worker that was asked to stop still writes a checkpoint; torch's own 30 s would cut it short


def launch(request: "Request") -> int:
    """Starts the workers, waits for them and returns the run's exit code; prints what went wrong, once.

    Raises:
        ConfigError: C16 for options that torch's launcher does not know.
    """
    folder = Path(tempfile.mkdtemp(prefix="torchmask-launch-"))
    os.environ[worker.FOLDER_VARIABLE] = str(folder)
    # workers that restart must not share the agent's store, or they meet the keys of the attempt before
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    try:
        return _launch(request, folder)
    finally:
        del os.environ[worker.FOLDER_VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)


def _launch(request: "Request", folder: Path) -> int:
    config, signals, timeout = _launch_config(request)
    # after torch: these import it
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # -P: the current folder is not searched for modules, as for the `torchmask` command itself
    command = ["-P", "-u", "-m", "torchmask", *request.worker_arguments()]
    stop = _Stop(folder, SignalException)
    for name in signals:
        signal.signal(getattr(signal, name), stop.receive)
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _report_first(worker.read_endings(folder), codes)
    except SignalException:
        return _stopped(stop, folder, timeout)
    return ExitCode.DONE


class _Stop:
    """Handles signals instead of torch's agent, whose handler would cut its own waiting for the workers short.

    The first signal makes the agent forward it and wait. Later ones are left to run out, but for a second Ctrl-C: that
    one ends the workers at once.
    """

    def __init__(self, folder: Path, signal_exception: type[Exception]) -> None:
        self.folder, self.signal_exception = folder, signal_exception
        self.first: signal.Signals | None = None
        self.interrupted = False

    def receive(self, number: int, frame: Any) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
            raise self.signal_exception(f"got {self.first.name}", self.first)
        if number == signal.SIGINT and self.first == signal.SIGINT:
            self.interrupted = True
            for pid in {ending.pid for ending in worker.read_endings(self.folder)} | set(_children()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # a worker leads its own process group


def _launch_config(request: "Request") -> tuple[Any, list[str], int]:
    """Torch's LaunchConfig from torchrun's options, the signals to forward, and the seconds a worker gets to stop."""
    from torch.distributed.run import config_from_args, determine_local_world_size, get_args_parser

    if not request.debug:  # the agent reports every worker, we the one that failed first
        for name in logging.root.manager.loggerDict:
            if name.startswith("torch.distributed"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args = parser.parse_args([*request.torchrun_options, "torchmask"])
    try:
        num_workers = determine_local_world_size(args.nproc_per_node)
    except ValueError as error:
        _refuse(str(error))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_workers)))
    names = _option_names(request.torchrun_options)
    if "rdzv-endpoint" in names and not names & {"rdzv-backend", "node-rank", "master-addr"}:
        args.rdzv_backend = "c10d"  # torchrun's own default would make every node the first one
    if not names & _WHERE_TO_MEET:
        args.rdzv_backend, args.rdzv_endpoint = "c10d", "localhost:0"  # a free port: two runs never collide
        args.local_addr = args.local_addr or "localhost"
    config, _, _ = config_from_args(args)
    chosen = any(option.lstrip("-").startswith("signals") for option in request.torchrun_options)
    signals = [name.strip() for name in config.signals_to_handle.split(",")] if chosen else list(SIGNALS)
    config.signals_to_handle = ""  # see _Stop
    return config, signals, int(getattr(config, "shutdown_timeout", None) or SHUTDOWN_SECONDS)


def _refuse(message: str) -> NoReturn:
    raise ConfigError("C16", f"torchrun's options: {message}", where="command line", fix="see `torchrun --help`")


def _option_names(options: Sequence[str]) -> set[str]:
    return {option.partition("=")[0].lstrip("-").replace("_", "-") for option in options if option.startswith("-")}


def _report_first(endings: Sequence[WorkerEnding], codes: dict[int, int]) -> int:
    """Prints the root cause among the workers' ends and returns its exit code.

    A worker's own error comes before a worker that was killed, because torch's agent kills those that hang once another
    failed; then come errors that only say that a peer is gone, and last the workers that stopped when asked to.

    Args:
        endings: what the workers left.
        codes: exit codes by global rank as the agent saw them, negative for a signal.
    """
    ended = [ending for ending in endings if ending.ended is not None and ending.exit_code != ExitCode.DONE]
    own = [e for e in ended if not e.is_echo and e.exit_code not in (ExitCode.STOPPED, ExitCode.INTERRUPTED)]
    told = {ending.rank for ending in ended}
    lost = {rank: code for rank, code in codes.items() if rank not in told and code != -signal.SIGTERM}
    rest = [ending for ending in ended if ending not in own]
    if not own and lost:
        rank, code = next(iter(sorted(lost.items(), key=lambda item: item[1] == -signal.SIGKILL, reverse=True)))
        ending = describe(_lost(rank, code))
        print_text(ending.text)
        return ending.exit_code
    ordered = sorted(own, key=lambda e: e.ended or 0.0) or sorted(rest, key=lambda e: (not e.is_echo, e.ended or 0.0))
    if not ordered:  # all were ended by the agent without a word
        ending = describe(WorkerLost("R08", "the workers were ended from outside"))
        print_text(ending.text)
        return ending.exit_code
    print_text(f"rank {ordered[0].rank}: {ordered[0].text}" if ordered[0].id == "BUG" else ordered[0].text)
    return ordered[0].exit_code


def _lost(rank: int, code: int) -> WorkerLost:
    if code >= 0:
        return WorkerLost(
            "R08", f"rank {rank} ended with code {code} and left no message", fix="run again with --debug"
        )
    name = signal.Signals(-code).name
    often = "; often the system ran out of memory" if -code == signal.SIGKILL else ""
    return WorkerLost(
        "R08",
        f"rank {rank} was killed (signal {-code}, {name}{often})",
        fix="see the system's log (dmesg) for the cause; run again with resume_from_checkpoint=true to go on",
    )


def _stopped(stop: _Stop, folder: Path, timeout: int) -> int:
    """Prints how a run that a signal asked to stop ended, and returns its exit code."""
    assert stop.first is not None
    if stop.interrupted:
        ending = describe(KeyboardInterrupt())
        print_text(ending.text)
        return ending.exit_code
    endings = worker.read_endings(folder)
    ended = [ending for ending in endings if ending.ended is not None]
    if len(ended) < len(endings):
        silent = next(ending.rank for ending in endings if ending.ended is None)
        ending = describe(WorkerLost("R10", f"rank {silent} did not stop within {timeout} s and was killed"))
        print_text(ending.text)
        return ending.exit_code
    if ended and all(ending.exit_code == ExitCode.DONE for ending in ended):
        return ExitCode.DONE
    if not [ending for ending in ended if ending.exit_code != ExitCode.DONE]:
        print_text(f"stopped by {stop.first.name} before the workers had started      (exit 75)")
        return ExitCode.STOPPED
    return _report_first(ended, {})


def _children() -> Iterator[int]:
    """Processes that this one started and that still run (Linux; elsewhere none are known this way)."""
    tasks = Path("/proc/self/task")
    for listing in tasks.glob("*/children") if tasks.is_dir() else ():
        yield from (int(pid) for pid in listing.read_text().split())
