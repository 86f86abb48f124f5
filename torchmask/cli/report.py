"""How a command ends: the exit code and the text of an error.

A worker of a distributed run prints nothing: it leaves what it would have printed in a file, and the launcher prints
the one that came first (see `torchmask.cli.launch`).
"""

import contextlib
import errno
import sys
import traceback
from dataclasses import dataclass

from torchmask.cli import worker
from torchmask.constants import ExitCode
from torchmask.errors import ConfigProblems, EnvironmentFault, OutOfMemory, TorchmaskError, WorkerLost

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "timed out after",
    "NCCL communicator was aborted",
    "remote process exited",
)
_MEMORY_TEXTS = ("can't allocate memory", "DefaultCPUAllocator", "out of memory")


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Args:
        exit_code: for the shell.
        id: of the error, or `BUG`.
        text: for stderr; empty if there is nothing to say.
        is_echo: the error only says that another process of the run is gone.
    """

    exit_code: int
    id: str
    text: str
    is_echo: bool = False


def report(error: BaseException, *, debug: bool = False, trains: bool = True) -> int:
    """Prints how a command ended (a worker leaves it to its launcher) and returns the exit code."""
    ending = describe(error, debug=debug, trains=trains)
    if worker.is_worker():
        worker.leave_ending(ending.exit_code, ending.id, ending.text, is_echo=ending.is_echo)
    elif ending.text:
        print_text(ending.text)
    return ending.exit_code


def print_text(text: str) -> None:
    """Writes a text to stderr; a closed stderr is nobody's error."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        print(text, file=sys.stderr, flush=True)


def describe(error: BaseException, *, debug: bool = False, trains: bool = True) -> Ending:
    """The exit code and the text of an exception.

    Args:
        error: what was raised.
        debug: with its trace.
        trains: the command is one that trains, and has checkpoints to speak of.
    """
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return Ending(code, "", str(error.code) if isinstance(error.code, str) else "")
    if isinstance(error, BrokenPipeError):
        return Ending(ExitCode.DONE, "", "")
    if isinstance(error, KeyboardInterrupt):
        what = "the last checkpoint stands" if trains else "what was under way is not done"
        return Ending(ExitCode.INTERRUPTED, "R06", f"stopped at once; {what}      (exit 130)")
    trace = "".join(traceback.format_exception(error)) if debug else ""
    known = error if isinstance(error, TorchmaskError) else _translate(error)
    if known is None:
        trace = "".join(traceback.format_exception(error))
        text = (
            f"error[BUG] {type(error).__name__}: {error}\n{trace.rstrip()}\n  this is a bug in torchmask, or in code "
        )
        return Ending(ExitCode.BUG, "BUG", text + "of your own that it called; please report it      (exit 1)")
    is_echo = isinstance(known, WorkerLost) and known is not error
    return Ending(int(known.exit_code), known.id, trace + format_error(known), is_echo)


def format_error(error: TorchmaskError) -> str:
    """The text of an error in the form that docs/errors.md explains.

    >>> from torchmask.errors import DataError
    >>> print(format_error(DataError("D05", "the file is empty", where="train.jsonl", fix="add rows")))
    error[D05] train.jsonl: the file is empty
      fix: add rows
      more: docs/errors.md#d05      (exit 3)
    """
    problems = error.problems if isinstance(error, ConfigProblems) else [error]
    lines = [f"error[{problem.id}] {problem}" for problem in problems]
    anchors = " ".join(f"#{id}" for id in sorted({problem.id.lower() for problem in problems}))
    several = f", {len(problems)} problems" if len(problems) > 1 else ""
    return "\n".join([*lines, f"  more: docs/errors.md{anchors}      (exit {int(error.exit_code)}{several})"])


def _translate(error: BaseException) -> TorchmaskError | None:
    """The error of ours that an exception of Python, torch or the system amounts to, or None: a bug."""
    text = str(error)
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return out_of_memory(text)
    if isinstance(error, RuntimeError) and any(part in text for part in _MEMORY_TEXTS):
        return out_of_memory(text)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        where = str(error.filename) if error.filename else None
        fix = "free some space or choose another output_dir; checkpoints written before are whole"
        return EnvironmentFault("R21", f"cannot write: {error.strerror}", where=where, fix=fix)
    if isinstance(error, OSError) and error.errno in _NOT_ALLOWED:
        where = str(error.filename) if error.filename else None
        return EnvironmentFault(
            "R22", str(error.strerror), where=where, fix="check the owner and the rights of the path"
        )
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        fix = "leave --master-port and --rdzv-endpoint out (a free port is chosen), or name another port"
        return EnvironmentFault("R15", f"the port is taken: {text.splitlines()[0]}", fix=fix)
    is_distributed = "torch.distributed" in type(error).__module__ or name.startswith("Dist") or "gloo" in text
    if isinstance(error, RuntimeError) and (is_distributed or any(part in text for part in _PEER_IS_GONE)):
        first = text.strip().splitlines()[0] if text.strip() else name
        return WorkerLost("R08", f"another process of this run is gone or does not answer: {first}")
    return None


def out_of_memory(text: str) -> OutOfMemory:
    """The error for memory that ran out, with what to change, the cheapest first."""
    first = text.strip().splitlines()[0][:200] if text.strip() else "no memory left"
    return OutOfMemory(
        "R12",
        first,
        fix="in this order: a smaller batch_size with a larger gradient_accumulation_steps; "
        "enable_activation_checkpointing=true; a smaller packing.max_seq_len; dtype=bf16; "
        "more devices (--nproc-per-node), which share the optimizer's state",
    )
