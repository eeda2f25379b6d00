"""A rank dies at every kind of moment, on one and on two ranks, and the run goes on to the same bits (T3)."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import accumulate
from pathlib import Path

import pytest

from fastkd.engine import checkpoint
from fastkd.method import steps
from tests import small
from tests.faults import forked

pytestmark = pytest.mark.faults

EVERY, KEEP = 3, 2
ENDS = list(accumulate(sum(1 for _ in steps(small.prepared("fast"), e)) for e in range(3)))
"""Number of the last step of each epoch."""
MOMENTS = {
    "at the first step": ("step", 1),
    "in mid-epoch": ("step", (ENDS[0] + ENDS[1]) // 2),
    "at the last step of an epoch": ("step", ENDS[1]),
    "in a synthesis step": ("update", 2),
    "in a student step": ("update", 9),
    "in an evaluation": ("evaluation", 2),
    "during save": ("half-write", 6),
    "between the writes": ("write", 7),
    "before the manifest": ("write", 8),
    "after manifest before rename": ("rename", 2),
    "after rename before LATEST": ("latest", 2),
    "while an old one is removed": ("prune", 1),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, Path]:
    """Folders of runs that nothing happened to, by number of ranks."""
    folders = {world: tmp_path_factory.mktemp("undisturbed") / str(world) for world in (1, 2)}
    for world, out in folders.items():
        assert forked.run(out, world=world, every_steps=EVERY, keep=KEEP) == [0] * world
    return folders


@pytest.mark.fault("T3")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_it_is_the_same_to_the_bit(moment, world, undisturbed, tmp_path):
    at, step = MOMENTS[moment]
    saves = at in ("half-write", "write", "rename", "latest", "prune")
    plant = {"do": "kill", "rank": 0 if saves else world - 1, "at": at, "step": step}  # rank 0 writes
    out = tmp_path / "run"
    codes = forked.run(out, world=world, plant=plant, every_steps=EVERY, keep=KEEP)
    assert codes[plant["rank"]] == -signal.SIGKILL and 0 not in codes
    for path in checkpoint.listed(out / "checkpoints"):
        if at != "prune" or path != checkpoint.listed(out / "checkpoints")[-1]:  # the one that was being removed
            checkpoint.verify(path)
    assert forked.run(out, world=world, every_steps=EVERY, keep=KEEP) == [0] * world
    assert not forked.differing(forked.state(out), forked.state(undisturbed[world]))
    assert forked.log(out) == forked.log(undisturbed[world])
    names = os.listdir(out / "checkpoints")
    assert len([n for n in names if n.startswith("step-")]) <= KEEP and not [n for n in names if "tmp" in n or "old" in n], names


@pytest.mark.fault("T3")
@pytest.mark.parametrize("at", ["rename", "latest"])
def test_the_only_checkpoint_is_never_away_while_one_of_the_same_step_replaces_it(at, undisturbed, tmp_path):
    """The last step of a run is saved when it is due and again at the end; with `keep` 1 nothing else is there."""
    whole = tmp_path / "whole"
    last = ENDS[2]
    assert forked.run(whole, every_steps=last, keep=1) == [0]
    for step in (2, 3) if at == "rename" else (2,):  # the first rename is that of the first save
        out = tmp_path / f"{at}-{step}"
        assert forked.run(out, plant={"do": "kill", "rank": 0, "at": at, "step": step}, every_steps=last, keep=1) == [-signal.SIGKILL]
        before = shutil.copytree(out, tmp_path / f"copy-{at}-{step}")
        assert forked.state(before)["position"] in ((2, ENDS[2] - ENDS[1]), (3, 0))
        assert forked.run(out, every_steps=last, keep=1) == [0]
        assert not forked.differing(forked.state(out), forked.state(whole))
