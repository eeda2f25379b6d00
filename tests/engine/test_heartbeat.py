"""What ranks say of themselves while they work, and who is named when others wait for one that does not come."""

from __future__ import annotations

import sys
import time

from fastkd.engine import heartbeat, launch
from fastkd.engine.guards import Guards


def beat(rank, *, waiting=False, since=50.0, age=1.0):
    return {"rank": rank, "waiting": waiting, "since": since, "age": age, "every": 5.0}


def test_a_rank_hangs_when_others_have_waited_for_it_long_enough():
    me, waits = beat(1), beat(0, waiting=True)
    assert heartbeat.hangs(me, [waits, me], 48)
    assert not heartbeat.hangs(me, [waits, me], 60)  # too early
    assert not heartbeat.hangs(me, [beat(0), me], 48)  # nobody waits: a long step of all
    assert not heartbeat.hangs(me, [beat(0, waiting=True, since=3.0), me], 48)
    assert not heartbeat.hangs(me, [beat(0, waiting=True, age=100.0), me], 48)  # an old file
    assert not heartbeat.hangs(beat(1, waiting=True), [beat(0, waiting=True)], 48)


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
    (tmp_path / "heartbeats" / "rank-1.json").write_text("{")
    assert len(heartbeat.read(tmp_path)) == 1
