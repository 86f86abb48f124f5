"""What a person sees of a run: what will be trained, how it goes, how it went.

On a terminal a panel and a progress bar; elsewhere (a pipe, a file, NO_COLOR, TERM=dumb) plain lines without control
codes. The bar is one line that is drawn again, with no thread and no hidden cursor: whatever else prints, and however
the run ends, the terminal stays usable. When nobody reads any more (`| head`), the run goes on without a word.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import nn

from torchmask.training.metrics import METRICS_FILE, format_step, read_metrics
from torchmask.training.run import Run
from torchmask.training.steps import StepPlan

_SECONDS_BETWEEN_DRAWS = 0.1
_NUM_PLAIN_LINES = 25  # of a whole run, where there is no bar
_SECONDS_BETWEEN_PLAIN_LINES = 60.0  # at most, however long the run
_STEPS_BEFORE_ESTIMATE = 3  # the first ones warm up caches and compile
_ERASE_LINE = "\r\x1b[2K"
_NUM_LAST_LOSSES = 10


class Console:
    """Speaks to the person who started the run; rank 0 has it enabled, the other ranks keep silent.

    Used as a context manager it ends the bar's line when the run ends, however that happens.
    """

    def __init__(self, *, enabled: bool = True, file: IO[str] | None = None) -> None:
        self._file = file if file is not None else sys.stdout
        self._enabled = enabled and self._file is not None  # Python's stdout is None where there was none at start
        self._interactive = self._enabled and _is_terminal(self._file)
        self._pace: _Pace | None = None
        self._values: dict[str, float] = {}
        self._bar_is_drawn = False
        self._last_draw = self._last_line = -1e9
        self._estimate_is_said = False

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_bar()

    def say(self, text: str) -> None:
        """Print text on lines of its own, above the bar if there is one."""
        self._put((_ERASE_LINE if self._bar_is_drawn else "") + text.rstrip("\n") + "\n")
        self._bar_is_drawn = False

    def header(
        self,
        *,
        model: nn.Module,
        packs: Mapping[str, Any] | None = None,
        plan: StepPlan | None = None,
        optimizer: str,
        run: Run,
        weights: str | Path | None = None,
        schedule: object = None,
        first_step: int = 0,
        facts: Sequence[tuple[str, str]] = (),
    ) -> None:
        """What will be trained, on what, in how many steps.

        Args:
            packs: the packed dataset's report, with
            plan: what its steps consist of; or
            facts: what a recipe without them says of its data and steps, (label, text) a line.
            optimizer: its description.
            weights: where they come from; None = random ones.
            schedule: anything whose `str` says what the learning rate does.
            first_step: steps done by the checkpoint that the run goes on from.
        """
        data = list(facts)
        if packs is not None and plan is not None:
            data += [("data", _data_line(packs)), ("trained", _trained_line(packs))]
            data += [("steps", _steps_line(plan, run, packs, first_step))]
        lines = [
            ("model", _model_line(model, weights)),
            *data,
            ("optimizer", optimizer),
            ("schedule", "" if schedule is None else str(schedule)),
            ("device", _device_line(run)),
            ("output", str(run.output_dir)),
        ]
        self._panel("torchmask", lines)

    def track(self, steps: Iterable[int], num_steps: int | None) -> Iterator[int]:
        """The steps (counted from 0), one by one, with progress shown towards `num_steps`; None: nobody knows."""
        self._pace = _Pace(num_steps)
        try:
            for step in steps:
                yield step
                self._pace.advance(step + 1)
                self._say_estimate()
                self._draw_bar(finished=step + 1 == num_steps)
        finally:
            self._end_bar()

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """Show a step's metrics, in the bar or, now and then, as a line.

        Args:
            done: optimizer steps done.
            values: as given to the metrics' log.
        """
        self._values = dict(values)
        if self._interactive or self._pace is None:
            if "val_loss" in values:
                self.say(format_step(done, {k: values[k] for k in ("loss", "val_loss") if k in values}))
            return
        num_steps = self._pace.num_steps
        now = time.monotonic()
        every = 10 ** (len(str(done)) - 1) if num_steps is None else -(-num_steps // _NUM_PLAIN_LINES)
        due = done % every == 0 or now - self._last_line > _SECONDS_BETWEEN_PLAIN_LINES
        if due or done == num_steps or "val_loss" in values:
            self._last_line = now
            left = self._pace.seconds_left()
            of = "" if num_steps is None else f"/{num_steps:,}"
            self.say("  ".join([f"step {done:,}{of}", *_shown(values), *([_left(left)] if left else [])]))

    def summary(self, output_dir: str | Path) -> None:
        """How the run went, where its files are and what to do next; read from the folder."""
        folder = Path(output_dir)
        facts = _outcome(folder)
        if self._pace is not None:
            facts.append(("time", format_duration(self._pace.seconds)))
        files = ("final", "adapter", "checkpoints", "loss.png", "masks.html", "ledger.json", METRICS_FILE, "logs")
        facts += [("files", f"{folder}/")]
        facts += [
            ("", f"  {name}{'/' if (folder / name).is_dir() else ''}") for name in files if (folder / name).exists()
        ]
        self._panel("done", facts)
        if (folder / "final").exists():  # outside the panel, so that it can be copied
            target = shlex.quote(f"checkpoint_dir={folder / 'final'}")
            self.say(f'next: torchmask run generate --config generate {target} prompt="..."')

    def _panel(self, title: str, facts: list[tuple[str, str]]) -> None:
        facts = [(label, text) for label, text in facts if text]
        if not self._interactive:
            width = max(len(label) for label, _ in facts)
            self.say("\n".join([title, *(f"  {label:<{width}}  {text}".rstrip() for label, text in facts)]))
            return
        from rich.console import Console as RichConsole
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in facts:
            grid.add_row(label, Text(text))
        rich_console = RichConsole(file=self._file, highlight=False)
        with rich_console.capture() as captured:
            rich_console.print(Panel(grid, title=f"[bold]{title}[/]", title_align="left", border_style="cyan"))
        self.say(captured.get())

    def _say_estimate(self) -> None:
        assert self._pace is not None
        left = self._pace.seconds_left()
        if self._estimate_is_said or left is None or self._pace.num_timed < _STEPS_BEFORE_ESTIMATE:
            return
        self._estimate_is_said = True
        self.say(f"estimated time: {format_duration(left)} for the {self._pace.num_left:,} steps left")

    def _draw_bar(self, *, finished: bool = False) -> None:
        now = time.monotonic()
        if not self._interactive or (now - self._last_draw < _SECONDS_BETWEEN_DRAWS and not finished):
            return
        from rich.console import Console as RichConsole
        from rich.text import Text

        assert self._pace is not None
        self._last_draw = now
        rich_console = RichConsole(file=self._file, highlight=False)
        left, num_steps = self._pace.seconds_left(), self._pace.num_steps
        words = [
            f"{self._pace.done:,}" + ("" if num_steps is None else f"/{num_steps:,}"),
            *_shown(self._values),
            *([_left(left)] if left else []),
        ]
        text = "  " + "  ".join(words)
        width = 0 if num_steps is None else max(min(40, rich_console.width - len(text) - 1), 8)
        num_filled = 0 if num_steps is None else min(width * self._pace.done // num_steps, width)
        bar = Text("━" * num_filled, style="green" if finished else "cyan")
        bar.append("━" * (width - num_filled), style="bright_black").append(text, style="default")
        bar.truncate(rich_console.width - 1)  # a line that wraps could not be erased
        with rich_console.capture() as captured:
            rich_console.print(bar, end="", soft_wrap=True)
        self._put(_ERASE_LINE + captured.get())
        self._bar_is_drawn = True

    def _end_bar(self) -> None:
        if self._bar_is_drawn:
            self._put("\n")
            self._bar_is_drawn = False

    def _put(self, text: str) -> None:
        if not self._enabled:
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        try:
            self._file.write(text.encode(encoding, "replace").decode(encoding))
            self._file.flush()
        except (OSError, ValueError):  # the reader is gone, or the file was closed: training matters more
            self._enabled = self._interactive = False
            _discard_stdout(self._file)


def format_duration(seconds: float) -> str:
    """A duration for people.

    >>> [format_duration(s) for s in (0.4, 59.6, 100, 3725, 200_000)]
    ['0.4 s', '1 min 00 s', '1 min 40 s', '1 h 02 min', '55 h 33 min']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def format_count(count: int) -> str:
    """A large number in three digits.

    >>> [format_count(n) for n in (950, 260_000, 1_235_814_400)]
    ['950', '260 K', '1.24 B']
    """
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


class _Pace:
    """How far a run is, and how fast since the end of its first step."""

    def __init__(self, num_steps: int | None) -> None:
        self.num_steps = num_steps
        self.done = 0
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None

    def advance(self, done: int) -> None:
        self.done = done
        self._now = time.monotonic()
        self._first = self._first or (done, self._now)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def num_left(self) -> int:
        return 0 if self.num_steps is None else max(self.num_steps - self.done, 0)

    @property
    def num_timed(self) -> int:
        return self.done - self._first[0] if self._first else 0

    def seconds_left(self) -> float | None:
        """None before the second step is done, and after the last."""
        if not self._first or not self.num_timed or not self.num_left:
            return None
        return (self._now - self._first[1]) / self.num_timed * self.num_left


def _model_line(model: nn.Module, weights: str | Path | None) -> str:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]  # of DTensors, the whole one's
    total, trained = sum(size for size, _ in sizes), sum(size for size, requires_grad in sizes if requires_grad)
    share = "all trained" if trained == total else f"{trained:,} trained ({trained / total:.2%})"
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    origin = f"weights of {weights}" if weights else "random weights"
    return f"{total:,} parameters ({format_count(total)}), {share}, {dtypes}, {origin}"


def _data_line(packs: Mapping[str, Any]) -> str:
    num_tokens = packs["trained"] + packs["masked"]
    return (
        f"{packs['documents']:,} documents, {num_tokens:,} tokens an epoch, in {packs['rows']:,} rows of "
        f"{packs['max_seq_len']:,} slots, {packs['fill']:.1%} full"
    )


def _trained_line(packs: Mapping[str, Any]) -> str:
    num_tokens = packs["trained"] + packs["masked"]
    return f"{packs['trained']:,} tokens an epoch are targets, {packs['trained'] / max(num_tokens, 1):.1%} of all"


def _steps_line(plan: StepPlan, run: Run, packs: Mapping[str, Any], first_step: int) -> str:
    num_epochs = plan.num_steps / plan.steps_per_epoch
    accumulation = plan.global_batch // (plan.batch_size * run.world_size)
    product = [f"batch_size {plan.batch_size}"]
    product += [f"{accumulation} micro-batches"] if accumulation > 1 else []
    product += [f"{run.world_size} processes"] if run.world_size > 1 else []
    slots = plan.global_batch * packs["max_seq_len"]
    resumed = f"; going on after step {first_step:,}" if first_step else ""
    resumed = "; already finished, nothing is left to train" if first_step >= plan.num_steps else resumed
    return (
        f"{plan.num_steps:,} ({num_epochs:g} x {plan.steps_per_epoch:,}) of {plan.global_batch} rows "
        f"({' x '.join(product)}), {slots:,} slots{resumed}"
    )


def _device_line(run: Run) -> str:
    return f"{run.device}, {run.world_size} process{'es' if run.world_size > 1 else ''}"


def _outcome(folder: Path) -> list[tuple[str, str]]:
    rows = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    if not rows:
        return [("steps", "none")]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    val_losses = [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]
    rates = sorted(row["tokens_per_second_per_gpu"] for row in rows if row.get("tokens_per_second_per_gpu"))
    peak = max((row.get("peak_memory_gib") or 0.0 for row in rows), default=0.0)
    facts = [("steps", f"{rows[-1]['step']:,}")]
    if losses:
        last = losses[-_NUM_LAST_LOSSES:]
        of_which = f" (mean of the last {len(last)})" if len(last) > 1 else ""
        facts.append(("loss", f"{losses[0]:.4f} -> {sum(last) / len(last):.4f}{of_which}"))
    if val_losses:
        best, at = min(val_losses)
        facts.append(("val loss", f"{val_losses[0][0]:.4f} -> {val_losses[-1][0]:.4f}, best {best:.4f} at step {at:,}"))
    if rates:
        facts.append(("speed", f"{rates[len(rates) // 2]:,.0f} tokens a second on each device (median)"))
    if peak:
        facts.append(("memory", f"{peak:.2f} GiB at most"))
    return facts


def _shown(values: Mapping[str, float]) -> list[str]:
    words = [f"{name} {values[name]:.4f}" for name in ("loss", "val_loss") if name in values]
    if "lr" in values:
        words.append(f"lr {values['lr']:.2e}")
    if "tokens_per_second_per_gpu" in values:
        words.append(f"{values['tokens_per_second_per_gpu']:,.0f} tok/s")
    return words


def _left(seconds: float) -> str:
    return f"{format_duration(seconds)} left"


def _is_terminal(file: IO[str]) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    if not (getattr(file, "encoding", None) or "").lower().startswith("utf"):
        return False
    try:
        return file.isatty()
    except ValueError:  # closed
        return False


def _discard_stdout(file: IO[str]) -> None:
    """Send what is still buffered nowhere, or Python would fail with exit code 120 when it flushes stdout at exit."""
    if file is not sys.stdout:
        return
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, file.fileno())
        os.close(descriptor)
    except (OSError, ValueError):
        pass  # closed already: nothing is left to flush
