"""T22 to T25 and T28 of the fault table: what is not finite, out of memory, a rank that hangs, clocks that lie."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import torch

from fastkd.engine import checkpoint, events, heartbeat
from tests import small

faults = pytest.mark.faults


def warnings(ranks: Any, name: str) -> list[str]:
    return [e["text"] for e in events.read(ranks.parent / name / "events.jsonl") if e["kind"] == "warning"]


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


# T22, T23: not finite -------------------------------------------------------------------------------------------------


@faults
@pytest.mark.fault("T22")
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks, undisturbed):
    states = []
    for rank in (0, 1):
        done = ranks.run(f"nan{rank}", inside={"do": "nan", "rank": rank, "at": [1, "learn", 1]})
        assert done.returncode == 0, done.stderr
        states.append(ranks.state(f"nan{rank}"))
    # Had one rank gone on alone, whose weights are saved (rank 0's) would depend on who it was.
    assert not differing(*states)
    assert all(t.isfinite().all() for k, t in states[0].items() if k.startswith("student."))
    assert any(k.startswith("student.") for k in differing(states[0], ranks.state(undisturbed)))


@faults
@pytest.mark.fault("T22")
def test_losses_that_are_never_finite_end_the_run_with_6_a_dump_and_a_finite_checkpoint(ranks):
    done = ranks.run("never", inside={"do": "nan-from", "rank": 1, "at": [1, "learn", 0]})
    assert done.returncode == 6, done.stderr
    assert "3 'learn' steps in a row were not finite" in done.stderr and "also after a roll-back" in done.stderr
    assert ranks.attempts("never") == 1
    assert sum("back to the last checkpoint" in w for w in warnings(ranks, "never")) == 1
    saved = checkpoint.newest(ranks.parent / "never" / "checkpoints", [])
    assert not any(t.isnan().any() for t in saved.tensors.values() if t.is_floating_point())
    assert len(list((ranks.parent / "never").glob("not-finite-*-r[01].safetensors"))) == 2


@pytest.mark.fault("T23")
def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    method = small.prepared("noise")
    w = torch.nn.Parameter(torch.zeros(2))
    opt = method.adam([w], lr=0.1)
    method.minimise({"root": w.sqrt().sum()}, opt)  # the root of 0 has an infinite slope
    assert (w == 0).all() and method.not_finite() == 1


@pytest.mark.fault("T23")
def test_a_batchnorm_channel_without_variance_keeps_the_losses_finite(tmp_path):
    method = small.prepared("fast")
    with torch.no_grad():
        method.teacher.target[1, 0] = 0.0
    assert small.run(method, tmp_path) == 0
    assert all(p.isfinite().all() for p in method.student.parameters())


@pytest.mark.fault("T23")
def test_a_memory_of_one_class_is_a_collapse_that_is_said_once(tmp_path):
    method = small.prepared("noise", {"epochs": 5})
    method.pool.images.copy_(method.pool.images[:1].clone().expand_as(method.pool.images))
    assert small.run(method, tmp_path) == 0
    said = [e["text"] for e in events.read(tmp_path / "events.jsonl") if e["kind"] == "warning"]
    assert len([s for s in said if "few classes" in s]) == 1 and len([s for s in said if "nearly all the same" in s]) == 1


# T24: out of memory ---------------------------------------------------------------------------------------------------

SPLITS = ("--set", "method.r=0")  # MUSE's hinge over the batch cannot be taken in parts


@faults
@pytest.mark.fault("T24")
def test_a_rank_without_memory_in_a_student_step_has_all_ranks_take_it_in_two_parts(ranks):
    done = ranks.run("halved", *SPLITS, inside={"do": "no-memory", "rank": 1, "at": [1, "learn", 0]})
    assert done.returncode == 0, done.stderr
    assert ranks.attempts("halved") == 2 and any("are taken in 2 parts" in w for w in warnings(ranks, "halved"))
    (log,) = (ranks.parent / "halved" / "logs").glob("*/attempt_0/1/stderr.log")
    assert "rank 1: out of memory in step 'learn'" in log.read_text()
    assert ranks.run("parts", *SPLITS, inside={"do": "parts", "value": 2}).returncode == 0
    a, b = ranks.state("halved"), ranks.state("parts")
    assert a.keys() == b.keys()
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel() and "best.total" not in k) < 1e-6


@faults
@pytest.mark.fault("T24")
def test_a_rank_without_memory_in_a_synthesis_step_costs_no_bit(ranks, undisturbed):
    done = ranks.run("again", inside={"do": "no-memory", "rank": 1, "at": [1, "invert", 0]})
    assert done.returncode == 0, done.stderr
    assert ranks.student("again") == ranks.student(undisturbed)


@faults
@pytest.mark.fault("T24")
def test_a_synthesis_step_without_memory_twice_ends_with_7(ranks):
    done = ranks.run("twice", inside={"do": "no-memory", "rank": 1, "at": [1, "invert", 0], "attempt": None})
    assert done.returncode == 7, done.stderr
    assert "'invert' twice" in done.stderr and ranks.attempts("twice") == 2
    ranks.nobody_is_left("twice", 5)


# T25: a rank that hangs -----------------------------------------------------------------------------------------------


@faults
@pytest.mark.fault("T25")
def test_a_rank_that_is_slow_is_no_alarm(ranks, undisturbed):
    done = ranks.run("slow", inside={"do": "sleep", "value": 8, "rank": 1, "at": [1, "learn", 1], "timeout": 40})
    assert done.returncode == 0 and ranks.attempts("slow") == 1, done.stderr
    assert ranks.student("slow") == ranks.student(undisturbed)


@faults
@pytest.mark.fault("T25")
def test_a_rank_that_hangs_is_named_with_its_last_phase_within_the_timeout(ranks):
    done = ranks.run("hangs", "--max-restarts", 0, inside={"do": "sleep", "value": 900, "rank": 1, "at": [1, "learn", 1], "timeout": 30})
    assert done.returncode == 1, done.stderr
    assert "rank 1 failed first" in done.stderr and "rank 1 hangs, and the others wait for it" in done.stderr
    assert "in distillation step 'learn' (epoch 1" in done.stderr and "inside.py" in done.stderr
    (seconds,) = re.findall(r"(\d+) s after it began", done.stderr)
    assert int(seconds) < 30
    ranks.nobody_is_left("hangs", 5)


@faults
@pytest.mark.fault("T25")
def test_a_frozen_rank_is_named_by_the_one_that_waited(ranks):
    done = ranks.run("frozen", "--max-restarts", 0, inside={"do": "stop", "rank": 1, "at": [1, "learn", 1], "timeout": 20}, limit=400)
    assert done.returncode == 1, done.stderr
    assert "rank 0 failed first" in done.stderr
    assert "it waited for others: rank 1" in done.stderr and "was last seen in " in done.stderr
    ranks.nobody_is_left("frozen", 5)


# T28: clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T28")
def test_a_clock_that_runs_backwards_changes_neither_order_nor_ages(tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    told: list[dict[str, Any]] = []
    method = small.prepared("fast")
    from fastkd.engine import loop

    settings = loop.Settings(poll=1, every_steps=3, keep=2, every_minutes=1e6)
    assert loop.run(method, settings, events.Events(tmp_path, [told.append]), tmp_path) == 0
    monkeypatch.undo()
    time.tzset()
    names = [p.name for p in checkpoint.listed(tmp_path / "checkpoints")]
    last = max(e["step"] for e in told if e["kind"] == "epoch")
    assert names[0] == f"step-{last:08d}" and len(names) == 2 and names == sorted(names, reverse=True)
    curve = events.curve(tmp_path / "events.jsonl")
    assert [e["epoch"] for e in curve] == [0, 1, 2] and all(e["wall"] >= 0 and min(e["seconds"].values()) >= 0 for e in curve)
    assert all(e["steps_per_second"] > 0 for e in told if e["kind"] == "poll")
    (beat,) = heartbeat.read(tmp_path)
    assert beat["since"] >= 0 and beat["age"] >= 0
    (tmp_path / "heartbeats" / "rank-0.json").write_text(json.dumps({**beat, "time": time.time() + 1e6}))
    assert heartbeat.read(tmp_path)[0]["age"] == 0
