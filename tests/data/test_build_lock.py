import fcntl
import os
import subprocess
import sys
import textwrap
import time

import pytest

from torchmask.data.build_lock import build_lock, failure_since, leave_failure
from torchmask.data.cache import cached_arrays
from torchmask.errors import EnvironmentFault, StopRequested, WorkerLost


def own_text(folder):
    """What a holder of the lock writes into it."""
    with build_lock(folder, 1):
        return folder.with_name(f"{folder.name}.lock").read_text()


def number_of_a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    code = """
        import os, sys, time
        from pathlib import Path
        from torchmask.data.build_lock import build_lock
        with build_lock(Path(sys.argv[1]), 1):
            child = os.fork()
            if child == 0:
                sys.stdout.close()
                os.close(1)
                time.sleep(30)
                os._exit(0)
            print(child, flush=True)
            os._exit(0)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "entry")]
    child = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    try:
        path = tmp_path / "entry.lock"
        path.write_text("")  # nobody says who holds it
        with build_lock(tmp_path / "entry", 0.5):
            os.kill(child, 0)  # it lives
    finally:
        os.kill(child, 9)


def test_a_lock_is_taken_over_from_a_process_that_is_gone(tmp_path, caplog):
    folder = tmp_path / "entry"
    path = tmp_path / "entry.lock"
    text = own_text(folder)
    with open(path, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as one of its children would hold it
        held.write(text.replace(str(os.getpid()), str(number_of_a_dead_process())))
        held.flush()
        with build_lock(folder, 1):
            assert "is gone" in caplog.text and path.read_text() == text
            with pytest.raises(EnvironmentFault, match=f"process {os.getpid()} on "), build_lock(folder, 0.1):
                pass
    with build_lock(folder, 1):
        pass


@pytest.mark.parametrize("where", ["other machine", "other container"])
def test_process_numbers_of_other_machines_prove_nothing(tmp_path, where):
    folder = tmp_path / "entry"
    text = own_text(folder).replace(str(os.getpid()), str(number_of_a_dead_process()))
    text = text.replace(os.uname().nodename, "elsewhere") if where == "other machine" else text + "2"
    with open(tmp_path / "entry.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(text)
        held.flush()
        with pytest.raises(EnvironmentFault, match="waited"), build_lock(folder, 0.2):
            pass


def test_a_stop_that_was_asked_for_is_no_error_of_those_who_wait(tmp_path):
    def stopped():
        raise StopRequested("R04", "stopped by SIGTERM")

    with pytest.raises(StopRequested):
        cached_arrays(stopped, {"kind": "test"}, root=tmp_path)
    assert not list(tmp_path.rglob("*.failed"))


def test_the_class_of_an_error_comes_to_those_who_wait(tmp_path):
    began = time.time()
    leave_failure(tmp_path / "note", WorkerLost("D19", "killed", fix="fewer"))
    error = failure_since(tmp_path / "note", began)
    assert type(error) is WorkerLost and (error.id, error.message, error.fix) == ("D19", "killed", "fewer")
    assert failure_since(tmp_path / "note", time.time() + 1) is None
