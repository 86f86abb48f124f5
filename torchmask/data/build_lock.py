"""One process builds what several need: a lock of the operating system, and word of what went wrong.

The system gives the lock of a process that dies to the next one, which then builds. That holds only while no other
process has the lock's file open from before a fork, so forked children close it at once. A lock that is held although
the process that took it is gone is taken over. Where the file system knows no locks, two processes may do the same
work; the entry of the last one stays, and both are whole.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchmask.errors import ConfigError, DataError, EnvironmentFault, TorchmaskError, WorkerLost

_log = logging.getLogger("torchmask.cache")
_KINDS: dict[str, type[TorchmaskError]] = {
    kind.__name__: kind for kind in (ConfigError, DataError, EnvironmentFault, WorkerLost)
}
_descriptors: set[int] = set()  # of the locks that this process holds


@contextmanager
def build_lock(folder: Path, wait_seconds: float) -> Iterator[float]:
    """Holds the lock of what is built at `folder`; gives the time at which waiting for it began.

    Raises:
        EnvironmentFault: R10, another process, which lives, holds it for longer than `wait_seconds`.
    """
    since = time.time()
    descriptor = _take(folder, wait_seconds)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {_machine()}".encode(), 0)
        yield since
    finally:
        if descriptor in _descriptors:  # not in a child that was forked meanwhile
            os.ftruncate(descriptor, 0)
            _close(descriptor)


def _take(folder: Path, wait_seconds: float) -> int:
    """The descriptor of the lock's file, locked."""
    path = folder.with_name(f"{folder.name}.lock")
    began, told = time.monotonic(), False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _descriptors.add(descriptor)
        try:
            if _lock(descriptor, folder):
                if _is_at(descriptor, path):
                    return descriptor
                _close(descriptor)  # another process took the lock over from a dead one
                continue
            text = os.pread(descriptor, 500, 0).decode(errors="replace")
            holder = text.split("\n")[0] or "another process"
            if _is_gone(text):
                if _is_at(descriptor, path):
                    _log.warning("%s, which built %s, is gone: its lock is taken over", holder, folder)
                    path.unlink(missing_ok=True)
                _close(descriptor)
                continue
            waited = time.monotonic() - began
            if waited > wait_seconds:
                message = f"waited {waited:.0f} s for {holder}, which builds this data"
                fix = "run `torchmask data build` beforehand, or end that process if it hangs"
                raise EnvironmentFault("R10", message, where=str(folder), fix=fix)
            if not told and waited > 1:
                told = True
                _log.warning("waiting for %s, which tokenises the same data (%s)", holder, folder)
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
        time.sleep(0.05)


def _lock(descriptor: int, folder: Path) -> bool:
    """Whether the lock is ours now, or cannot be anybody's."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("no locks in %s (%s): other processes may build the same data", folder.parent, error)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_gone(text: str) -> bool:
    """Whether a lock's text names a process of this machine that no longer exists."""
    match = re.match(r"process (\d+) on ", text)
    if match is None or text[match.end() :] != _machine():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    with suppress(OSError):  # on Linux a process that nobody has waited for still has its number
        return Path(f"/proc/{match[1]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _machine() -> str:
    """Where process numbers mean the same: the machine, and on Linux its container."""
    container = ""
    with suppress(OSError):
        container = os.readlink("/proc/self/ns/pid")
    return f"{os.uname().nodename}\n{container}"


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _close_inherited() -> None:
    """In a forked child: a worker that outlived its parent would go on holding the parent's lock."""
    for descriptor in tuple(_descriptors):
        _close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def leave_failure(note: Path, error: TorchmaskError) -> None:
    """Tells the processes that wait what went wrong, so that they need not find out again."""
    values = {k: getattr(error, k) for k in ("id", "message", "where", "fix", "excerpt")}
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "DataError")
    with suppress(OSError):
        note.write_text(json.dumps({"kind": kind, "time": time.time(), **values}), encoding="utf-8")


def failure_since(note: Path, began: float) -> TorchmaskError | None:
    """The error that another process left after the time `began`."""
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        if said.pop("time") < began:
            return None
        kind = _KINDS[said.pop("kind")]
        return kind(said.pop("id"), said.pop("message"), **said)
    except (OSError, ValueError, KeyError, TypeError):
        return None
