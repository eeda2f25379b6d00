"""`fastkd run` in a process of its own that is given so much CPU time: the curve of accuracy against CPU seconds.

CPU time (user + system, all threads of the process) is what a run costs whatever else the machine does meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastkd.engine.events import parsed

TICK = 0.1
"""Seconds between looks at the process: what a point of a curve may be late."""
GRACE = 60.0
"""Seconds that a run has to save and leave once it was told to."""
FREE = 0.05
"""Share of a budget that a plan leaves free: an epoch costs more CPU time while other processes fill the caches."""


class BenchError(Exception):
    """Why there is no record."""


@dataclasses.dataclass
class Spent:
    """What a run gave for its CPU time.

    Attributes:
      code: exit code; 75 where the budget ended before the run did. seconds: CPU seconds from start to exit.
      start: CPU seconds before the first step: imports, networks, the teacher's own accuracy.
      points: (CPU seconds, epoch event) of every epoch, in order. teacher: as the start event has it. said: what the run printed.
    """

    code: int
    seconds: float
    start: float
    points: list[tuple[float, dict[str, Any]]]
    teacher: dict[str, Any]
    said: str

    @property
    def evaluation(self) -> float:
        """CPU seconds of evaluation: its share of the epochs' wall seconds, of the CPU seconds that they took."""
        wall = sum(sum(e["seconds"].values()) for _, e in self.points)
        share = sum(e["seconds"].get("evaluation", 0.0) for _, e in self.points) / max(wall, 1e-9)
        return share * ((self.points[-1][0] if self.points else 0.0) - self.start)

    def top1(self) -> list[list[float]]:
        """[CPU seconds, top-1 %] of every epoch that trained the student."""
        return [[round(s, 1), round(100 * e["top1"], 2)] for s, e in self.points if e["trained"] and "top1" in e]


def spend(words: Sequence[str], out: Path, budget: float, threads: int = 1) -> Spent:
    """Run `fastkd run` with `words` into the new folder `out`; told to stop (SIGTERM) once it has used `budget` CPU seconds.

    Raises:
      OSError: no /proc (the CPU time of another process is read there).
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.parent / f"{out.name}.log"
    command = [sys.executable, "-m", "fastkd", "run", *words, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin, points, teacher, at, seconds, told = 0.0, [], {}, 0, 0.0, 0.0
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while True:
                ended = process.poll() is not None
                seconds = seconds if ended else max(seconds, cpu_seconds(process.pid))
                at, events = tail(out / "events.jsonl", at)
                for event in events:
                    if event["kind"] == "start":
                        begin, teacher = seconds, event["teacher"]
                    elif event["kind"] == "epoch":
                        points.append((seconds, event))
                    elif event["kind"] == "done":  # a signal would now only kill what is ending anyway
                        told = time.monotonic()
                if ended:
                    break
                if seconds >= budget and not told:
                    told = time.monotonic()
                    process.send_signal(signal.SIGTERM)
                elif told and time.monotonic() - told > GRACE:
                    process.kill()
                time.sleep(TICK)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return Spent(process.returncode, seconds, begin, points, teacher, log.read_text(encoding="utf-8", errors="replace"))


def plan(words: Callable[[int, int], list[str]], out: Path, budget: float, warmup: float, threads: int = 1) -> dict[str, Any]:
    """How many epochs a budget holds, so that a schedule over the epochs ends when the budget does; from a probe of two epochs.

    Args:
      words: words of `fastkd run` for (epochs, of which warm-up). out: the probe's run folder.
      warmup: share of the epochs that are warm-up, 0 … 1.
    Returns:
      `epochs`, `warmup`; and of the probe the CPU seconds of its `start`, of a `warmup_epoch` and of a training `epoch`.
    Raises:
      BenchError: the probe failed, or the budget holds no epoch.
    """
    spent = spend(words(2, 1 if warmup else 0), out, budget, threads)
    if spent.code or len(spent.points) < 2:
        late = spent.code in (75, -signal.SIGTERM)  # the latter: before the run listened to signals
        why = f"used up {budget:g} CPU seconds" if late else f"ended with code {spent.code}: {spent.said.strip()[-400:]}"
        raise BenchError(f"a probe of two epochs {why}")
    first, last = (seconds for seconds, _ in spent.points)
    making, training = first - spent.start, last - first
    share = warmup * making + (1 - warmup) * training
    epochs = int(((1 - FREE) * budget - spent.start) / max(share, 1e-9))
    if epochs < 1 + bool(warmup):
        raise BenchError(f"{budget:g} CPU seconds hold no training epoch: one takes {training:.1f}, the start {spent.start:.1f}")
    early = min(epochs - 1, max(1, round(warmup * epochs))) if warmup else 0
    cost = {"start": round(spent.start, 1), "warmup_epoch": round(making, 1), "epoch": round(training, 1)}
    return {"epochs": epochs, "warmup": early, **cost}


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process and its threads so far; 0 once it is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except FileNotFoundError:
        if not Path("/proc/self/stat").exists():
            raise
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def tail(path: Path, at: int) -> tuple[int, list[dict[str, Any]]]:
    """Events of whole lines after byte `at`, and the byte to go on from."""
    try:
        with open(path, "rb") as file:
            file.seek(at)
            new = file.read()
    except FileNotFoundError:
        return at, []
    whole = new[: new.rfind(b"\n") + 1]
    return at + len(whole), list(parsed(whole.splitlines()))


def older(path: Path, **same: Any) -> dict[str, Any]:
    """The record at `path`, so that a run can add to it; {} where there is none, or where it differs in one of the fields `same`."""
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return found if all(found.get(k) == v for k, v in same.items()) else {}


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
