import importlib.util
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

from torchmask.errors import EnvironmentFault
from torchmask.training.metric_loggers import MLflowLogger, TensorBoardLogger, WandBLogger
from torchmask.training.metrics import MetricsLog, peak_memory_gib, read_metrics, token_rates


class Recorder:
    def __init__(self, *, fails_from=None):
        self.rows, self.closed, self.fails_from = [], False, fails_from

    def log(self, step, values):
        if self.fails_from is not None and step >= self.fails_from:
            raise ConnectionError("the service is down")
        self.rows.append((step, dict(values)))

    def close(self):
        self.closed = True


def write_steps(folder, steps, **options):
    log = MetricsLog(folder, **options)
    for step in steps:
        log.log(step, loss=1.0 / step, lr=1e-3)
    log.close()


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_one_json_object_and_is_there_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(1, loss=2.5, lr=1e-3, grad_norm=0.5)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 2.5, "lr": 0.001, "grad_norm": 0.5}\n'


def test_fp32_losses_are_recovered_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    losses = torch.rand(500) * torch.logspace(-30, 30, 500)
    log = MetricsLog(tmp_path)
    for step, loss in enumerate(losses, 1):
        log.log(step, loss=loss)
    read = [row["loss"] for row in read_metrics(log.path)]
    assert np.array_equal(np.array(read, np.float32), losses.numpy())


def test_numbers_that_are_not_finite_become_null_and_stay_readable_in_the_log(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(1, loss=math.nan, grad_norm=math.inf, val_loss=None)
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}
    assert "loss nan  grad_norm inf" in (tmp_path / "logs/train.log").read_text()


def test_the_text_log_has_one_line_a_step(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    lines = (tmp_path / "logs/train.log").read_text().splitlines()
    assert [line.split("  ")[0][-6:] for line in lines] == ["step 1", "step 2", "step 3"]
    assert lines[1].endswith("loss 0.5000  lr 1.00e-03")


def test_a_resumed_run_moves_later_steps_aside_and_repeats_none(tmp_path):
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 11), resume_step=4)
    assert steps_in(tmp_path / "metrics.jsonl") == list(range(1, 11))
    assert steps_in(tmp_path / "metrics.stale.jsonl") == [5, 6, 7]
    write_steps(tmp_path, range(9, 12), resume_step=8)
    assert steps_in(tmp_path / "metrics.stale.jsonl") == [5, 6, 7, 9, 10]


def test_half_a_line_is_dropped_on_resume(tmp_path):
    write_steps(tmp_path, [1, 2])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + b'{"step": 3, "lo')
    write_steps(tmp_path, [3], resume_step=2)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert not (tmp_path / "metrics.stale.jsonl").exists()


def test_half_a_line_that_happens_to_be_whole_json_is_written_again(tmp_path):
    # Killed between the last brace and the end of the line: the next line must not stick to it.
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    write_steps(tmp_path, [2], resume_step=1)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_reading_leaves_out_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


def test_an_untouched_file_is_not_rewritten(tmp_path):
    write_steps(tmp_path, [1, 2])
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    write_steps(tmp_path, [3], resume_step=2)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFault, match="metrics cannot be written"):
        MetricsLog(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full")
def test_a_full_disk_while_logging_is_an_environment_fault(tmp_path):
    log = MetricsLog(tmp_path)
    log._metrics.close()
    log._metrics = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(EnvironmentFault, match="No space left") as caught:
        log.log(1, loss=1.0)
    assert caught.value.id == "K02"


def test_loggers_get_every_step_and_are_closed(tmp_path):
    recorder = Recorder()
    write_steps(tmp_path, [1, 2], loggers=[recorder])
    assert recorder.rows == [(1, {"loss": 1.0, "lr": 1e-3}), (2, {"loss": 0.5, "lr": 1e-3})]
    assert recorder.closed


def test_a_logger_that_fails_is_named_once_and_the_run_goes_on(tmp_path):
    broken, good, warnings = Recorder(fails_from=2), Recorder(), []
    write_steps(tmp_path, [1, 2, 3], loggers=[broken, good], warn=warnings.append)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert len(warnings) == 1 and "Recorder failed" in warnings[0] and "the service is down" in warnings[0]


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda: TensorBoardLogger("unused")),
        ("wandb", lambda: WandBLogger(project="p")),
        ("mlflow", MLflowLogger),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, make):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(EnvironmentFault) as caught:
        make()
    assert caught.value.id == "R16"
    assert f'pip install "torchmask[{package}]"' in str(caught.value)


def test_tensorboard_files_hold_the_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, [1, 2], loggers=[TensorBoardLogger(tmp_path / "tensorboard")])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]


class FakeWandB(types.ModuleType):
    """Stands for the package: records what reaches it, or refuses to start."""

    def __init__(self, error=None):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
        self.error, self.options, self.rows = error, None, []

    def init(self, **options):
        if self.error:
            raise self.error
        self.options = options
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.rows.append("finished")


def test_wandb_gets_rows_under_their_step_and_no_code(tmp_path, monkeypatch):
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_steps(tmp_path, [1], loggers=[WandBLogger("mine", mode="offline")])
    assert wandb.rows == [(1, {"loss": 1.0, "lr": 1e-3}), "finished"]
    assert wandb.options["project"] == "mine" and wandb.options["save_code"] is False


def test_wandb_that_does_not_start_is_said_with_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandB(RuntimeError("no API key")))
    with pytest.raises(EnvironmentFault, match="no API key") as caught:
        WandBLogger("mine")
    assert "wandb login" in str(caught.value) and "mode=offline" in str(caught.value)


def test_token_rates_count_padding_apart():
    rates = token_rates(num_tokens=600, num_trained_tokens=60, num_slots=800, seconds=3.0, world_size=2)
    assert rates == {
        "tokens_per_second_per_gpu": 100.0,
        "trained_tokens_per_second_per_gpu": 10.0,
        "padding_share": 0.25,
    }


def test_peak_memory_is_that_of_this_process():
    before = peak_memory_gib()
    block = torch.ones(64 * 2**20)  # 256 MiB, touched
    assert 0.05 < before < peak_memory_gib() < 64
    assert peak_memory_gib() * 2**30 >= block.numel() * 4


def test_importing_the_metrics_imports_no_logger():
    # The packages are looked for when a logger is made, not when torchmask is imported.
    import subprocess

    code = "import torchmask.training.metrics, sys; print({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
