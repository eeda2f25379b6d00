"""What takes minutes: a run that is killed two hundred times at random moments (T33), ranks that are restarted twenty times (T7)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from fastkd.engine import checkpoint
from tests.faults import forked

pytestmark = pytest.mark.soak

KILLS, LEAST, SECONDS, SEED = 200, 50, 360, 33
EPOCHS, EVERY, KEEP = 48, 2, 2
VARIANT = ("fast", {"epochs": EPOCHS})
PLACES = {"step": 6, "update": 6, "evaluation": 1, "write": 8, "half-write": 8, "rename": 2, "latest": 2, "prune": 2}
"""Where a run is killed, and how often at most it is there first: not always far enough for a new checkpoint, now and then for two."""


def bytes_below(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def grown() -> tuple[int, int, int]:
    """Open files and threads of this process, and its children."""
    children = Path("/proc/self/task") / str(os.getpid()) / "children"
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(children.read_text().split())


@pytest.mark.fault("T33")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files and threads in /proc")
def test_two_hundred_kills_in_one_run(tmp_path, tries):
    draw, out, clean = random.Random(SEED), tmp_path / "run", tmp_path / "clean"
    assert forked.run(clean, variant=VARIANT) == [0]
    one = max(bytes_below(path) for path in checkpoint.listed(clean / "checkpoints"))
    before, began, kills, most, steps = grown(), time.monotonic(), 0, 0, [0]
    while kills < KILLS and time.monotonic() - began < SECONDS:
        at, most_often = draw.choice(list(PLACES.items()))
        plant = {"do": "kill", "rank": 0, "at": at, "step": draw.randint(1, most_often)}
        (code,) = forked.run(out, plant=plant, variant=VARIANT, every_steps=EVERY, keep=KEEP)
        assert code == -signal.SIGKILL, "a run that comes to its end before its last kill wants more epochs"
        kills += 1
        most = max(most, bytes_below(out / "checkpoints"))
        found = checkpoint.listed(out / "checkpoints")
        steps.append(int(found[0].name[5:]) if found else 0)
    assert forked.run(out, variant=VARIANT, every_steps=EVERY, keep=KEEP) == [0]
    tries(kills, kills)
    assert not forked.differing(forked.state(out), forked.state(clean)) and forked.log(out) == forked.log(clean)
    assert kills >= LEAST, f"{kills} kills in {SECONDS} s show little"
    assert most < (KEEP + 3) * one, "what dead saves leave behind does not add up"
    assert grown() == before
    assert len(set(steps)) > kills // 5, "the run went on between the kills"


@pytest.mark.fault("T7")
def test_twenty_restarts_in_which_a_rank_comes_late(ranks, undisturbed, tries):
    """Of each start but the last, rank 1 comes 1.5 s late, and leaves as soon as both have met."""
    late = 20
    plant = {"rank": 1, "at": "joined", "do": "exit", "value": 3, "attempt": list(range(late)), "late": 1.5}
    done = ranks.run("late", "--max-restarts", late, plant=plant, limit=1800)
    assert done.returncode == 0, done.stderr
    assert ranks.attempts("late") == late + 1 and ranks.student("late") == ranks.student(undisturbed)
    (launch,) = (ranks.parent / "late" / "logs").iterdir()
    met = [(launch / f"attempt_{n}" / "1" / "stderr.log").read_text() for n in range(late)]
    tries(late, sum("planted: joined" in text for text in met))
    assert all("planted: joined" in text for text in met)
