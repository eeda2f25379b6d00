"""Guards around every step: numbers that are not finite, memory that runs out, synthetic images that collapse.

All they look at is gathered on the device and read every `poll` steps together with the stop signals: one collective, one read.
No rank decides alone.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd import ranks
from fastkd.engine.events import Events
from fastkd.engine.graphs import Graphs
from fastkd.engine.guards.collapse import Collapse
from fastkd.engine.guards.finite import IN_A_ROW, Finite, dump
from fastkd.engine.guards.memory import Backoff
from fastkd.engine.guards.snapshot import Snapshot, optimisers
from fastkd.errors import NoMemoryError, NumericalError, no_memory
from fastkd.method import Method

Cast = Callable[[], contextlib.AbstractContextManager[Any]]
LR_FACTOR = 0.5
"""What a run that is rolled back multiplies its learning rates with."""

__all__ = ["Collapse", "GoBack", "Guards", "Position"]


@dataclass(frozen=True)
class Position:
    """Which step: epoch, steps done before it since the start of the run, function, arguments, occurrence of its name in the epoch."""

    seed: int
    epoch: int
    done: int
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    occurrence: int

    @property
    def name(self) -> str:
        return self.fn.__name__

    def seed_draws(self, method: Method) -> None:
        """Its draws depend on the position alone, so it can be done again."""
        method.rng.at(self.seed, self.epoch, self.name, self.occurrence)
        method.log.prefix = self.name

    def take(self, method: Method) -> None:
        """Do the step."""
        self.seed_draws(method)
        self.fn(*self.args)


class GoBack(Exception):
    """Go on from the newest checkpoint, with learning rates times `rate`; where there is none, `otherwise` is to be raised."""

    def __init__(self, why: str, otherwise: Exception, rate: float = 1.0):
        super().__init__(why)
        self.otherwise, self.rate = otherwise, rate


class Guards:
    """Takes the steps of a run and watches over them.

    Args:
      method: prepared. events: where warnings go. out: run folder, or None: then there is nothing to go back to. cast: autocast of steps.
      graphs: whether steps may be captured in CUDA graphs.
    """

    def __init__(
        self, method: Method, events: Events, out: Path | None, cast: Cast = contextlib.nullcontext, *, graphs: bool = False
    ):
        self.method, self.events, self.out, self.cast = method, events, out, cast
        self.graphs = Graphs(method, graphs, lambda said: events.write("warning", text=said))
        self.snapshot = Snapshot(method)
        self.finite = Finite(method.device)
        self.backoff = Backoff(method, events, out)
        self.collapse = Collapse(method, events)
        self._taken: dict[str, list[Position]] = {}  # since the last look, by name

    def step(self, at: Position) -> None:
        """Do a step, again where memory ran out; what is not finite in it moves neither weights (`Method.minimise`) nor buffers.

        Raises:
          GoBack: memory ran out after something had changed that cannot be copied back. NoMemoryError: it ran out again.
          StartAgain: it ran out on a rank, and all must start again from the last checkpoint.
        """
        self.backoff.due(at)
        if not at.fn.eager and self._replayed(at):  # type: ignore[attr-defined]
            return
        self.snapshot.take(numbers=at.fn.eager)  # type: ignore[attr-defined]
        while True:
            try:
                at.seed_draws(self.method)
                self._do(at)
                break
            except Exception as e:
                if not no_memory(e):
                    raise
                problem, rows = str(e), self.method.rows_to_split()
            # Outside of the handler: a traceback keeps every tensor of the step alive.
            self._free()
            if self.graphs.give_up():  # first what results do not depend on: captured steps hold memory of their own
                self._free()
                action = f"out of memory in step '{at.name}': captured steps gave theirs back, and all steps are eager from here on"
            else:
                action = self.backoff.decide(at, rows, problem)
            if self.snapshot.changed():
                end = f"out of memory in step '{at.name}' after its update had begun, and there is no checkpoint to go back to"
                raise GoBack(action, NoMemoryError(f"{end} ({problem}); lower method.batch or method.kd_batch."))
            self.snapshot.restore()
            self.events.write("warning", text=action)
        self._updated(at)

    def _do(self, at: Position) -> None:
        with self.cast(), self.collapse.counting(at.fn.phase):  # type: ignore[attr-defined]
            at.fn(*at.args)

    def _updated(self, at: Position) -> None:
        if self.method.updated():
            self.snapshot.mask(self.method.not_finite())
            self.finite.note(at.name, self.method.not_finite())
            self._note(at)

    def _note(self, at: Position) -> None:
        """That a step with an update was taken, once."""
        taken = self._taken.setdefault(at.name, [])
        if not taken or taken[-1] is not at:
            taken.append(at)

    def _replayed(self, at: Position) -> bool:
        """Whether a captured graph has done the step, with all that is done for it on the device."""

        def body() -> None:
            self.snapshot.take(numbers=False)
            self._do(at)
            self._updated(at)
            self.method.step_ends()

        if not self.graphs.on:
            return False
        at.seed_draws(self.method)
        variant = (at.fn, at.args, self.method.pace.parts)
        if not self.graphs.take(variant, self.snapshot.layout(), body):
            return False
        self.snapshot.forget_numbers()
        if at.name in self.finite.names():
            self._note(at)  # a graph counts on the device alone
        return True

    def _free(self) -> None:
        self.method.step_ends()
        gc.collect()
        if self.method.device.type == "cuda":
            torch.cuda.empty_cache()

    def look(self, stop: bool) -> bool:
        """Whether any rank was asked to stop; the only look at the device that the loop takes.

        Raises:
          GoBack, NumericalError: three steps of one name in a row were not finite, for the first time and again.
        """
        rows = torch.stack([torch.tensor(IN_A_ROW * stop, device=self.method.device), *self.finite.worst()])
        flags = (rows >= IN_A_ROW).to(torch.float64)
        found = ranks.total(torch.cat([flags, self.collapse.counted()])).tolist()
        (stopping, *worst), counted = found[: len(flags)], found[len(flags) :]
        names = [name for name, n in zip(self.finite.names(), worst, strict=True) if n]
        self.collapse.judge_counted(counted)
        taken, self._taken = self._taken, {}
        if names:
            self._not_finite(names[0], taken.get(names[0], []))
        return bool(stopping)

    def _not_finite(self, name: str, taken: list[Position]) -> None:
        bad = [n for n, v in self.method.log.read().items() if n.startswith(f"{name}.") and not math.isfinite(v)]
        said = f"{IN_A_ROW} '{name}' steps in a row were not finite"
        if bad:
            said += f" (term {bad[0].removeprefix(f'{name}.')})"
        ago, again = self.finite.ago(name), self.method.pace.rolled_back  # good ones may have followed
        if self.out is not None and ago < len(taken):
            self.snapshot.restore()  # cursors of the last step, so that where it is this one its batch is the same again
            with self.cast():
                said += dump(self.method, taken[-1 - ago], self.out)
            self.method.step_ends()
        if again:
            lower = "the last checkpoint is finite: lower the learning rates, and start anew with another --out"
            raise NumericalError(f"{said}, also after a roll-back with learning rates times {LR_FACTOR}; {lower}.")
        raise GoBack(said, NumericalError(f"{said}, and there is no checkpoint to go back to; lower the learning rates."), rate=LR_FACTOR)

    def went_back(self, rate: float) -> None:
        """After the state of a checkpoint was restored: learning rates times `rate`."""
        self.finite.clear()
        self.collapse.clear()
        if rate != 1.0:
            self.method.pace.rate *= rate
            self.method.pace.rolled_back = True
            for opt in optimisers(self.method):
                for group in opt.param_groups:
                    group["lr"].mul_(rate)
