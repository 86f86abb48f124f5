"""Ending in good order where a signal asks for it, in everything that is not a training step."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torchmask.errors import StopRequested


class _Asked(BaseException):
    """No Exception, so that nothing on its way takes it for a bad row and goes on."""


@contextmanager
def stop_when_asked(when: str, *, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> Iterator[None]:
    """Within it, each of the signals ends what is under way, which cleans up after itself.

    Args:
        when: ends the sentence "stopped by SIGTERM ...".
        signals: by name; those that the system does not have are left out.

    Raises:
        StopRequested: R04, one of them came.
    """

    def stop(number: int, frame: Any) -> None:
        raise _Asked(signal.Signals(number).name)

    numbers = [getattr(signal, name) for name in signals if hasattr(signal, name)]
    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread (tests, notebooks): signals go elsewhere
        yield
        return
    try:
        yield
    except _Asked as asked:
        raise StopRequested("R04", f"stopped by {asked} {when}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
