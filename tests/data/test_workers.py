import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import active_children
from threading import Thread

import pytest

from torchmask.data.rows import RowError
from torchmask.data.workers import in_threads, in_workers
from torchmask.errors import ConfigError, ConfigProblems, DataError, WorkerLost


def square(x):
    time.sleep(0.02 if x % 3 == 0 else 0)  # later tasks end first
    return x * x


def fail_at_5(x):
    if x == 5:
        raise RowError("D01", "malformed", "bad", where="a.jsonl:5", fix="mend it", excerpt="5 | x")
    return x


def die_at_5(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_tasks(num_workers):
    assert list(in_workers(square, range(20), num_workers=num_workers)) == [x * x for x in range(20)]


def test_functions_need_not_be_picklable_where_workers_are_forked():
    offset = 3
    assert list(in_workers(lambda x: x + offset, range(5), num_workers=2, start_method="fork")) == [3, 4, 5, 6, 7]


def test_spawned_workers_do_the_same():
    assert list(in_workers(str.upper, ["a", "b", "c"], num_workers=2, start_method="spawn")) == ["A", "B", "C"]


def test_what_cannot_be_sent_to_a_spawned_worker_is_refused():
    with pytest.raises(ConfigError, match="num_workers=1"):
        list(in_workers(lambda x: x, range(3), num_workers=1, start_method="spawn"))
    assert not active_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_comes_whole_and_after_the_results_before_it(num_workers):
    seen = []
    with pytest.raises(RowError) as caught:
        seen.extend(x for x in iterate_into(seen, in_workers(fail_at_5, range(100), num_workers=num_workers)))
    assert seen == [0, 1, 2, 3, 4]
    error = caught.value
    assert (error.id, error.cause, error.where, error.fix, error.excerpt) == (
        "D01", "malformed", "a.jsonl:5", "mend it", "5 | x")  # fmt: skip
    assert not active_children()


def iterate_into(seen, results):
    for result in results:
        seen.append(result)
    return []


def test_a_killed_worker_is_told_of_and_nothing_hangs():
    with pytest.raises(WorkerLost, match="was killed") as caught:
        list(in_workers(die_at_5, range(1000), num_workers=2))
    assert caught.value.id == "D19" and not active_children()


def test_an_endless_iterable_is_taken_from_as_needed():
    def tasks():
        x = 0
        while True:
            taken.append(x)
            yield x
            x += 1

    taken = []
    results = in_workers(square, tasks(), num_workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(taken) <= 3 + 4 and not active_children()


def test_an_error_of_the_iterable_ends_the_workers():
    def tasks():
        yield 1
        raise DataError("D01", "the file broke off")

    with pytest.raises(DataError, match="broke off"):
        list(in_workers(square, tasks(), num_workers=2))
    assert not active_children()


def test_threads_keep_order_and_errors():
    assert list(in_threads(square, range(20))) == [x * x for x in range(20)]
    with pytest.raises(RowError, match="bad"):
        list(in_threads(fail_at_5, range(100)))


def test_ctrl_c_ends_workers_without_their_tracebacks():
    code = """
        import sys, time
        from torchmask.data.workers import in_workers
        def slow(x):
            time.sleep(30)
        try:
            print("ready", flush=True)
            list(in_workers(slow, range(8), num_workers=2))
        except KeyboardInterrupt:
            print("stopped", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdout.readline()
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=10)
    assert out == "stopped\n" and err == "" and process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_workers_end_with_a_process_that_is_killed(where):
    code = """
        import os, sys, threading, time
        from torchmask.data.workers import in_workers
        def number(x):
            if x > 1:
                time.sleep(30)
            return os.getpid()
        def work():
            for pid in in_workers(number, range(8), num_workers=1):
                print(pid, flush=True)
        if sys.argv[1] == "main thread":
            work()
        else:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), where], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=10)  # the worker has our pipe, so this waits for its end, too
    assert worker != process.pid


def test_workers_outlive_the_thread_that_started_them():
    results = in_workers(square, range(8), num_workers=1)
    first = []
    thread = Thread(target=lambda: first.append(next(results)))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert first + list(results) == [x * x for x in range(8)]


@pytest.mark.parametrize(
    "error",
    [
        DataError("D01", "m", where="w", fix="f", excerpt="e"),
        RowError("D01", "cause", "m", where="w"),
        ConfigProblems([ConfigError("C01", "one"), ConfigError("C02", "two", where="k")]),
    ],
)
def test_errors_survive_the_way_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert {k: v for k, v in vars(again).items() if k != "problems"} == {
        k: v for k, v in vars(error).items() if k != "problems"
    }
    if isinstance(error, ConfigProblems):
        assert [str(p) for p in again.problems] == [str(p) for p in error.problems]
