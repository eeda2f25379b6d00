"""When a checkpoint is written, and what becomes of a run that cannot write one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastkd import ranks
from fastkd.engine import checkpoint, evaluation, state
from fastkd.engine.events import Events
from fastkd.engine.folder import why
from fastkd.engine.guards.collapse import Collapse
from fastkd.engine.settings import Settings
from fastkd.errors import STOPPED, CheckpointError
from fastkd.files import tensor_bytes, write_atomic
from fastkd.method import Method


class Saver:
    """Decides when a checkpoint is due and writes it; a failed save costs nothing but itself.

    Args:
      collapse: the guard whose state goes into manifests.
    """

    def __init__(self, method: Method, settings: Settings, events: Events, out: Path | None, collapse: Collapse):
        self.method, self.settings, self.events, self.out, self.collapse = method, settings, events, out, collapse
        self.last, self.failed, self.highest = time.monotonic(), 0, _best_so_far(out)

    def due(self, done: int) -> bool:
        """Collective: all ranks must agree, so with several ranks time alone is asked of rank 0 at poll steps."""
        if self.out is None:
            return False
        if self.settings.every_steps:
            return done % self.settings.every_steps == 0
        if done % self.settings.poll:
            return False
        late = torch.tensor(float(time.monotonic() - self.last > 60 * self.settings.every_minutes))
        return bool(ranks.max(late).item())

    def save(self, position: tuple[int, int], done: int) -> None:
        """Write a checkpoint, while all ranks wait. One that cannot be written is said and costs nothing but itself.

        Raises:
          CheckpointError: it is the third in a row.
        """
        self.last = time.monotonic()
        if self.out is None:
            return
        tensors, numbers = state.collect(self.method)
        images, together = state.images(self.method)
        about = {**self.settings.about, "world": ranks.world(), "threads": torch.get_num_threads(), "collapse": self.collapse.state()}
        if ranks.rank() == 0 or together:
            self._write(position, done, tensors, numbers, about, images, together)
        ranks.meet()  # rank 0 may have much to write, and a step waits for others only so long

    def _write(
        self,
        position: tuple[int, int],
        done: int,
        tensors: dict[str, Tensor],
        numbers: dict[str, int | float | bool],
        about: dict[str, Any],
        images: dict[str, Tensor],
        together: bool,
    ) -> None:
        assert self.out is not None
        folder = self.out / "checkpoints"
        student, metadata, keep = self._student(), self.settings.student_metadata, self.settings.keep
        for _ in range(2):
            try:
                checkpoint.write(folder, done, position, tensors, numbers, student, metadata, about, keep, images, together)
                self.failed = 0
                self.events.write("checkpoint", step=done, position=list(position))
                return
            except (OSError, RuntimeError) as e:  # safetensors wraps errno in its own error
                reason = why(e) if isinstance(e, OSError) else str(e)
                checkpoint.prune(folder, 1)
        self.failed += 1
        self.events.write("warning", text=f"checkpoint at step {done} could not be written: {reason}; what was saved before is intact")
        if self.failed == 3:
            raise CheckpointError(
                f"three checkpoints in a row could not be written to '{self.out}' ({reason}); "
                "the last good one is intact: make room and use --resume."
            )

    def stop(self, position: tuple[int, int], done: int) -> int:
        """Save, and the code of a run that was stopped.

        Raises:
          CheckpointError: nothing could be written and nothing older is there.
        """
        self.save(position, done)
        if self.failed and self.out is not None and not checkpoint.listed(self.out / "checkpoints"):
            raise CheckpointError(f"stopped at step {done}, and no checkpoint could be written to '{self.out}'; nothing can be continued.")
        return STOPPED

    def _student(self) -> dict[str, Tensor]:
        return student_tensors(self.method.student)

    def best(self, scores: dict[str, float]) -> None:
        """Keep the student of the best evaluation apart; its metadata says that test data selected it."""
        name = next((name for name in evaluation.SCORES if name in scores), None)
        if self.out is None or name is None or not scores[name] > self.highest or ranks.rank():
            return
        self.highest = scores[name]
        metadata = {**self.settings.student_metadata, name: f"{self.highest:.6f}", "note": "selected on test data"}
        try:
            folder = self.out / "checkpoints" / "best"
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "student.safetensors", tensor_bytes(self._student(), metadata))
        except OSError as e:
            self.events.write("warning", text=f"the best student could not be written: {why(e)}")


def _best_so_far(out: Path | None) -> float:
    """The score in the metadata of a best student that is there already, else -1."""
    path = out / "checkpoints" / "best" / "student.safetensors" if out is not None else None
    try:
        with safe_open(path, "pt") as f:
            return max(float(value) for name, value in f.metadata().items() if name in evaluation.SCORES)
    except (OSError, TypeError, AttributeError, ValueError, SafetensorError):
        return -1.0


def student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """The student's state under its own network's keys, on the host."""
    net = getattr(student, "net", student)
    return {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
