"""Taking an output folder, signals, random states."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from torchmask.training.run import choose_device, start_run
from torchmask.training.seed import rng_state, seed_everything, set_rng_state
from torchmask.training.stop import StopFlag, catch_signals


def test_a_folder_with_another_runs_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"already holds a run \(step-00000004\)") as caught, start_run(tmp_path):
        pass
    assert caught.value.exit_code == 2
    with start_run(tmp_path, resume=True):
        pass


def test_two_runs_cannot_share_a_folder(tmp_path):
    with start_run(tmp_path):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on ") as caught, start_run(tmp_path):
            pass
        assert caught.value.exit_code == 2
        assert (tmp_path / ".lock").exists(), "the second run took the first one's lock away"


def test_the_lock_of_a_dead_process_is_taken_over_and_released_at_the_end(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on this machine\n")  # a live pid, but nobody holds the file
    with start_run(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert not (tmp_path / ".lock").exists()


def test_an_output_folder_that_is_a_file_is_an_environment_fault(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="cannot be written") as caught, start_run(tmp_path / "out"):
        pass
    assert caught.value.exit_code == 7


def test_a_signal_before_training_ends_the_run_as_resumable(tmp_path):
    with pytest.raises(ValueError, match="before training") as caught, start_run(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 75
    assert not (tmp_path / ".lock").exists()


def test_while_training_the_first_ctrl_c_waits_and_the_second_does_not():
    flag = StopFlag()
    flag.deferred = True
    with catch_signals(flag):
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.is_set
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_after_training_a_signal_that_came_before_is_honoured():
    flag = StopFlag()
    flag.deferred = True
    with catch_signals(flag):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ValueError, match="SIGTERM after training") as caught:
            flag.end_deferral()
    assert caught.value.exit_code == 75


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals(StopFlag()):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_random_states_come_back(tmp_path):
    seed_everything(3)
    random.gauss(0, 1), np.random.standard_normal()  # leave a cached second value in both
    state = rng_state()

    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_ranks_draw_different_numbers():
    draws = []
    for rank in range(2):
        seed_everything(0, rank=rank)
        draws.append(torch.rand(4))
    assert not draws[0].equal(draws[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_environment_fault():
    with pytest.raises(ValueError, match="no CUDA device") as caught:
        choose_device("cuda")
    assert caught.value.exit_code == 7
    assert choose_device("auto").type == "cpu"
