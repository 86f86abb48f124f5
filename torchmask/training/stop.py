"""Asking a run to stop: signals become a flag that the training loop looks at between optimizer steps.

While a run is being set up there is nothing to save, so the first signal ends it at once; while it trains, the first
signal is honoured at the next step and a second Ctrl-C ends it where it stands (the last checkpoint is whole).
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torchmask.errors import StopRequested

SIGNALS = tuple(s for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s))


class StopFlag:
    """Set by a signal; read by `agree` at every step, so that all ranks stop at the same one.

    Attributes:
        signal_name: the signal that was received first, None so far.
        deferred: honour it at the next step (training) and not at once (set-up).
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.deferred = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler."""
        name = signal.Signals(number).name
        if self.signal_name == "SIGINT" and name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = name
        if not self.deferred:
            raise StopRequested("R06", f"stopped by {name} before training began; nothing had to be saved")

    def end_deferral(self) -> None:
        """Training is over: from here on a signal ends the run at once, one that came before does so now."""
        self.deferred = False
        if self.signal_name is not None:
            raise StopRequested("R04", f"stopped by {self.signal_name} after training; the last checkpoint is whole")

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal_name is not None


@contextmanager
def catch_signals(flag: StopFlag) -> Iterator[None]:
    """Signals go to `flag` inside the block, and to whom they went before after it."""
    before: dict[str, Callable[..., Any] | int | None] = {}
    try:
        for name in SIGNALS:
            before[name] = signal.signal(getattr(signal, name), flag.receive)
    except ValueError:  # not the main thread (a test, a notebook): leave signals alone
        pass
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
