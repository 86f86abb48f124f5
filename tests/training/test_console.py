import io
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from torchmask.training.console import Console, format_count, format_duration
from torchmask.training.loss_curve import loss_png, smoothed
from torchmask.training.run import Run
from torchmask.training.steps import StepPlan

REPORT = {"documents": 1200, "trained": 30_000, "masked": 90_000, "rows": 240, "max_seq_len": 512, "fill": 0.9766}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def show_header(console, tmp_path, **options):
    console.header(
        model=nn.Linear(30, 40),
        packs=REPORT,
        plan=StepPlan(global_batch=16, batch_size=4, steps_per_epoch=15, num_steps=45, seed=0),
        optimizer="AdamW (fused), lr 0.001",
        run=Run(tmp_path / "out", torch.device("cpu"), world_size=2),
        weights="base",
        schedule="cosine over 45 steps",
        **options,
    )


def run_steps(console, num_steps, *, val_at=()):
    for step in console.track(range(num_steps), num_steps):
        values = {"loss": 1.0 / (step + 1), "lr": 1e-3, "tokens_per_second_per_gpu": 12345.6}
        if step + 1 in val_at:
            values["val_loss"] = 0.5
        console.step(step + 1, values)


def write_run(folder, num_steps=30):
    rows = [
        {
            "step": i,
            "loss": 3.0 / i,
            "lr": 1e-3 / i,
            "tokens_per_second_per_gpu": 1000.0 + i,
            "peak_memory_gib": 0.5 + i / 100,
            **({"val_loss": 2.0 / i} if i % 10 == 0 else {}),
        }
        for i in range(1, num_steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_header_says_what_will_be_trained(tmp_path):
    out = io.StringIO()
    show_header(Console(file=out), tmp_path)
    text = out.getvalue()
    assert "1,240 parameters (1.24 K), all trained, float32, weights of base" in text
    assert "1,200 documents, 120,000 tokens an epoch, in 240 rows of 512 slots, 97.7% full" in text
    assert "30,000 tokens an epoch are targets, 25.0% of all" in text
    assert "45 (3 x 15) of 16 rows (batch_size 4 x 2 micro-batches x 2 processes), 8,192 slots" in text
    for words in ("AdamW (fused), lr 0.001", "cosine over 45 steps", "cpu, 2 processes", str(tmp_path / "out")):
        assert words in text


def test_the_header_of_a_run_without_epochs_says_what_the_recipe_says_of_its_data(tmp_path):
    out = io.StringIO()
    run = Run(tmp_path / "out", torch.device("cpu"))
    Console(file=out).header(model=nn.Linear(3, 4), optimizer="SGD", run=run, facts=[("window", "64 rows")])
    assert "  window     64 rows\n" in out.getvalue() and "epoch" not in out.getvalue()


def test_a_run_longer_than_it_was_taken_for_shows_its_steps_and_no_time_left():
    out = io.StringIO()
    console = Console(file=out)
    for step in console.track(range(6), 3):
        console.step(step + 1, {"loss": 1.0})
    assert out.getvalue().splitlines()[-1] == "step 6/3  loss 1.0000"


def test_the_header_of_a_resumed_run_says_where_it_goes_on(tmp_path):
    out = io.StringIO()
    show_header(Console(file=out), tmp_path, first_step=20)
    assert "going on after step 20" in out.getvalue()


def test_away_from_a_terminal_nothing_but_plain_lines_are_printed(tmp_path):
    out = io.StringIO()
    console = Console(file=out)
    show_header(console, tmp_path)
    run_steps(console, 100)
    write_run(tmp_path)
    console.summary(tmp_path)
    assert not CONTROL.search(out.getvalue())
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert [int(line.split("/")[0][5:]) for line in lines] == [1, *range(4, 101, 4)]
    assert lines[-1].startswith("step 100/100  loss 0.0100  lr 1.00e-03  12,346 tok/s")
    assert lines[1].endswith(" left")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_wants_no_control_codes_gets_none(terminal, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    run_steps(Console(file=terminal), 3)
    assert not CONTROL.search(terminal.getvalue()) and "step 3/3" in terminal.getvalue()


def test_the_bar_is_one_line_drawn_again_and_ended(terminal):
    run_steps(Console(file=terminal), 5)
    assert terminal.getvalue().count("\r\x1b[2K") >= 2
    assert "5/5  loss 0.2000" in terminal.getvalue() and terminal.getvalue().endswith("\n")
    assert "\x1b[?25l" not in terminal.getvalue()  # the cursor is never hidden


def test_the_bar_is_never_wider_than_the_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    run_steps(Console(file=terminal), 5)
    drawn = [re.sub(r"\x1b\[[0-9;]*[mK]", "", line) for line in terminal.getvalue().replace("\r", "\n").splitlines()]
    assert max(len(line) for line in drawn if "━" in line) < 30


def test_text_said_while_the_bar_is_up_takes_its_line(terminal):
    console = Console(file=terminal)
    for step in console.track(range(2), 2):
        if step == 1:
            console.say("[saved] step-1")
    assert "\r\x1b[2K[saved] step-1\n" in terminal.getvalue()


def test_leaving_the_console_by_an_error_ends_the_line(terminal):
    with pytest.raises(RuntimeError), Console(file=terminal) as console:
        for step in console.track(range(9), 9):
            if step == 1:
                raise RuntimeError
    assert terminal.getvalue().endswith("\n")


def test_validation_losses_are_always_shown(terminal):
    out = io.StringIO()
    run_steps(Console(file=out), 1000, val_at=(7,))
    run_steps(Console(file=terminal), 10, val_at=(7,))
    assert "step 7/1,000  loss 0.1429  val_loss 0.5000" in out.getvalue()
    assert "step 7  loss 0.1429  val_loss 0.5000\n" in terminal.getvalue()


def test_the_time_is_estimated_once_after_the_first_steps():
    out = io.StringIO()
    run_steps(Console(file=out), 50)
    assert len(re.findall(r"estimated time: \S+ s for the 46 steps left", out.getvalue())) == 1


def test_other_ranks_are_silent(tmp_path):
    out = io.StringIO()
    console = Console(enabled=False, file=out)
    show_header(console, tmp_path)
    run_steps(console, 3)
    console.say("x")
    assert out.getvalue() == ""


def test_a_closed_file_and_no_stdout_stop_nothing(monkeypatch):
    out = io.StringIO()
    console = Console(file=out)
    out.close()
    console.say("x")
    run_steps(console, 3)
    monkeypatch.setattr(sys, "stdout", None)
    run_steps(Console(), 3)


def test_text_that_the_terminal_cannot_encode_is_replaced():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=file).say("5 → 1")
    assert raw.getvalue() == b"5 ? 1\n"


def test_a_reader_that_leaves_does_not_end_the_run():
    code = (
        "import sys\n"
        "from torchmask.training.console import Console\n"
        "console = Console()\n"
        "for step in console.track(range(2000), 2000):\n"
        "    console.say('x' * 100)\n"
        "print('done', file=sys.stderr)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 0 and errors == "done\n"


def test_the_summary_tells_how_it_went_and_what_to_do_next(tmp_path):
    folder = tmp_path / "my run"
    (folder / "final").mkdir(parents=True)
    write_run(folder)
    (folder / "loss.png").touch()
    out = io.StringIO()
    Console(file=out).summary(folder)
    text = out.getvalue()
    assert "loss      3.0000 -> 0.1192 (mean of the last 10)" in text
    assert "0.2000 -> 0.0667, best 0.0667 at step 30" in text
    assert "1,016 tokens a second" in text and "0.80 GiB at most" in text
    assert "final/" in text and "loss.png" in text and "masks.html" not in text
    assert f"torchmask run generate --config generate 'checkpoint_dir={folder}/final' prompt=" in text
    assert len(text.splitlines()) < 24


def test_the_summary_of_a_run_without_steps_says_so(tmp_path):
    out = io.StringIO()
    Console(file=out).summary(tmp_path)
    assert "none" in out.getvalue()


def test_on_a_terminal_the_header_is_a_panel_with_the_text_as_it_is(terminal, tmp_path):
    console = Console(file=terminal)
    show_header(console, tmp_path / "[bold]odd[/bold]")
    assert "╭" in terminal.getvalue() and "[bold]odd[/bold]" in terminal.getvalue().replace("\n", "")


def test_durations_and_counts_read_well_at_their_borders():
    assert [format_duration(s) for s in (0, 9.96, 59.4, 3599.6)] == ["0.0 s", "10 s", "59 s", "1 h 00 min"]
    assert [format_count(n) for n in (999, 1000, 8_030_261_248)] == ["999", "1 K", "8.03 B"]


# loss.png


def test_the_curve_is_a_png_of_a_size_that_fits_a_page(tmp_path):
    write_run(tmp_path)
    loss_png(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    assert content.startswith(b"\x89PNG") and (width, height) == (1170, 702)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize("rows", [[{"step": 1, "loss": 3.0}], [{"step": 1, "loss": None}, {"step": 2, "loss": 0.0}]])
def test_the_shortest_runs_can_be_drawn(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss_png(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_nothing_is_drawn_where_no_step_was_logged(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    loss_png(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_drawing_does_not_touch_pyplot(tmp_path):
    code = (
        "import sys; from torchmask.training.loss_curve import loss_png\n"
        "loss_png(sys.argv[1] + '/metrics.jsonl', sys.argv[1] + '/loss.png'); print('matplotlib.pyplot' in sys.modules)"
    )
    write_run(tmp_path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "False"


def test_smoothing_keeps_a_straight_line_and_the_mean_of_equal_values():
    assert smoothed([2.0] * 7, 5).tolist() == [2.0] * 7
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 3).tolist()[1:-1] == [2.0, 3.0, 4.0]
    assert smoothed([4.0], 9).tolist() == [4.0]
