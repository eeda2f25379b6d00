"""A timed probe: every kind of step of a method a few times on real tensors, as one rank. What a step costs is measured, not guessed."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastkd import ops
from fastkd.engine import allocator, loop, state
from fastkd.engine.dry import kinds, pretended
from fastkd.engine.events import Events
from fastkd.engine.guards import Guards, Position
from fastkd.method import Given, Method

REPEATS, SECONDS = 5, 2.0
"""A step that may be repeated is timed at most so often, and not again after so long."""


class Peak:
    """Bytes above those at the start that were held at the worst moment of a block: `with Peak(device) as peak: …; peak.bytes`.

    On a GPU the allocator counts them. On the CPU the profiler's record of every allocation is added up; what its library writes to
    file descriptor 2 on the way is dropped.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        self._around = contextlib.ExitStack()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._around.enter_context(_without_stderr())
            self._profiler = self._around.enter_context(torch.autograd.profiler.profile(use_cpu=True, profile_memory=True))
        return self

    def __exit__(self, *error: Any) -> None:
        self._around.__exit__(*error)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        moves = [(e.start_ns(), e.nbytes()) for e in self._profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        held = 0
        for _, n in sorted(moves, key=lambda move: move[0]):
            held += n
            self.bytes = max(self.bytes, held)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """File descriptor 2 leads nowhere for the duration."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def probe(method: Method, given: Given, settings: loop.Settings, *, world: int = 1) -> dict[str, Any]:
    """Build the method and take each kind of step, the evaluation after an epoch and the collection of a checkpoint.

    Communication costs nothing here: the other ranks of `world` are not there, and collectives return at once.

    Returns:
      steps: one row a kind of step as `dry.walk` gives, with seconds of one and peak: bytes that it needs beside what is held.
      evaluation, checkpoint: the same for these. guards: bytes of the copies that they keep. said: warnings on the way.
    Raises:
      NoMemoryError: a step does not fit.
    """
    said: list[str] = []
    events = Events(None, [lambda event: said.append(event["text"]) if event["kind"] == "warning" else None])
    with allocator.kept(given.device), pretended(world), contextlib.ExitStack() as around:
        loop.prepare(method, given, global_bn=settings.global_bn)
        guards = Guards(method, events, None, loop.autocast(method.device, settings.precision), graphs=settings.graphs)
        rows = []
        around.enter_context(ops.captured(guards.graphs.on))
        for done, kind in enumerate(kinds(method)):
            at = Position(settings.seed, kind.epoch, done, kind.fn, kind.args, kind.occurrence)

            def take(at: Position = at) -> None:
                guards.step(at)
                method.step_ends()

            # What fills a memory cannot be repeated at will: its store has room for the run's own number.
            rows.append({**kind.row, **_measure(take, method.device, repeats=0 if kind.fn.eager else REPEATS)})  # type: ignore[attr-defined]
        method.rng.at(settings.seed, 0, "evaluate", 0)
        evaluation = _measure(lambda: loop.evaluate(method, settings), method.device, repeats=1)
        saved = _measure(lambda: state.collect(method), torch.device("cpu"), repeats=1)
    return {"steps": rows, "evaluation": evaluation, "checkpoint": saved, "guards": guards.snapshot.bytes, "said": said}


def _measure(take: Callable[[], Any], device: torch.device, *, repeats: int) -> dict[str, float]:
    """seconds: the median of `repeats` calls after the first, or the first one's. peak: bytes that the first call needs."""
    began = time.perf_counter()
    with Peak(device) as peak:
        first = _seconds(take, device)
    seconds = [first]
    while len(seconds) <= repeats and (len(seconds) == 1 or time.perf_counter() - began < SECONDS):
        seconds.append(_seconds(take, device))
    return {"seconds": statistics.median(seconds[1:] or seconds), "peak": peak.bytes}


def _seconds(take: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    take()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
