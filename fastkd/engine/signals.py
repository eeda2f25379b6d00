"""A stop signal or a time limit sets a flag that the loop reads; a second signal leaves at once, wherever the process stands.

Python runs handlers between two instructions of the main thread only, which may be waiting for a device or another rank. So a thread
reads the signals' numbers from a pipe that the interpreter writes when they arrive.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 1.0
"""Seconds in which another signal is the first one come a second way: what stops launcher and ranks alike is handed on by the launcher."""
SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)]


class Stop:
    """Whether a stop was asked for: by a signal, or because `seconds` are over."""

    def __init__(self, seconds: float | None = None) -> None:
        self.signal: int | None = None
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def __bool__(self) -> bool:
        return self.signal is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number

    def _listen(self, pipe: int) -> None:
        first = None
        while arrived := os.read(pipe, 1):
            if arrived[0] not in SIGNALS:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > ECHO:
                os._exit(128 + arrived[0])


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
    pipe, written = os.pipe()
    os.set_blocking(written, False)
    listener = threading.Thread(target=stop._listen, args=(pipe,), daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    before = {s: signal.signal(s, stop._handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(written)
        listener.join()
        os.close(pipe)
