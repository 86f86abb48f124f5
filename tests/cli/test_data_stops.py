"""`torchmask data build` with workers, stopped from outside: nothing stays behind that hinders the next one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchmask.config.built_in import built_in_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")

PARTS = """
import os, time
from torchmask.data import Sample, Samples
from torchmask.data.cache import cached
from torchmask.data.workers import in_workers

HOLD = os.path.join(os.path.dirname(__file__), "hold")

def one(i):
    while os.path.exists(HOLD):
        time.sleep(0.01)
    return Sample([1, i + 3, 2], [1, 0, 0])

@cached
def slow_dataset(tokenizer, *, source: str, num_workers: int = 0, cache: bool | str = False):
    return Samples.from_samples(list(in_workers(one, range(20), num_workers=num_workers)))
"""
CONFIG = """\
# finetune: a test
output_dir: {folder}/out
model: {{_component_: torchmask.models.from_pretrained, folder: {base}}}
tokenizer: {{_component_: torchmask.tokenizers.from_pretrained, folder: {base}}}
dataset: {{_component_: slow_parts.slow_dataset, source: {folder}/rows.jsonl, num_workers: 2}}
packing: {{max_seq_len: 64}}
"""


@pytest.fixture
def start(tmp_path):
    """Starts `torchmask VERB` with a data set whose workers wait while the file `hold` is there."""
    (tmp_path / "slow_parts.py").write_text(PARTS)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "hold").touch()
    base = built_in_folder("configs") / "tiny" / "base"
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path, base=base))
    environment = {**os.environ, "TORCHMASK_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def start(*verb):
        command = [sys.executable, "-m", "torchmask", *verb, "--config", str(tmp_path / "c.yaml")]
        return subprocess.Popen(
            [*command, "--trust", "slow_parts"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


def workers_of(process, count=2):
    """The numbers of a process's children, once there are so many."""
    for _ in range(1000):
        listings = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(number) for listing in listings for number in listing.read_text().split()]
        if len(children) == count:
            time.sleep(0.2)  # and at work
            return children
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("no workers")


def is_running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_ends_soon(numbers):
    deadline = time.monotonic() + 5
    while any(map(is_running, numbers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def test_a_killed_build_leaves_no_workers_and_no_lock(start, tmp_path):
    killed = start("data", "build")
    workers = workers_of(killed)
    waiting = start("data", "build")
    time.sleep(1.0)
    killed.kill()
    killed.wait(10)
    assert_ends_soon(workers)
    (tmp_path / "hold").unlink()
    out, err = waiting.communicate(timeout=20)
    assert waiting.returncode == 0 and "20 documents" in out, err


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "error[R04] stopped by SIGTERM before `torchmask data` was done"),
        (signal.SIGINT, 130, "stopped at once; what was under way is not done"),
    ],
)
def test_a_build_that_is_asked_to_stop_ends_in_good_order(start, tmp_path, number, code, said):
    asked = start("data", "build")
    workers = workers_of(asked)
    asked.send_signal(number)
    _, err = asked.communicate(timeout=10)
    assert asked.returncode == code and said in err and "Traceback" not in err and "checkpoint" not in err
    assert_ends_soon(workers)
    assert not list((tmp_path / "cache").rglob("*.failed")) and not list((tmp_path / "cache").rglob(".tmp-*"))
    (tmp_path / "hold").unlink()
    again = start("data", "build")
    assert again.wait(20) == 0, again.communicate()


def test_a_verb_that_looks_is_stopped_like_that_too(start):
    asked = start("inspect", "--json")
    workers = workers_of(asked)
    asked.send_signal(signal.SIGTERM)
    _, err = asked.communicate(timeout=10)
    assert asked.returncode == 75 and "before `torchmask inspect` was done" in err
    assert_ends_soon(workers)
