"""Whether the synthetic images still teach. Said once where they do not.

What the student learns from is counted on the device, from the logits that the teacher gives anyway, and judged every few steps; the
newest images are looked at again, with the student's answers, at the end of each epoch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import ranks
from fastkd.engine.events import Events
from fastkd.method import Method

WINDOW = 512
"""Images over which what was counted is judged; over all ranks."""
WINDOWS, EPOCHS = 5, 2
"""Windows, or epochs, in a row beyond a threshold before it is said: the first images of a run are poor."""


@dataclass(frozen=True)
class Threshold:
    """A value below which images no longer teach. `least`: of the number of classes."""

    least: Callable[[int], float]
    text: str


THRESHOLDS = {
    "balance": Threshold(lambda c: 0.5, "few classes are left among the synthetic images: their entropy is {value:.0%} of an even spread"),
    "confidence": Threshold(
        lambda c: min(max(2 / c, 0.05), (1 + 1 / c) / 2),  # of few classes: half-way between chance and certainty
        "the teacher does not know what the synthetic images are: its confidence is {value:.1%}"
    ),
    "distance": Threshold(
        lambda c: 0.05, "the synthetic images are nearly all the same: two of them differ by {value:.3f} standard deviations"
    ),
    "agreement": Threshold(
        lambda c: 1.5 / c, "the student does no better than chance on the synthetic images: it agrees with the teacher on {value:.1%}"
    ),
}


class Collapse:
    """Compares what student steps see, and the health of each epoch, with the thresholds; warns once for each."""

    def __init__(self, method: Method, events: Events):
        self.method, self.events = method, events
        self._low = {kind: dict.fromkeys(THRESHOLDS, 0) for kind in ("windows", "epochs")}
        self._said: set[str] = set()
        self._sums = torch.zeros(method.classes + 4, device=method.device, dtype=torch.float64)
        """Answers of each class; images, calls with two images or more, sums of confidence over answers and of distance over those
        calls. In fp64: a batch of dense answers is millions."""
        self._step = torch.zeros_like(self._sums)

    @contextlib.contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        """Count what the teacher sees in a student step; nothing is read by the host, nothing is computed by a network for it."""
        if phase != "distillation" or self.method.teacher is None:
            yield
            return
        self._step.zero_()
        handle = self.method.teacher.register_forward_hook(self._count)
        try:
            yield
        finally:
            handle.remove()
        self._sums += self._step  # not where the step ran out of memory: it is done again

    @torch.no_grad()
    def _count(self, module: torch.nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        x, logits = given[0].detach().float(), answer.logits.detach().float()
        named, c = logits.argmax(1).flatten(), self.method.classes
        found = torch.zeros_like(self._sums)
        # An index_add of ones is exact in any order, and unlike bincount its size is not read from the device.
        found[:c].index_add_(0, named, torch.ones_like(named, dtype=found.dtype))
        found[c] += len(x)
        found[c + 2] = len(named) * F.softmax(logits, 1).amax(1).mean()
        if len(x) > 1:
            found[c + 1] += 1
            found[c + 3] = (2 * x.var(0).mean()).sqrt()
        self._step += torch.where(found.isfinite().all(), found, torch.zeros_like(found))  # what is not finite is another guard's

    def counted(self) -> Tensor:
        """[C + 4] this rank's counts since the last window that was judged; on the device."""
        return self._sums

    def judge_counted(self, total: list[float]) -> None:
        """Judge `counted` summed over the ranks, where it holds enough images: equal on all ranks, as what follows from it is."""
        c = self.method.classes
        counts, (images, calls, confidence, distance) = total[:c], total[c:]
        if images < WINDOW:
            return
        self._sums.zero_()
        answers = sum(counts)
        entropy = sum(k / answers * math.log(answers / k) for k in counts if k)
        health = {
            "balance": entropy / math.log(max(2.0, min(c, answers))),
            "confidence": confidence / answers,
        }
        self._judge("windows", WINDOWS, health | ({"distance": distance / calls} if calls else {}))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run that is continued says what an undisturbed one says, when it says it. A collective."""
        return {"said": sorted(self._said), "low": self._low, "counted": ranks.total(self._sums).tolist()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a `state`; what was said since stays said."""
        self._said |= set(saved["said"])
        for kind, low in saved["low"].items():
            self._low[kind].update(low)
        self._sums.zero_()
        if ranks.rank() == 0:  # who holds the sum does not matter
            self._sums.copy_(torch.tensor(saved["counted"], dtype=self._sums.dtype))

    def clear(self) -> None:
        """Forget what was counted and how often it was low: the run has gone back. What was said stays said."""
        self._sums.zero_()
        for low in self._low.values():
            low.update(dict.fromkeys(low, 0))

    def judge(self, health: dict[str, float], *, trained: bool) -> None:
        """Look at an epoch.

        Args:
          health: values of `evaluation.health`, read. trained: whether the student was trained in this epoch.
        """
        self._judge("epochs", EPOCHS, {n: v for n, v in health.items() if n != "agreement" or trained})

    def _judge(self, kind: str, looks: int, health: dict[str, float]) -> None:
        for name, value in health.items():
            least = THRESHOLDS[name].least(self.method.classes)
            low = self._low[kind]
            low[name] = low[name] + 1 if not value >= least else 0
            if low[name] >= looks and name not in self._said:
                self._said.add(name)
                said = THRESHOLDS[name].text.format(value=value)
                self.events.write("warning", guard="collapse", text=f"collapse: {said} (warned below {least:.3g})")
