"""The live view of a run on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastkd.cli.terminal import DRAW_SECONDS, Show
from fastkd.cli.words import SCORES, duration, percent, sparkline


class Board(Show):
    """Progress bar, phase, speed, time left, accuracy against the teacher's, loss terms and the curve so far."""

    def __init__(
        self, stream: TextIO, now: Callable[[], float] = time.monotonic, console: Console | None = None, folder: Path | None = None
    ):
        super().__init__(stream, now, folder)
        self.console = console or Console(file=stream, highlight=False)
        self.live: Live | None = Live(console=self.console, auto_refresh=False, transient=True)
        self._drawn_at = -1e9
        self.live.start()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def line(self, text: str) -> None:
        style = "yellow" if text.startswith("warning") else "dim" if text.startswith("  ") else ""
        self.console.print(Text(text, style=style))

    def draw(self, *, at_once: bool = False) -> None:
        if self.live is None or not (at_once or self.now() - self._drawn_at >= DRAW_SECONDS):
            return
        self._drawn_at = self.now()
        self.live.update(self.render(), refresh=True)

    def render(self) -> Group:
        """The picture of the present state."""
        left, grid = self.eta(), Table.grid(padding=(0, 2))
        grid.add_row(
            Text(f"epoch {min(self.epoch + 1, self.epochs or 1)}/{self.epochs}", style="bold"),
            ProgressBar(total=max(1, self.steps), completed=min(self.step, self.steps), width=40),
            Text(f"{self.step}/{self.steps}" if self.steps else str(self.step)),
            Text(self.phase, style="cyan"),
            Text(self.speed()),
            Text(f"ETA {duration(left)}" if left is not None else ""),
        )
        rows: list[Table | Text] = [grid]
        if self.scores:
            best = f"  best {percent(max(self.scores))} (selected on test data)" if self.score_name in SCORES else ""
            rows.append(Text.assemble((self.accuracy(), "bold green"), (best, "dim"), "  ", (sparkline(self.scores), "green")))
        elif self.teacher_score is not None:
            rows.append(Text(f"teacher {percent(self.teacher_score)}; the student has not been measured yet", style="dim"))
        if self.terms:
            rows.append(Text("  ".join(self.losses()), style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*rows)
