"""Out of memory: what is done about it. A student step is taken in twice as many parts, any other step once more with an empty cache.

One process does the step again at once. Several ranks cannot: the others wait in the middle of the same step for one that has left it.
So the rank writes down what to change and from which step on, and all ranks start again from the last checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd import ranks
from fastkd.engine import launch
from fastkd.engine.events import Events
from fastkd.errors import NoMemoryError, StartAgain
from fastkd.files import write_atomic
from fastkd.method import Method

if TYPE_CHECKING:
    from fastkd.engine.guards import Position

FILE = "memory.json"


class Backoff:
    """Decides what follows when memory runs out, and remembers it over restarts (`memory.json`)."""

    def __init__(self, method: Method, events: Events, out: Path | None):
        self.method, self.events, self.out = method, events, out
        self._entries: list[dict[str, Any]] = _read(out)

    def due(self, at: Position) -> None:
        """Before a step: apply what an attempt before has written down for it."""
        for entry in self._entries:
            if entry["step"] == at.done and entry["parts"] > self.method.pace.parts:
                self.method.pace.parts = entry["parts"]
                self.events.write("warning", text=f"from step {at.done} on, student steps are taken in {entry['parts']} parts")

    def decide(self, at: Position, rows: int, problem: str) -> str:
        """What is done about a step that ran out of memory, in one sentence; more parts are set already.

        Args:
          rows: how many rows of a rank the step could split.
        Raises:
          NoMemoryError: nothing is left to try. StartAgain: all ranks must.
        """
        step, parts = f"step '{at.name}'", self.method.pace.parts
        size, splits = -(-rows // parts), rows > 0 and at.fn.phase == "distillation"  # type: ignore[attr-defined]
        if splits and size > 1:
            parts *= 2
            rest = f"{parts} parts of {-(-rows // parts)} rows a rank{self._coupled()}"
            action = f"out of memory in {step}: student steps are taken in {rest}"
        elif splits or any((e["step"], e["name"]) == (at.done, at.name) for e in self._entries):
            why = "with one row at a time" if splits else "twice, and it cannot be taken in parts"
            raise NoMemoryError(f"out of memory in {step} {why} ({_short(problem)}); lower method.batch or method.kd_batch.")
        else:
            action = f"out of memory in {step}, which cannot be taken in parts: once more with an empty cache"
        self._entries.append({"step": at.done, "name": at.name, "parts": parts})
        if self.out is not None:
            write_atomic(self.out / FILE, json.dumps(self._entries).encode(), writer=f"-r{ranks.rank()}")
        if ranks.world() > 1:
            self._refuse_to_go_on_alone(action, problem)
        self.method.pace.parts = parts
        return action

    def _coupled(self) -> str:
        from torch.nn.modules.batchnorm import _BatchNorm

        norms = any(isinstance(m, _BatchNorm) and m.training for m in self.method.student.modules())
        return "; its BatchNorm sees one part at a time" if norms else ""

    def _refuse_to_go_on_alone(self, action: str, problem: str) -> None:
        who = f"rank {ranks.rank()}: {action}"
        if self.out is not None and launch.restarts_left():
            raise StartAgain(f"{who}; all ranks start again from the last checkpoint.")
        how = "run it again with --resume" if self.out is not None else "that needs a run folder"
        raise NoMemoryError(f"{who}, after a restart: {how} ({_short(problem)}).")


def _read(out: Path | None) -> list[dict[str, Any]]:
    """What attempts before have written down; a damaged file says nothing."""
    if out is None:
        return []
    try:
        found = json.loads((out / FILE).read_bytes())
        return [{"step": int(e["step"]), "name": str(e["name"]), "parts": int(e["parts"])} for e in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _short(problem: str) -> str:
    return (problem.splitlines() or ["no reason given"])[0][:160]
