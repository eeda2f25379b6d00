"""Shows a run that other processes make: the launcher draws what rank 0 writes down."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from fastkd.engine import events

SECONDS = 0.5


class Follower:
    """Hands the events of a run folder to a listener while they are written; a context manager.

    Args:
      out: run folder; what it holds already is passed over.
      show: takes events, as `engine.events.Listener`.
    """

    def __init__(self, out: Path, show: Callable[[dict[str, Any]], None]):
        self.out, self.show = out, show
        self._at = self._size()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _size(self) -> int:
        try:
            return (self.out / "events.jsonl").stat().st_size
        except OSError:
            return 0

    def _follow(self) -> None:
        while not self._done.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        for event in self._new():
            self.show(event)
        try:
            status = json.loads((self.out / "status.json").read_bytes())
        except (OSError, ValueError):
            return
        if status.get("state") == "running" and "step" in status:
            self.show({**status, "kind": "poll"})

    def _new(self) -> list[dict[str, Any]]:
        """Events of the lines that are complete and were not read yet."""
        try:
            with open(self.out / "events.jsonl", "rb") as f:
                f.seek(self._at)
                data = f.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return list(events.parsed(whole.splitlines()))
