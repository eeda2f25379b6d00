"""What a run shows while it goes on: a live view on a terminal, a line an epoch everywhere else. All of it on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fastkd.cli.words import SCORES, duration, judged_by, number, percent

Event = dict[str, Any]
LINE_SECONDS, QUIET_SECONDS, TERMS_SECONDS, DRAW_SECONDS = 2.0, 60.0, 1.0, 0.2


def interactive(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a live view makes sense: a terminal that is neither dumb, nor a build machine's, nor asked to be plain."""
    return stream.isatty() and not environment.get("CI") and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def listener(folder: Path | None = None, stream: TextIO | None = None) -> Show:
    """The view that suits the stream (default: stderr); a context manager, and callable with events.

    Args:
      folder: the run folder, named when the run begins.
    """
    stream = sys.stderr if stream is None else stream
    if interactive(stream):
        from fastkd.cli.board import Board

        return Board(stream, folder=folder)
    return Lines(stream, folder=folder)


class Show:
    """What is known of a run from its events; subclasses draw it.

    Args:
      stream: where to draw. now: a clock that never goes back. folder: the run folder.
    """

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic, folder: Path | None = None):
        self.stream, self.now, self.folder = stream, now, folder
        self.title, self.teacher_score = "", None
        self.epoch, self.epochs, self.step, self.steps, self.phase = 0, 0, 0, 0, ""
        self.steps_per_second: float | None = None
        self.images_per_second: float | None = None
        self.scores: list[float] = []
        self.score_name = "top1"
        self.terms: dict[str, float] = {}
        self._terms_at = -1e9

    def __enter__(self) -> Show:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self.close()

    def __call__(self, event: Event) -> None:
        """Take an event of any kind; kinds that are not drawn are passed over."""
        handler = getattr(self, f"on_{event['kind']}", None)
        if handler is not None:
            with contextlib.suppress(OSError):  # a full disk behind 2>FILE, a reader that went away: the run goes on
                handler(event)

    def close(self) -> None:
        """Leave the terminal as it was."""

    def line(self, text: str) -> None:
        """One line that stays."""
        raise NotImplementedError

    def draw(self, *, at_once: bool = False) -> None:
        """Show the state."""

    # Events -----------------------------------------------------------------------------------------------------------

    def on_start(self, event: Event) -> None:
        student, teacher = event.get("student") or {}, event.get("teacher") or {}
        self.teacher_score = teacher.get(judged_by(teacher))
        self.epochs = event.get("epochs", 0)
        pair = f"{teacher['spec']} → {student.get('spec')}" if teacher.get("spec") else str(student.get("spec"))
        data = f", measured on {event['data']}" if event.get("data") not in (None, "none") else ", no evaluation data"
        self.title = f"{event.get('method')}: {pair}{data} ({event.get('device')}, {event.get('precision')})"
        self.line(self.title)
        if self.folder is not None:
            self.line(f"run folder: {self.folder}")
        for note in event.get("notes", []):
            self.line(f"  {note}")
        self.draw(at_once=True)

    def on_resumed(self, event: Event) -> None:
        if self.epochs and event["epoch"] >= self.epochs:
            self.line(f"the run was already done, after {event['epoch']} epochs; no step was left to do")
            return
        self.line(f"continued from {event.get('checkpoint', 'a checkpoint')} (epoch {event['epoch']}, step {event['step']})")

    def on_warning(self, event: Event) -> None:
        self.line(f"warning: {event['text']}")

    def on_poll(self, event: Event) -> None:
        self.epoch, self.epochs, self.step, self.steps = event["epoch"], event["epochs"], event["step"], event["steps"]
        self.phase, self.steps_per_second = event.get("phase", ""), event.get("steps_per_second")
        self.images_per_second = event.get("images_per_second")
        if callable(event.get("terms")) and self.now() - self._terms_at >= TERMS_SECONDS and self.wants_terms():
            self._terms_at = self.now()
            self.terms = event["terms"]()
        self.draw()

    def wants_terms(self) -> bool:
        """Whether the means of the running epoch are shown; reading them costs one look at the device."""
        return True

    def on_epoch(self, event: Event) -> None:
        self.epoch, self.step, self.steps = event["epoch"], event["step"], event.get("steps", self.steps)
        self.terms = event.get("terms", {})
        self.score_name = next((k for k in (*SCORES, "agreement") if event.get(k) is not None), self.score_name)
        if event.get(self.score_name) is not None and event.get("trained", True):
            self.scores.append(event[self.score_name])
        self.draw()

    # Words ------------------------------------------------------------------------------------------------------------

    def eta(self) -> float | None:
        """Seconds to the end at the present speed, never negative; None while nothing is known."""
        if not self.steps_per_second or not self.steps:
            return None
        return max(0.0, (self.steps - self.step) / self.steps_per_second)

    def speed(self) -> str:
        if self.images_per_second:
            return f"{self.images_per_second:.0f} images/s"
        return f"{self.steps_per_second:.1f} steps/s" if self.steps_per_second else ""

    def accuracy(self) -> str:
        """The newest score beside the teacher's."""
        if not self.scores:
            return ""
        if self.score_name not in SCORES:
            return f"agrees with teacher {percent(self.scores[-1])}"
        beside = f" (teacher {percent(self.teacher_score)})" if self.teacher_score is not None else ""
        return f"{SCORES[self.score_name]} {percent(self.scores[-1])}{beside}"

    def losses(self) -> list[str]:
        """Terms as 'kl 0.12'; shares of skipped steps only where there were any."""
        shown = []
        for name, value in self.terms.items():
            step, _, term = name.rpartition(".")
            if term != "skipped":
                shown.append(f"{term} {number(value)}")
            elif value:
                shown.append(f"{step or 'all'}: {100 * value:.1f} % of steps not finite, skipped")
        return shown


class Lines(Show):
    """Plain log lines: an epoch at most every two seconds, a sign of life every minute within a long epoch, the last epoch always."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic, folder: Path | None = None):
        super().__init__(stream, now, folder)
        self._last, self._pending = -1e9, False

    def line(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()

    def wants_terms(self) -> bool:
        return self.now() - self._last >= QUIET_SECONDS

    def on_poll(self, event: Event) -> None:
        super().on_poll(event)
        if self._last < 0:
            self._last = self.now()
        elif self.now() - self._last >= QUIET_SECONDS:
            self._say()

    def on_epoch(self, event: Event) -> None:
        super().on_epoch(event)
        self._pending = True
        if self.now() - self._last >= LINE_SECONDS or self.epoch + 1 >= self.epochs:
            self._say()

    def close(self) -> None:
        if self._pending:
            self._say()

    def _say(self) -> None:
        self._last, self._pending = self.now(), False
        width, left = len(str(self.epochs)), self.eta()
        parts = [f"epoch {self.epoch + 1:{width}d}/{self.epochs}", f"step {self.step}/{self.steps}" if self.steps else f"step {self.step}",
                 self.accuracy(), *self.losses(), self.speed(), f"ETA {duration(left)}" if left is not None else ""]  # fmt: skip
        self.line("  ".join(p for p in parts if p))
