"""A sign of life of every rank: `heartbeats/rank-R.json` says what it does and since when, also while its main thread waits or hangs.

A thread of each rank writes the file every few seconds. It also looks at the others': where they wait in a collective and this rank is
the one that does not come, it says where this rank hangs and ends it, before the process group's timeout ends the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fastkd import ranks
from fastkd.engine import launch
from fastkd.files import write_atomic

FOLDER = "heartbeats"
SECONDS = 5.0
"""Between two signs of life."""
PATIENCE = 0.8
"""Share of the process group's timeout after which a rank that others wait for is given up."""
STALE = 6.0
"""Signs of life that must be missed before a rank counts as gone."""


class Beat:
    """What a rank is doing. `now` is called by the loop and costs an assignment; the rest happens in a thread."""

    def __init__(self, out: Path | None, thread: int):
        self.out, self.thread, self.rank, self.world = out, thread, ranks.rank(), ranks.world()
        self._at: tuple[str, str, int, int, float] = ("start", "start", 0, 0, time.monotonic())
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._seconds = min(SECONDS, launch.TIMEOUT.total_seconds() / 10)

    def now(self, phase: str, name: str, epoch: int, step: int) -> None:
        """Entering a step or another part of the run."""
        self._at = (phase, name, epoch, step, time.monotonic())

    def moves(self) -> None:
        """What it is doing gets on: some of a large file is written (`files.told`)."""
        self._moved = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What the file holds. since: seconds in this step; still: seconds in which nothing has moved; waiting: in a collective, for other
        ranks; at: where in the code."""
        phase, name, epoch, step, began = self._at
        at, waiting = _where(sys._current_frames().get(self.thread))
        now, moved = time.monotonic(), max(began, self._moved)
        return {
            **{"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": phase, "name": name, "epoch": epoch},
            **{"step": step, "since": round(now - began, 1), "still": round(now - moved, 1), "waiting": waiting, "at": at},
            **{"every": self._seconds, "time": round(time.time(), 3)},
        }

    def watch(self, out: Path) -> None:
        """The thread: write, look, until the run ends."""
        while True:
            mine = self.state()
            with contextlib.suppress(OSError):
                (out / FOLDER).mkdir(exist_ok=True)
                write_atomic(out / FOLDER / f"rank-{self.rank}.json", json.dumps(mine).encode())
            if self.world > 1 and hangs(mine, read(out), launch.TIMEOUT.total_seconds() * PATIENCE):
                self._give_up(mine)
            if self._done.wait(self._seconds):
                return

    def _give_up(self, mine: dict[str, Any]) -> None:
        faulthandler.dump_traceback(file=sys.stderr)
        sys.stderr.write(f"fastkd: rank {self.rank} hangs, and the others wait for it: {sentence(mine)}.\n")
        launch.leave(1)

    def end(self) -> None:
        self._done.set()


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """`file:line` of the innermost frame, and whether that is inside torch.distributed."""
    if frame is None:
        return "", False
    path = Path(frame.f_code.co_filename)
    waiting, inner = False, frame
    while inner is not None and not waiting:
        # Under NCCL a collective returns at once: it is waited for where its result is read.
        read = inner.f_code.co_name == "look" and inner.f_globals.get("__name__") == "fastkd.engine.guards"
        waiting = read or "torch/distributed/" in inner.f_code.co_filename.replace(os.sep, "/")
        inner = inner.f_back  # type: ignore[assignment]
        if inner is not None and "fastkd" in inner.f_code.co_filename:
            break
    return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}", waiting


@contextlib.contextmanager
def beating(out: Path | None) -> Iterator[Beat]:
    """Give signs of life in `out` for the duration; with None nothing is written."""
    beat = Beat(out, threading.get_ident())
    if out is None:
        yield beat
        return
    thread = threading.Thread(target=beat.watch, args=(out,), daemon=True, name="heartbeat")
    thread.start()
    try:
        yield beat
    finally:
        beat.end()
        thread.join()


def read(out: Path) -> list[dict[str, Any]]:
    """The newest sign of life of every rank, by rank; unreadable files are passed over."""
    found = []
    for path in (out / FOLDER).glob("rank-*.json"):
        try:
            beat = json.loads(path.read_bytes())
            found.append({**beat, "rank": int(beat["rank"]), "age": max(0.0, round(time.time() - float(beat["time"]), 1))})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda b: b["rank"])


def hangs(mine: dict[str, Any], beats: list[dict[str, Any]], patience: float) -> bool:
    """Whether a rank hangs: nothing has moved in it for `patience` seconds, it waits for nobody, and another has waited for as long."""
    if mine["waiting"] or mine["still"] < patience:
        return False
    return any(b["waiting"] and b["since"] >= patience and b["age"] < STALE * b["every"] for b in beats if b["rank"] != mine["rank"])


def suspects(beats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranks for which others wait, or that have stopped to give signs of life while others went on."""
    if len(beats) < 2:
        return []
    freshest = min(b["age"] for b in beats)
    gone = [b for b in beats if b["age"] > freshest + STALE * b["every"]]
    waiting = any(b["waiting"] for b in beats)
    return gone or ([b for b in beats if not b["waiting"]] if waiting else [])


def sentence(beat: dict[str, Any]) -> str:
    """Where a rank was last seen."""
    where = f", at {beat['at']}" if beat.get("at") else ""
    step = f"{beat['phase']} step '{beat['name']}' (epoch {beat['epoch']}, step {beat['step']})"
    who = f"rank {beat['rank']} (process {beat['pid']} on {beat['host']})"
    return f"{who} was last seen in {step}, {beat['since']:.0f} s after it began{where}"
