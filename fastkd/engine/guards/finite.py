"""Steps that are not finite: counted on the device, and the batch that a run could not go on with written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd import ranks
from fastkd.files import tensor_bytes, write_atomic
from fastkd.method import Method

if TYPE_CHECKING:
    from fastkd.engine.guards import Position

IN_A_ROW = 3
"""Steps of one name in a row that may not be skipped."""


class Finite:
    """How many steps of a name in a row were not finite: now, and at most since the start; how many there were, and how many when that
    longest row had its newest one: [4] on the device for each name."""

    def __init__(self, device: torch.device):
        self.device = device
        self._rows: dict[str, Tensor] = {}

    def note(self, name: str, skip: Tensor) -> None:
        """Count a step; `skip` [] is 1 where it was not finite."""
        if name not in self._rows:
            self._rows[name] = torch.zeros(4, device=self.device, dtype=torch.float64)
        row = self._rows[name]
        now, count = (row[0] + 1) * skip, row[2] + 1
        row.copy_(torch.stack([now, torch.maximum(row[1], now), count, torch.where(now > row[1], count, row[3])]))

    def names(self) -> list[str]:
        return list(self._rows)

    def worst(self) -> list[Tensor]:
        """[] the longest row of each name, in the order of `names`."""
        return [row[1] for row in self._rows.values()]

    def ago(self, name: str) -> int:
        """How many steps of this name have followed the newest one of the longest row; read from the device."""
        _, _, count, at = self._rows[name].tolist()
        return int(count - at)

    def clear(self) -> None:
        for row in self._rows.values():
            row.zero_()


def dump(method: Method, at: Position, out: Path) -> str:
    """Do a step again and write what the networks were given and answered, this rank's rows, to `not-finite-STEP-rR.safetensors`.

    A collective: every rank calls it.

    Returns:
      what became of it, as the end of a sentence; empty where the file could not be written, which must not hide what happened.
    """
    seen: dict[str, Tensor] = {}

    def keep(who: str) -> Any:
        def hook(module: torch.nn.Module, given: tuple[Any, ...], answer: Any) -> None:
            n = sum(k.startswith(f"{who}.") for k in seen) // 2
            logits = answer if isinstance(answer, Tensor) else answer.logits
            for name, t in (("images", given[0]), ("logits", logits)):
                seen[f"{who}.{n}.{name}"] = t.detach().cpu().contiguous().clone()

        return hook

    nets = {"teacher": method.teacher, "student": method.student}
    hooks = [net.register_forward_hook(keep(who)) for who, net in nets.items() if net is not None]
    try:
        at.take(method)
    finally:
        for hook in hooks:
            hook.remove()
    if not method.not_finite() > 0:  # weights or cursors have moved since; a good batch would mislead
        return "; done again, that step is finite, so no batch is kept"
    about = {"step": at.name, "arguments": list(at.args), "epoch": at.epoch, "occurrence": at.occurrence, "done": at.done, "seed": at.seed}
    path = out / f"not-finite-{at.done:08d}-r{ranks.rank()}.safetensors"
    try:
        write_atomic(path, tensor_bytes(seen, {"fastkd": json.dumps(about)}))
    except OSError:
        return ""
    return f"; its batch is in {path.name}"
