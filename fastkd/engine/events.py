"""What happened in a run: one JSON object a line in events.jsonl, the state of the process in status.json, and listeners."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastkd.files import write_atomic

Listener = Callable[[dict[str, Any]], None]


STARTING = ("start", "changed", "warning", "resumed")
"""What is written of a start before its first step."""


class Events:
    """Writes events and hands them to listeners. A log that cannot be written never ends a run.

    Args:
      out: the run folder, or None to write nothing.
      listeners: called with every event; `poll` events go to them only.
    """

    def __init__(self, out: Path | None, listeners: list[Listener] | None = None):
        self.out, self.listeners, self.lost = out, listeners or [], 0
        self.epochs: list[dict[str, Any]] = []
        self.step = 0  # of the last epoch's end, or checkpoint, of this start

    def tell(self, kind: str, **values: Any) -> None:
        """Hand an event to the listeners without writing it."""
        for listener in self.listeners:
            listener({"kind": kind, **values})

    def write(self, kind: str, **values: Any) -> None:
        """Write an event as one line and hand it to the listeners."""
        self.tell(kind, **values)
        if kind == "epoch":
            self.epochs.append({"kind": kind, **values})
        if kind in ("epoch", "checkpoint"):
            self.step = values.get("step", self.step)
        if self.out is None:
            return
        try:
            with open(self.out / "events.jsonl", "ab+") as f:
                f.write(_line_end(f) + json.dumps({"kind": kind, "time": round(time.time(), 3), **values}).encode() + b"\n")
        except OSError:
            self.lost += 1

    def status(self, state: str, **values: Any) -> None:
        """Replace status.json: running, done, preempted or fatal, with the exit code where there is one."""
        if self.out is None:
            return
        try:
            body = json.dumps({"state": state, "time": round(time.time(), 3), **values}).encode()
            write_atomic(self.out / "status.json", body, writer=f"-{os.getpid()}")  # any rank may say why it ends the run
        except OSError:
            self.lost += 1


def _line_end(f: BinaryIO) -> bytes:
    """What ends the last line of a file where a crash or a full disk tore it; the next event would be lost with it."""
    if f.seek(0, os.SEEK_END) == 0:
        return b""
    f.seek(-1, os.SEEK_END)
    return b"" if f.read(1) == b"\n" else b"\n"


class Heartbeat:
    """A listener that keeps status.json of a running run fresh: position, speed, phase; every few seconds."""

    KEPT = ("epoch", "epochs", "step", "steps", "phase", "steps_per_second", "images_per_second")

    def __init__(self, events: Events, seconds: float = 5.0):
        self.events, self.seconds, self._last = events, seconds, time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "poll" and time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            if self.events.out is not None and final(self.events.out):
                return  # another rank has ended the run; this one is about to notice
            self.events.status("running", **{k: event[k] for k in self.KEPT if k in event})


def final(out: Path) -> dict[str, Any] | None:
    """status.json where it says that the run must not simply be started again: fatal with a code of its own, or preempted."""
    try:
        status: dict[str, Any] = json.loads((out / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    return status if status.get("state") == "preempted" or (status.get("state") == "fatal" and status.get("code") != 1) else None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a file; a torn or foreign line is skipped."""
    with open(path, encoding="utf-8", errors="replace") as f:
        yield from parsed(f)


def parsed(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """Events of lines; a torn or foreign one is skipped."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            yield event


def curve(path: Path) -> list[dict[str, Any]]:
    """The epoch events of a run in order, the last one written for each epoch (a resumed run writes some twice), since it last started
    from the beginning."""
    found: dict[int, dict[str, Any]] = {}
    starting = False
    for e in read(path):
        if e["kind"] in STARTING:
            starting = e["kind"] != "resumed" and (starting or e["kind"] == "start")
            continue
        if starting:  # and nothing was resumed
            found, starting = {}, False
        if e["kind"] == "epoch" and "epoch" in e:
            found[e["epoch"]] = e
    return [e for _, e in sorted(found.items())]
