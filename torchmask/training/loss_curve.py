"""loss.png: what the loss did, drawn from metrics.jsonl."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchmask.training.metrics import read_metrics

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9600d", "#8a8f98"
_WIDE_RANGE = 20.0  # a loss that falls by more than this factor is drawn on a logarithmic axis


def loss_png(metrics_path: str | Path, png_path: str | Path, *, title: str = "") -> None:
    """Draw the training loss (each step light, smoothed dark), validation losses and, below, the learning rate.

    Writes nothing when no step was logged. The file appears whole or not at all.
    """
    rows = [row for row in read_metrics(metrics_path) if row.get("loss") is not None]
    if not rows:
        return
    # The object interface: pyplot would choose a display and keep figures for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    has_lr = all(row.get("lr") is not None for row in rows)
    if has_lr:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
        _draw_lr(bottom, rows)
        lowest = bottom
    else:
        top = lowest = figure.subplots()
    _draw_loss(top, rows, title)
    lowest.set_xlabel("step", color="#333333")
    temporary = Path(png_path).with_name(f".tmp-{Path(png_path).name}")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    os.replace(temporary, png_path)


def smoothed(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """The centred moving average over `window` values (odd), over fewer at the ends.

    >>> smoothed([0.0, 3.0, 6.0, 0.0], 3).tolist()
    [1.5, 3.0, 3.0, 3.0]
    """
    kernel = np.ones(min(window, 2 * len(values) - 1))
    half = len(kernel) // 2
    sums = np.convolve(np.asarray(values, np.float64), kernel)[half : half + len(values)]
    counts = np.convolve(np.ones(len(values)), kernel)[half : half + len(values)]
    return sums / counts


def _draw_loss(axes: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    window = 2 * (len(losses) // 50) + 1
    curve = smoothed(losses, window)
    if window > 1:
        axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.9, solid_capstyle="round")
    axes.plot(steps, curve, color=_BLUE, linewidth=1.8, marker="o" if len(steps) == 1 else None)
    label = f"training {losses[0]:.3f} → {curve[-1]:.3f}"
    axes.plot([], [], color=_BLUE, linewidth=1.8, label=label + (f" (mean over {window} steps)" if window > 1 else ""))
    validation = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if validation:
        axes.plot(
            *zip(*validation),
            color=_ORANGE,
            linewidth=1.2,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label=f"validation {validation[0][1]:.3f} → {validation[-1][1]:.3f}",
            zorder=3,
        )
    lowest, highest = float(curve.min()), float(curve.max())
    if lowest > 0 and highest / lowest > _WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif lowest > 0 and lowest < 0.5 * highest:
        axes.set_ylim(bottom=0)
    axes.set_ylabel("loss (nats per trained token)", color="#333333")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="upper right", frameon=False)
    axes.grid(True, which="major", color="#e4e6ea", linewidth=0.8)
    _tidy(axes)


def _draw_lr(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    steps, rates = [row["step"] for row in rows], [row["lr"] for row in rows]
    axes.fill_between(steps, rates, color=_GREY, alpha=0.25, linewidth=0)
    axes.plot(steps, rates, color=_GREY, linewidth=1.2)
    peak = max(rates)
    axes.set_ylim(0, 1.15 * peak if peak > 0 else 1.0)
    axes.set_yticks([0, peak] if peak > 0 else [0], ["0", f"{peak:.1e}"] if peak > 0 else ["0"])
    axes.set_ylabel("lr", color="#333333")
    _tidy(axes)


def _tidy(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b9bdc4")
    axes.tick_params(colors="#555555", labelsize=9)
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
