"""Seconds by phase, without a synchronisation inside the epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the time of phases; on a GPU by events that are read once an epoch.

    Args:
      device: where the steps run.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            begin_s = time.perf_counter()
            yield
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin_s

    def flush(self) -> dict[str, float]:
        """Seconds by phase since the last flush; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for phase, begin, end in self._events:
                self.seconds[phase] = self.seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1e3
            self._events.clear()
        out, self.seconds = {k: round(v, 4) for k, v in self.seconds.items()}, {}
        return out
