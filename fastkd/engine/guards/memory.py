"""Out of memory: what is done about it. A student step is taken in twice as many parts, any other step once more with an empty cache.

One process does the step again at once. Several ranks cannot: the others wait in the middle of the same step for one that has left it.
So the rank writes down what to change and from which step on, and all ranks start again from the last checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastkd import ranks
from fastkd.engine import launch
from fastkd.engine.events import Events
from fastkd.errors import NoMemoryError, StartAgain
from fastkd.files import write_atomic
from fastkd.method import Method

if TYPE_CHECKING:
    from fastkd.engine.guards import Position

FILE = "memory.json"
Entry = tuple[int, int]
"""Steps done before the one that ran out of memory, and the parts of student steps from there on."""


class Backoff:
    """Decides what follows when memory runs out, and remembers it over restarts (`memory.json`)."""

    def __init__(self, method: Method, events: Events, out: Path | None):
        self.method, self.events, self.out = method, events, out
        self._entries = _agreed(_read(out))

    def due(self, at: Position) -> None:
        """Before a step: apply what an attempt before has written down for it."""
        for step, parts in self._entries:
            if step == at.done and parts > self.method.pace.parts:
                self.method.pace.parts = parts
                self.events.write("warning", text=f"from step {at.done} on, student steps are taken in {parts} parts")

    def decide(self, at: Position, rows: int, problem: str) -> str:
        """What is done about a step that ran out of memory, in one sentence; more parts are set already.

        Args:
          rows: how many rows of a rank the step could split.
        Raises:
          NoMemoryError: nothing is left to try. StartAgain: all ranks must.
        """
        who, parts = f"step '{at.name}'", self.method.pace.parts
        size, splits = -(-rows // parts), rows > 0 and at.fn.phase == "distillation"  # type: ignore[attr-defined]
        if splits and size > 1:
            parts *= 2
            rest = f"{parts} parts of {-(-rows // parts)} rows a rank{self._coupled()}"
            action = f"out of memory in {who}: student steps are taken in {rest}"
        elif splits or any(step == at.done for step, _ in self._entries):
            why = "with one row at a time" if splits else "twice, and it cannot be taken in parts"
            raise NoMemoryError(f"out of memory in {who} {why} ({_short(problem)}); lower method.batch or method.kd_batch.")
        else:
            action = f"out of memory in {who}, which cannot be taken in parts: once more with an empty cache"
        self._entries.append((at.done, parts))
        written = self._write()
        if ranks.world() > 1:
            self._refuse_to_go_on_alone(action, problem, written)
        self.method.pace.parts = parts
        return action

    def _coupled(self) -> str:
        from torch.nn.modules.batchnorm import _BatchNorm

        norms = any(isinstance(m, _BatchNorm) and m.training for m in self.method.student.modules())
        return "; its BatchNorm sees one part at a time" if norms else ""

    def _write(self) -> bool:
        """Remember what was decided, where there is a folder with room; whether it is."""
        try:
            if self.out is not None:
                write_atomic(self.out / FILE, json.dumps(self._entries).encode(), writer=f"-r{ranks.rank()}")
            return self.out is not None
        except OSError:
            return False

    def _refuse_to_go_on_alone(self, action: str, problem: str, written: bool) -> None:
        who = f"rank {ranks.rank()}: {action}"
        if written and launch.restarts_left():
            raise StartAgain(f"{who}; all ranks start again from the last checkpoint.")
        how = "run it again with --resume" if written else "that needs a run folder with room"
        raise NoMemoryError(f"{who}, after a restart: {how} ({_short(problem)}).")


def _read(out: Path | None) -> list[Entry]:
    """What attempts before have written down; a damaged file says nothing."""
    if out is None:
        return []
    try:
        return [(int(step), int(parts)) for step, parts in json.loads((out / FILE).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _agreed(entries: list[Entry]) -> list[Entry]:
    """The longest list that a rank has read: on a network disk one may still see an older file. A collective."""
    n = int(ranks.max(torch.tensor(len(entries))).item())
    mine = torch.zeros(n, 2, dtype=torch.int64)
    if entries:
        mine[: len(entries)] = torch.tensor(entries)
    return [(int(step), int(parts)) for step, parts in ranks.max(mine).tolist()]


def _short(problem: str) -> str:
    return (problem.splitlines() or ["no reason given"])[0][:160]
