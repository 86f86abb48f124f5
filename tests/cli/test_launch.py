"""`torchmask run --nproc-per-node 2`: one root cause, its exit code, and stopping on request; two gloo processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from torchmask.cli.launch import _report_first
from torchmask.cli.run import _end_that_would_repeat
from torchmask.cli.worker import WorkerEnding, leave_ending, leave_start

RECIPE = '''
"""A distributed recipe for tests."""
import os
import signal
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from torchmask.errors import DataError, StopRequested


@dataclass(frozen=True, kw_only=True)
class Config:
    mode: str = "ok"  # what happens


def main(cfg: Config) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stops = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if cfg.mode == "deaf" else lambda n, frame: stops.append(n))
    with open(f"started-{rank}", "w") as file:
        file.write(str(os.getpid()))
    if rank == 1 and cfg.mode == "data":
        raise DataError("D01", "row 7 is broken", where="train.jsonl:7")
    if rank == 1 and cfg.mode == "bug":
        raise KeyError("oops")
    if rank == 1 and (cfg.mode == "kill" or cfg.mode == "restart" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    while cfg.mode in ("loop", "data", "bug", "kill", "deaf"):
        flag = torch.tensor([float(len(stops))])
        dist.all_reduce(flag)
        if flag.item():
            time.sleep(0.5 * (1 - rank))  # rank 0 takes longer to save
            open(f"saved-{rank}", "w").close()
            dist.barrier()
            dist.destroy_process_group()
            raise StopRequested("R03", "stopped at step 3, saved")
        time.sleep(0.02)
    total = torch.ones(1)
    dist.all_reduce(total)
    line = f"rank {rank} of {int(total.item())} threads {os.environ['OMP_NUM_THREADS']}\\n"
    os.write(1, line.encode())  # in one piece, whatever the other rank writes
    dist.barrier()
    dist.destroy_process_group()
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "my.yaml").write_text("mode: ok\n")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    started = []

    def start(*words, options=("--nproc-per-node", "2")):
        command = [sys.executable, "-m", "torchmask", "run", *options, "recipe.py", "--config", "my.yaml", *words]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
    for pid in _pids(tmp_path):
        assert not _runs(pid), "a worker was left behind"


def _pids(folder):
    return [int(path.read_text()) for path in folder.glob("started-*") if path.read_text()]


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until_started(folder, process):
    deadline = time.monotonic() + 60
    while len(_pids(folder)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.3)


def test_both_ranks_run_with_the_cores_shared_out(run):
    process = run()
    output, error = process.communicate(timeout=90)
    assert process.returncode == 0, error
    assert "rank 0 of 2" in output and "rank 1 of 2" in output
    assert f"threads {max(1, len(os.sched_getaffinity(0)) // 2)}" in output
    assert error == ""


def test_an_error_on_one_rank_is_printed_once_with_its_exit_code(run):
    process = run("mode=data")
    _, error = process.communicate(timeout=90)
    assert process.returncode == 3
    assert error.count("row 7 is broken") == 1 and error.startswith("error[D01] train.jsonl:7")
    assert len(error.splitlines()) < 15 and "Traceback" not in error


@pytest.mark.slow
def test_a_bug_on_one_rank_names_the_rank_and_shows_its_traceback(run):
    process = run("mode=bug")
    _, error = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rank 1: error[BUG] KeyError: 'oops'" in error and error.count("Traceback") == 1


def test_a_killed_rank_is_named(run):
    process = run("mode=kill")
    _, error = process.communicate(timeout=90)
    assert process.returncode == 8
    assert "error[R08] rank 1 was killed (signal 9, SIGKILL" in error


@pytest.mark.slow
def test_a_killed_rank_is_started_again_with_max_restarts(run):
    process = run("mode=restart", options=("--nproc-per-node", "2", "--max-restarts", "1"))
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "rank 1 of 2" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_is_forwarded_and_all_ranks_save(run, tmp_path, number):
    process = run("mode=loop")
    _wait_until_started(tmp_path, process)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # a second request to stop does not cut the saving short
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert error.count("stopped at step 3, saved") == 1 and "Traceback" not in error


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(run, tmp_path):
    process = run("mode=deaf")
    _wait_until_started(tmp_path, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert "stopped at once" in error


def test_a_bad_configuration_starts_no_worker(run):
    process = run("mod=x")
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "did you mean 'mode'?" in error and error.count("error[") == 1


def test_a_bad_launcher_option_is_a_usage_error(run):
    process = run(options=("--nproc-per-node", "2", "--nonsense", "3"))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error[C16]" in error and "--nonsense" in error


def ending(rank, code, text, *, ended=1.0, is_echo=False, id="X"):
    return WorkerEnding(rank, 1, 0, ended, code, id, text, is_echo)


@pytest.mark.parametrize(
    ("endings", "codes", "exit_code", "words"),
    [
        ([ending(0, 8, "peer gone", ended=1, is_echo=True), ending(1, 3, "broken row", ended=2)], {}, 3, "broken row"),
        ([ending(0, 1, "late", ended=2), ending(1, 5, "nan", ended=1)], {}, 5, "nan"),
        ([ending(0, 8, "peer gone", is_echo=True)], {0: 8, 1: -9}, 8, "rank 1 was killed"),
        ([ending(0, 1, "bug"), ending(1, 0, "", ended=None)], {0: 1, 1: -9}, 1, "bug"),
        ([ending(0, 75, "saved", ended=1), ending(1, 8, "peer gone", is_echo=True)], {}, 8, "peer gone"),
        ([ending(0, 75, "saved"), ending(1, 75, "saved")], {}, 75, "saved"),
        ([], {0: 1, 1: -15}, 8, "rank 0 ended with code 1 and left no message"),
    ],
)
def test_the_root_cause_is_chosen_among_the_ends(capsys, endings, codes, exit_code, words):
    assert _report_first(endings, codes) == exit_code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "restarts"),
    [((75, 75), False), ((75, 8), True), ((8, None), True), ((3, 8), False), ((1, 8), True), ((130, 130), False)],
)
def test_a_restart_that_could_only_repeat_the_end_does_not_run_the_recipe(tmp_path, monkeypatch, codes, restarts):
    monkeypatch.setenv("TORCHMASK_LAUNCH_DIR", str(tmp_path))
    for rank, code in enumerate(codes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        leave_start() if code is None else leave_ending(code, "X", "text")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    leave_start()  # the other worker of the new attempt was faster
    assert (_end_that_would_repeat() is None) == restarts
