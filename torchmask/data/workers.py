"""A pure function of chunks, worked off by processes, with results and errors in the order of the chunks.

Linux forks the workers: nothing has to be pickled but rows and results, and they start at once. A worker touches
neither torch nor a device, and its tokenizer starts no threads of its own, which is what makes forking safe. Elsewhere
processes are spawned, which needs functions that can be pickled and a main module that can be imported.

Workers end with the process that started them, however it ends: they hold each other's queues open, so the end of a
queue would never tell them.
"""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from threading import Thread
from typing import Any, TypeVar

from torchmask.errors import ConfigError, WorkerLost

Task = TypeVar("Task")
Result = TypeVar("Result")

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
_WATCH_SECONDS = 0.5

_function: Callable[[Any], Any]  # what a worker does; set in its own process


def in_workers(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, num_workers: int, start_method: str | None = None
) -> Iterator[Result]:
    """`map(function, tasks)` in `num_workers` processes; in this one for 0.

    Tasks are taken from their iterable as workers become free, two for each, and results come in order. An error of
    the function is raised here, as is one of the iterable, and no worker outlives the iteration.

    Raises:
        ConfigError: C13, fewer than 0 workers; C09, the function cannot be sent to a spawned process.
        WorkerLost: D19, a worker was killed.
    """
    if num_workers < 0:
        raise ConfigError("C13", f"num_workers is {num_workers}", fix="give 0 or more")
    if num_workers == 0:
        yield from map(function, tasks)
        return
    method = start_method or START_METHOD
    # Linux tells a child that the thread which forked it has ended, so another thread than the main one says too much.
    is_told = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
    pool = ProcessPoolExecutor(
        num_workers, get_context(method), initializer=_start, initargs=(function, os.getpid(), is_told)
    )
    under_way: deque[Future[Result]] = deque()
    is_done = False
    try:
        for task in tasks:
            under_way.append(pool.submit(_run, task))
            if len(under_way) >= 2 * num_workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
        is_done = True
    except BrokenProcessPool as error:
        raise WorkerLost(
            "D19",
            f"one of {num_workers} data workers was killed (signal 9 is often the system's, for want of memory)",
            fix="set num_workers lower, or to 0",
        ) from error
    except (AttributeError, TypeError, ImportError) as error:
        if method == "fork" or "pickle" not in str(error):
            raise
        message = f"num_workers={num_workers}, and the data set cannot be sent to other processes: {error}"
        raise ConfigError(
            "C09", message, fix="set num_workers: 0, or define functions at the top of a module"
        ) from error
    finally:
        processes = list((pool._processes or {}).values())
        manager: Thread | None = getattr(pool, "_executor_manager_thread", None)
        pool.shutdown(wait=is_done, cancel_futures=True)
        if not is_done:  # an error or Ctrl-C: nobody wants what they are still at
            for process in processes:
                process.kill()  # not terminate: one that has only just been forked still has our handler of SIGTERM
            if manager is not None:
                manager.join(5)  # it waits for the processes; of two who wait for one process, one is told nothing


def in_threads(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """`map(function, tasks)` in two threads, for functions that spend half of their time without Python's global lock.

    Tasks are taken from their iterable in the calling thread, as results are asked for.
    """
    under_way: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(2) as pool:
        try:
            for task in tasks:
                under_way.append(pool.submit(function, task))
                if len(under_way) > 2:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int, is_told: bool) -> None:
    global _function
    _function = function
    _end_with(parent, is_told)
    gc.freeze()  # what was inherited lives as long as the worker; looking through it again and again costs 5 %
    gc.set_threshold(50_000, 20, 20)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def _end_with(parent: int, is_told: bool) -> None:
    """Ends this process when its parent does: by a signal of Linux's, else by looking who the parent is now."""
    if is_told:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
        is_told = ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0) == 0
    if not is_told:
        Thread(target=_watch, args=(parent,), daemon=True).start()
    elif os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _run(task: Any) -> Any:
    return _function(task)
