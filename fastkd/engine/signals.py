"""A stop signal or a time limit sets a flag that the loop reads; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)]


class Stop:
    """Whether a stop was asked for: by a signal, or because `seconds` are over."""

    def __init__(self, seconds: float | None = None) -> None:
        self.signal: int | None = None
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def __bool__(self) -> bool:
        return self.signal is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


@contextmanager
def watched(seconds: float | None = None) -> Iterator[Stop]:
    """Handle the stop signals for the duration; outside the main thread nothing is installed.

    Args:
      seconds: a time limit, or None.
    """
    stop = Stop(seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, stop._handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
