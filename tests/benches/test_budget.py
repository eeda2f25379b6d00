"""A run under a budget of CPU time: its curve, its plan, and what it is told when the time is over."""

from __future__ import annotations

import json

import pytest

from benches import _budget

SMALL = ["n_images=64", "kd_batch=16", "kd_steps=3"]


def words(epochs: int, warmup: int = 0, *more: str) -> list[str]:
    given = ["--recipe", "noise-digits", "--device", "cpu"]
    for text in (*SMALL, f"epochs={epochs}", f"warmup={warmup}", *more):
        given += ["--set", f"method.{text}"]
    return given


def test_a_run_that_ends_within_its_budget(tmp_path):
    spent = _budget.spend(words(3), tmp_path / "run", 300.0)
    assert spent.code == 0, spent.said
    seconds = [s for s, _ in spent.points]
    assert 0 < spent.start <= seconds[0] and seconds == sorted(seconds) and seconds[-1] <= spent.seconds < 300
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [t for _, t in spent.top1()] == [round(100 * e["top1"], 2) for e in events if e["kind"] == "epoch"]
    assert 0 < spent.evaluation < spent.seconds and spent.teacher["top1"] > 0.9


def test_a_run_is_told_to_stop_when_the_budget_is_used_up(tmp_path):
    spent = _budget.spend(words(100_000), tmp_path / "run", 6.0)
    assert spent.code == 75, spent.said
    assert 6.0 <= spent.seconds < 20.0 and 0 < len(spent.points) < 100_000
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_plan_fills_the_budget(tmp_path):
    plan = _budget.plan(lambda e, w: words(e, w, "kd_steps=40"), tmp_path / "probe", 60.0, 0.25)
    assert plan["warmup"] == pytest.approx(plan["epochs"] / 4, abs=1)
    cost = plan["start"] + plan["warmup"] * plan["warmup_epoch"] + (plan["epochs"] - plan["warmup"]) * plan["epoch"]
    rounded = 0.05 * (1 + plan["epochs"]) + abs(plan["warmup_epoch"] - plan["epoch"])  # costs to tenths, the warm-up to whole epochs
    assert 40.0 < cost < (1 - _budget.FREE) * 60.0 + rounded


@pytest.mark.parametrize(("more", "budget", "sentence"), [
    (["kd_batch=-1"], 60.0, "a probe of two epochs ended with code 2: .*kd_batch"),
    ([], 0.1, "a probe of two epochs used up 0.1 CPU seconds"),
])  # fmt: skip
def test_a_plan_that_cannot_be_made_says_why(tmp_path, more, budget, sentence):
    with pytest.raises(_budget.BenchError, match=sentence):
        _budget.plan(lambda e, w: words(e, w, *more), tmp_path / "probe", budget, 0.0)


def test_torn_lines_wait_for_their_end(tmp_path):
    path = tmp_path / "events.jsonl"
    assert _budget.tail(path, 0) == (0, [])
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b')
    at, events = _budget.tail(path, 0)
    assert [e["kind"] for e in events] == ["a"] and at == 14
    path.write_bytes(b'{"kind": "a"}\n{"kind": "b"}\n')
    assert [e["kind"] for e in _budget.tail(path, at)[1]] == ["b"]


def test_a_process_that_is_gone_has_used_nothing_more():
    assert _budget.cpu_seconds(2**22 + 1) == 0.0
