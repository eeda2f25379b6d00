"""Synthetic images that no longer teach: counted in student steps and at the end of epochs, and said once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import ranks
from fastkd.engine import events
from fastkd.engine.guards import Guards, Position
from fastkd.engine.guards import collapse as collapsing
from fastkd.engine.guards.collapse import Collapse
from fastkd.method import steps
from tests import small


def warnings(out):
    return [e["text"] for e in events.read(out / "events.jsonl") if e["kind"] == "warning"]


GOOD = {"balance": 0.9, "confidence": 0.8, "distance": 1.0, "agreement": 0.7}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("balance", 0.19, "19% of an even spread"),
        ("confidence", 0.3, "does not know"),
        ("distance", 0.01, "nearly all the same"),
        ("agreement", 0.2, "no better than chance"),
        ("distance", float("nan"), "nearly all the same"),
    ],
)
def test_collapse_is_said_once_and_only_when_it_lasts(name, value, said, tmp_path):
    collapse = Collapse(small.prepared("noise"), events.Events(tmp_path))
    bad = GOOD | {name: value}
    for health in (bad, GOOD, bad):  # never twice in a row
        collapse.judge(health, trained=True)
    assert not (tmp_path / "events.jsonl").exists()
    for _ in range(4):
        collapse.judge(bad, trained=True)
    collapse.judge(GOOD, trained=True)
    collapse.judge(bad, trained=True)
    (warned,) = warnings(tmp_path)
    assert warned.startswith("collapse: ") and said in warned


def test_a_run_in_pieces_says_what_a_whole_one_says_when_it_says_it(tmp_path, monkeypatch):
    monkeypatch.setattr(collapsing, "WINDOW", 16)  # two steps; five of them are ten
    poor = {"epochs": 3, "kd_steps": 16}

    def walked(name, *pieces):
        (tmp_path / name).mkdir()
        for piece in (*pieces, None):
            method = small.prepared("noise", poor)
            method.pool.images.fill_(77)
            small.run(method, tmp_path / name, resume=True, max_steps=piece)
        lines = events.read(tmp_path / name / "events.jsonl")
        return [line.get("text") or f"epoch {line['epoch']}" for line in lines if line["kind"] == "epoch" or line.get("guard")]

    whole = walked("whole")
    assert [line.partition(":")[0] for line in whole] == ["epoch 0", "collapse", "collapse", "epoch 1", "epoch 2"]
    for pieces in ((7,), (12, 9), (3, 3, 3, 3, 3, 3, 3, 3)):
        assert walked(str(pieces), *pieces) == whole


def test_a_student_that_was_not_trained_may_disagree(tmp_path):
    collapse = Collapse(small.prepared("noise"), events.Events(tmp_path))
    for _ in range(3):
        collapse.judge(GOOD | {"agreement": 0.0}, trained=False)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_memory_of_equal_images_is_a_collapse(tmp_path):
    method = small.prepared("noise", {"epochs": 3})
    method.pool.images.fill_(77)
    assert small.run(method, tmp_path) == 0
    curve = events.curve(tmp_path / "events.jsonl")
    assert all(e["health"]["distance"] == 0 and e["health"]["balance"] == 0 for e in curve)
    said = " ".join(warnings(tmp_path))
    assert "few classes are left" in said and "nearly all the same" in said


def test_what_student_steps_are_given_is_counted_from_the_teachers_own_answers(tmp_path):
    method = small.prepared("noise")
    guards = Guards(method, events.Events(tmp_path), None)
    seen = []
    method.teacher.register_forward_hook(lambda m, given, answer: seen.append((given[0].double(), answer.logits.double())))
    for done, (_, fn, args, n) in enumerate(steps(method, 1)):
        guards.step(Position(7, 1, done, fn, args, n))
        method.step_ends()
    c, x, logits = method.classes, [x for x, _ in seen], torch.cat([logits for _, logits in seen])
    counts, (images, calls, confidence, distance) = guards.collapse.counted()[:c], guards.collapse.counted()[c:].tolist()
    assert counts.tolist() == torch.bincount(logits.argmax(1), minlength=c).tolist()
    assert (images, calls) == (len(logits), len(seen)) and calls == method.kd_steps
    assert confidence == pytest.approx(float(logits.softmax(1).amax(1).sum()), rel=1e-5)
    pairs = [torch.cdist(b.flatten(1), b.flatten(1)).square().sum() / (len(b) * (len(b) - 1) * b[0].numel()) for b in x]
    assert distance == pytest.approx(float(sum(p.sqrt() for p in pairs)), rel=1e-5)


def test_only_student_steps_are_counted():
    method = small.prepared("fast")
    guards = Guards(method, events.Events(None), None)
    phases = set()
    for done, (_, fn, args, n) in enumerate(steps(method, 1)):
        before = guards.collapse.counted().clone()
        guards.step(Position(7, 1, done, fn, args, n))
        method.step_ends()
        phases.add(fn.phase)
        learns = fn.phase == "distillation" and not fn.eager  # eager ones set learning rates
        assert torch.equal(before, guards.collapse.counted()) == (not learns), fn.__name__
    assert {"synthesis", "distillation"} <= phases


def test_a_collapse_is_said_in_mid_epoch_after_five_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(collapsing, "WINDOW", 16)  # two steps
    method = small.prepared("noise", {"epochs": 2, "kd_steps": 16})
    method.pool.images.fill_(77)
    assert small.run(method, tmp_path) == 0
    lines = list(events.read(tmp_path / "events.jsonl"))
    kinds = [line["kind"] for line in lines]
    said = [line["text"] for line in lines if line.get("guard") == "collapse"]
    assert len(said) == 2 and "few classes are left" in said[0] and "nearly all the same" in said[1]
    assert kinds.index("warning") < len(kinds) - 1 - kinds[::-1].index("epoch")  # epoch 0 trains nothing


def test_four_bad_windows_are_no_collapse(tmp_path):
    method = small.prepared("noise")
    collapse, c = Collapse(method, events.Events(tmp_path)), method.classes
    good, bad = [100.0] * c + [600.0, 3.0, 80.0 * c, 3.0], [100.0 * c] + [0.0] * (c - 1) + [600.0, 3.0, 80.0 * c, 3.0]
    for _ in range(3):
        for total in (bad, bad, bad, bad, good):
            collapse.judge_counted(total)
    collapse.judge_counted([1.0] + [0.0] * (c - 1) + [8.0, 1.0, 0.1, 0.0])  # too few images to say anything
    assert not (tmp_path / "events.jsonl").exists()
    for _ in range(9):
        collapse.judge_counted(bad)
    assert len(warnings(tmp_path)) == 1 and "few classes" in warnings(tmp_path)[0]


def test_single_rows_and_steps_that_are_not_finite_say_nothing_of_a_collapse(tmp_path):
    method = small.prepared("noise")
    collapse = Collapse(method, events.Events(tmp_path))
    x = torch.rand(4, *method.shape)
    with collapse.counting("distillation"):
        for row in x:
            method.teacher(row[None])
    c = method.classes
    assert collapse.counted()[c:].tolist()[:2] == [4.0, 0.0] and collapse.counted()[c + 3] == 0
    before = collapse.counted().clone()
    with collapse.counting("distillation"):
        method.teacher(x * float("nan"))
    assert torch.equal(collapse.counted(), before)
    with pytest.raises(torch.OutOfMemoryError), collapse.counting("distillation"):
        method.teacher(x)
        raise torch.OutOfMemoryError
    assert torch.equal(collapse.counted(), before)  # it is done again, and counted then
    for _ in range(9):
        collapse.judge_counted([100.0] * c + [600.0, 0.0, 80.0 * c, 0.0])
    assert not (tmp_path / "events.jsonl").exists()
    collapse.judge_counted([1.0] + [0.0] * (c - 1) + [600.0, 1.0, 0.5, 1.0])
    collapse.clear()
    assert collapse.counted().sum() == 0 and not any(n for low in collapse._low.values() for n in low.values())


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_a_confident_teacher_is_above_the_threshold_and_a_guessing_one_below(classes):
    assert 1 / classes < collapsing.THRESHOLDS["confidence"].least(classes) < 0.8


def counting(rank, world, folder):
    """The counts of two ranks, summed, are those of one with the global batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    total = ranks.total(counts())
    if rank == 0:
        torch.save(total, f"{folder}/counts.pt")
    small.end_of_rank()


def counts():
    method = small.prepared("noise")
    guards = Guards(method, events.Events(None), None)
    _, fn, args, n = next(s for s in steps(method, 1) if s[1].__name__ == "learn")
    guards.step(Position(7, 1, 0, fn, args, n))
    return guards.collapse.counted()


def test_two_ranks_count_the_answers_of_the_global_batch(tmp_path):
    mp.spawn(counting, (2, str(tmp_path)), nprocs=2)
    two, one, c = torch.load(tmp_path / "counts.pt", weights_only=True), counts(), small.prepared("noise").classes
    assert two[: c + 1].tolist() == one[: c + 1].tolist() and two[c + 1] == 2 * one[c + 1]
    assert two[c + 2] == pytest.approx(float(one[c + 2]), rel=1e-5)
