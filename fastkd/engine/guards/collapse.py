"""Whether the synthetic images still teach: measured on the newest of them at the end of each epoch, said once where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastkd.engine.events import Events
from fastkd.method import Method

LOOKS = 2
"""Looks in a row beyond a threshold before it is said: the first images of a run are poor."""


@dataclass(frozen=True)
class Threshold:
    """A value below which images no longer teach. `least`: of the number of classes."""

    least: Callable[[int], float]
    text: str


THRESHOLDS = {
    "balance": Threshold(lambda c: 0.5, "few classes are left among the synthetic images: their entropy is {value:.0%} of an even spread"),
    "confidence": Threshold(
        lambda c: max(2 / c, 0.05), "the teacher does not know what the synthetic images are: its confidence is {value:.1%}"
    ),
    "distance": Threshold(
        lambda c: 0.05, "the synthetic images are nearly all the same: two of them differ by {value:.3f} standard deviations"
    ),
    "agreement": Threshold(
        lambda c: 1.5 / c, "the student does no better than chance on the synthetic images: it agrees with the teacher on {value:.1%}"
    ),
}


class Collapse:
    """Compares the health of each epoch with the thresholds and warns once a run for each."""

    def __init__(self, method: Method, events: Events):
        self.method, self.events = method, events
        self._low = dict.fromkeys(THRESHOLDS, 0)

    def judge(self, health: dict[str, float], *, trained: bool) -> None:
        """Look at an epoch.

        Args:
          health: values of `evaluation.health`, read. trained: whether the student was trained in this epoch.
        """
        for name, threshold in THRESHOLDS.items():
            least = threshold.least(self.method.classes)
            if name not in health or (name == "agreement" and not trained):
                continue
            low = not health[name] >= least
            self._low[name] = self._low[name] + 1 if low or self._low[name] >= LOOKS else 0
            if low and self._low[name] == LOOKS:
                said = threshold.text.format(value=health[name])
                self.events.write("warning", guard="collapse", text=f"collapse: {said} (warned below {least:.3g})")
