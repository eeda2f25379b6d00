"""What ranks say of themselves while they work, and who is named when others wait for one that does not come."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import files
from fastkd.engine import checkpoint, heartbeat, launch, loop
from fastkd.engine.events import Events
from fastkd.engine.guards import Guards
from tests import small


def beat(rank, *, waiting=False, since=50.0, still=None, age=1.0):
    return {"rank": rank, "waiting": waiting, "since": since, "still": since if still is None else still, "age": age, "every": 5.0}


def test_a_rank_hangs_when_others_have_waited_for_it_long_enough():
    me, waits = beat(1), beat(0, waiting=True)
    assert heartbeat.hangs(me, [waits, me], 48)
    assert not heartbeat.hangs(me, [waits, me], 60)  # too early
    assert not heartbeat.hangs(me, [beat(0), me], 48)  # nobody waits: a long step of all
    assert not heartbeat.hangs(me, [beat(0, waiting=True, since=3.0), me], 48)
    assert not heartbeat.hangs(me, [beat(0, waiting=True, age=100.0), me], 48)  # an old file
    assert not heartbeat.hangs(beat(1, waiting=True), [beat(0, waiting=True)], 48)
    assert not heartbeat.hangs(beat(1, still=3.0), [waits, me], 48)  # it writes: some of its file has just reached the disk
    assert heartbeat.hangs(beat(1, since=900.0, still=49.0), [waits, me], 48)  # the disk does not answer


def test_suspects_are_those_that_do_not_wait_or_have_gone_silent():
    assert heartbeat.suspects([beat(0), beat(1)]) == []
    assert heartbeat.suspects([beat(0, waiting=True), beat(1)]) == [beat(1)]
    assert heartbeat.suspects([beat(0, waiting=True), beat(1, waiting=True, age=90.0)]) == [beat(1, waiting=True, age=90.0)]
    assert heartbeat.suspects([beat(0, waiting=True)]) == []


def test_a_rank_that_ran_into_a_timeout_names_the_one_it_waited_for():
    more = {"pid": 7, "host": "h", "phase": "synthesis", "name": "adapt", "epoch": 1, "step": 9, "at": "a.py:3 in f"}
    beats = [beat(0, waiting=True) | more, beat(1) | more]
    assert launch.waited_for(0, beats) == [
        "it waited for others: rank 1 (process 7 on h) was last seen in synthesis step 'adapt' (epoch 1, step 9), 50 s after it began, "
        "at a.py:3 in f"
    ]
    assert launch.waited_for(1, beats) == [] == launch.waited_for(0, [beat(0) | more, beat(1) | more])


def test_reading_what_the_guards_have_gathered_is_waiting_for_others():
    def frame_of(name, module):
        space = {"__name__": module, "sys": sys}
        exec(f"def {name}():\n    return sys._getframe()", space)
        return space[name]()

    waiting = {(name, module): heartbeat._where(frame_of(name, module))[1] for name in ("look", "step")
               for module in ("fastkd.engine.guards", "fastkd.engine.loop")}  # fmt: skip
    assert [where for where, waits in waiting.items() if waits] == [("look", "fastkd.engine.guards")]
    assert Guards.look.__module__ == "fastkd.engine.guards"  # what the heartbeat looks for


def test_the_file_says_what_a_rank_does_while_it_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0.02)
    with heartbeat.beating(tmp_path) as at_work:
        at_work.now("synthesis", "adapt", 3, 71)
        found, end = [], time.monotonic() + 20
        while not found and time.monotonic() < end:
            found = [b for b in heartbeat.read(tmp_path) if b["name"] == "adapt"]
    (mine,) = found
    assert (mine["rank"], mine["phase"], mine["epoch"], mine["step"], mine["waiting"]) == (0, "synthesis", 3, 71, False)
    assert "was last seen in synthesis step 'adapt' (epoch 3, step 71)" in heartbeat.sentence(mine) and mine["at"]
    assert mine["still"] <= mine["since"]
    (tmp_path / "heartbeats" / "rank-1.json").write_text("{")
    assert len(heartbeat.read(tmp_path)) == 1


def test_a_large_file_that_makes_its_way_is_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 1000)
    monkeypatch.setattr(files, "SYNCED", 4000)
    synced, moved, real = [], [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size) or real(fd))
    data = bytes(range(256)) * 40
    with files.told(lambda: moved.append(None)):
        entry = files.write_file(tmp_path / "a", data)
        assert synced == [4000, 8000, 10240] and len(moved) == 11 + 3
        assert files.digest(tmp_path / "a") == entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
    assert len(moved) == 11 + 3 + 11 and (tmp_path / "a").read_bytes() == data
    files.write_file(tmp_path / "b", data)
    assert len(moved) == 11 + 3 + 11  # nobody listens any more


def saving(rank, world, folder):
    """Rank 0 writes twice as long as ranks wait for each other in a step, and something of it reaches the disk all the time."""
    torch.set_num_threads(1)
    launch.TIMEOUT = timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=launch.TIMEOUT)
    real, slow = os.fsync, []

    def fsync(fd):
        if rank == 0 and len(slow) < 4 and sys._getframe(3).f_code.co_name == "rest":
            slow.append(time.sleep(5))
        real(fd)

    method = small.prepared("noise")
    out = folder / "run"
    out.mkdir(exist_ok=True)
    os.fsync, began = fsync, time.monotonic()
    assert loop.run(method, loop.Settings(poll=1, every_steps=2, max_steps=4), Events(out if rank == 0 else None), out) == 75
    assert time.monotonic() - began > 20, "the save was not slow"
    small.end_of_rank()


@pytest.mark.faults
@pytest.mark.fault("T25")
def test_a_checkpoint_that_takes_longer_than_a_step_may_is_no_hang(tmp_path):
    mp.spawn(saving, (2, tmp_path), nprocs=2)
    said: list[str] = []
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", said).manifest["step"] == 4 and not said
