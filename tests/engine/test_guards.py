"""Guards on small runs: what is not finite moves nothing, a step that ran out of memory is done again, collapse is said once."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import ranks
from fastkd.engine import checkpoint, events, heartbeat, launch, loop, state
from fastkd.engine.guards import Guards, Position
from fastkd.engine.guards import collapse as collapsing
from fastkd.engine.guards.collapse import Collapse
from fastkd.errors import NoMemoryError, NumericalError
from fastkd.method import Method, steps
from fastkd.method.updates import _cut
from tests import small


class Plant:
    """Counts the gradients taken in steps of one name, and acts before them.

    `before(n)` may raise; it returns what the terms are multiplied with. n counts from 1, over repeats as well.
    """

    def __init__(self, monkeypatch, step, before):
        self.n = 0
        original = Method._valued

        def valued(method, terms, params, share=1.0):
            if method.log.prefix == step:
                self.n += 1
                factor = before(self.n)
                terms = terms if factor is None else {k: v * factor for k, v in terms.items()}
            return original(method, terms, params, share)

        monkeypatch.setattr(Method, "_valued", valued)


def no_memory(*at):
    def before(n):
        if n in at or not at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return before


def nan(*at):
    return lambda n: float("nan") if n in at or (not at) else None


def warnings(out):
    return [e["text"] for e in events.read(out / "events.jsonl") if e["kind"] == "warning"]


def bits(method):
    tensors, numbers = state.collect(method)
    return tensors | {k: torch.tensor(v) for k, v in numbers.items()}


def apart(a, b):
    """Names of what differs between two states, sums of the log aside."""
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


# Not finite -----------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_moves_neither_weights_nor_running_statistics(monkeypatch):
    method = small.prepared("noise")
    guards = Guards(method, events.Events(None), None)
    walk = [(fn, args, n) for _, fn, args, n in steps(method, 1)]
    Plant(monkeypatch, "learn", nan(2))
    kept = None
    for done, (fn, args, n) in enumerate(walk):
        before = {k: v.clone() for k, v in method.student.state_dict().items()}
        cursor = method.pool.cursor.clone()
        guards.step(Position(0, 1, done, fn, args, n))
        method.step_ends()
        if fn.__name__ == "learn":
            same = [torch.equal(before[k], v) for k, v in method.student.state_dict().items()]
            assert all(same) if n == 1 else not any(same)
            assert method.pool.cursor == cursor + method.kd_batch  # the batch is passed over
            kept = method
    assert kept is not None and guards.look(False) is False and guards.look(True) is True


def test_three_in_a_row_between_two_looks_are_found_although_a_good_one_follows(monkeypatch, tmp_path):
    Plant(monkeypatch, "learn", nan(1, 2, 3))
    with pytest.raises(NumericalError, match=r"3 'learn' steps in a row were not finite \(term kl\).*no checkpoint to go back to"):
        small.run(small.prepared("noise", {"kd_steps": 8}))


def test_two_in_a_row_are_passed_over(monkeypatch):
    Plant(monkeypatch, "learn", nan(2, 3))
    method = small.prepared("noise", {"kd_steps": 8})
    assert small.run(method) == 0
    assert all(v.isfinite().all() for v in method.student.state_dict().values())


def test_a_run_that_is_never_finite_goes_back_once_then_ends_with_6_a_dump_and_a_finite_checkpoint(monkeypatch, tmp_path):
    Plant(monkeypatch, "learn", lambda n: float("nan") if n > 4 else None)
    method = small.prepared("noise", {"kd_steps": 8})
    with pytest.raises(NumericalError, match=r"also after a roll-back with learning rates times 0\.5") as problem:
        small.run(method, tmp_path, every_steps=3)
    assert problem.value.exit_code == 6
    assert len([w for w in warnings(tmp_path) if "back to the last checkpoint, with learning rates times 0.5" in w]) == 1
    saved = checkpoint.newest(tmp_path / "checkpoints", [])
    assert all(t.isfinite().all() for k, t in saved.tensors.items() if t.is_floating_point() and k.startswith(("student", "opt")))
    assert saved.numbers["pace.rolled_back"] and saved.numbers["pace.rate"] == 0.5
    (path,) = tmp_path.glob("not-finite-*-r0.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        about = json.loads(f.metadata()["fastkd"])
        images = f.get_tensor("student.0.images")
        assert about["step"] == "learn" and images.shape == (8, 1, 16, 16) and images.isfinite().all()
        assert torch.equal(images, f.get_tensor("teacher.0.images"))


def test_the_dump_holds_the_batch_of_the_step(monkeypatch, tmp_path):
    seen = []
    hook = lambda module, given: seen.append(given[0].clone())  # noqa: E731
    Plant(monkeypatch, "learn", lambda n: float("nan") if n > 4 else None)
    method = small.prepared("noise", {"kd_steps": 8})
    method.teacher.register_forward_pre_hook(hook)
    with pytest.raises(NumericalError):
        loop.run(method, loop.Settings(poll=1, every_steps=3, every_minutes=1e6), events.Events(tmp_path), tmp_path)
    from safetensors.torch import load_file

    (path,) = tmp_path.glob("not-finite-*-r0.safetensors")
    assert torch.equal(load_file(path)["teacher.0.images"], seen[-1])
    assert torch.equal(seen[-1], seen[-2])  # made again


def test_a_run_that_recovers_with_lower_rates_goes_on_and_keeps_them(monkeypatch, tmp_path):
    method = small.prepared("fast", {"kd_steps": 8})
    Plant(monkeypatch, "learn", lambda n: float("nan") if n > 4 and method.pace.rate == 1.0 else None)
    assert small.run(method, tmp_path, every_steps=5) == 0
    assert method.pace.rate == 0.5
    whole = small.prepared("fast", {"kd_steps": 8})
    monkeypatch.undo()
    small.run(whole)
    rates = [[float(g["lr"]) for o in (m.opt_s, m.meta_opt, m.inner) for g in o.param_groups] for m in (method, whole)]
    assert rates[0] == pytest.approx([r / 2 for r in rates[1]])
    resumed = small.prepared("fast", {"kd_steps": 8})
    small.run(resumed, tmp_path, resume=True)
    assert resumed.pace.rate == 0.5 and resumed.pace.rolled_back and not apart(resumed, method)


def test_a_save_looks_first(monkeypatch, tmp_path):
    Plant(monkeypatch, "learn", lambda n: float("nan") if n > 2 else None)
    with pytest.raises(NumericalError):
        loop.run(
            small.prepared("noise", {"kd_steps": 40}),
            loop.Settings(poll=10**6, every_steps=8, every_minutes=1e6),
            events.Events(tmp_path),
            tmp_path,
        )
    assert not (tmp_path / "checkpoints").exists()  # 8 would have been the first


# Out of memory --------------------------------------------------------------------------------------------------------


def test_rows_are_cut_into_equal_parts():
    assert _cut(8, 1) == [slice(0, 8)]
    assert _cut(8, 4) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    assert _cut(5, 2) == [slice(0, 3), slice(3, 5)]
    assert _cut(2, 8) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_add_up_to_the_whole(parts, fp64):
    whole, split = small.prepared("noise"), small.prepared("noise")
    split.pace.parts = parts
    x, y = torch.randn(8, 5), torch.randn(8)
    ends = []
    for method in (whole, split):
        w = torch.nn.Parameter(torch.ones(5))
        opt = method.sgd([w], lr=0.1)
        terms = lambda part, w=w: {"a": ((x[part] @ w - y[part]) ** 2).mean(), "b": (x[part] @ w).abs().mean()}  # noqa: E731
        totals = [method.minimise_parts(terms, 8, opt, clip=1.0) for _ in range(3)]
        ends.append((w.detach().clone(), torch.stack(totals), torch.stack(list(method.log.sums.values()))))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["noise", "vanilla_kd", "fast", "dfad", "pre", "mb"])
def test_a_student_step_without_memory_is_done_again_in_two_parts(name, monkeypatch, tmp_path):
    clean = small.prepared(name)
    clean.pace.parts = 2
    assert small.run(clean) == 0
    Plant(monkeypatch, "learn", no_memory(1))
    method = small.prepared(name)
    assert small.run(method, tmp_path) == 0
    assert method.pace.parts == 2
    assert not apart(method, clean)
    assert any("in 2 parts of" in w and "BatchNorm sees one part" in w for w in warnings(tmp_path))


def test_parts_are_kept_over_a_resume(monkeypatch, tmp_path):
    Plant(monkeypatch, "learn", no_memory(2))
    whole = small.prepared("fast")
    small.run(whole)
    monkeypatch.undo()
    Plant(monkeypatch, "learn", no_memory(2))
    assert small.run(small.prepared("fast"), tmp_path, max_steps=16) == 75
    monkeypatch.undo()
    resumed = small.prepared("fast")
    small.run(resumed, tmp_path, resume=True)
    assert resumed.pace.parts == 2 and not apart(resumed, whole)


def parted(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    method = small.prepared("noise")
    method.pace.parts = 2
    assert small.run(method) == 0
    if rank == 0:
        torch.save(bits(method), f"{folder}/{world}.pt")
    if world > 1:
        small.end_of_rank()


def test_two_ranks_in_two_parts_equal_one_in_two_parts(tmp_path):
    for world in (1, 2):
        mp.spawn(parted, (world, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert one.keys() == two.keys()
    far = {k: float((one[k].double() - two[k].double()).abs().max()) for k in one if one[k].numel()}
    assert max(far.values()) < 1e-8, sorted(far.items(), key=lambda kv: -kv[1])[:3]


def test_a_damaged_record_says_nothing(tmp_path):
    for text in ("", "{", "[1]", '[["a", 2]]', "null"):
        (tmp_path / "memory.json").write_text(text)
        assert Guards(small.prepared("noise"), events.Events(None), tmp_path).backoff._entries == []
    (tmp_path / "memory.json").write_text("[[3, 2]]")
    assert Guards(small.prepared("noise"), events.Events(None), tmp_path).backoff._entries == [(3, 2)]


def test_with_one_row_at_a_time_the_run_ends_with_7(monkeypatch, tmp_path):
    plant = Plant(monkeypatch, "learn", no_memory())
    with pytest.raises(NoMemoryError, match=r"out of memory in step 'learn' with one row at a time \(CUDA out of memory") as problem:
        small.run(small.prepared("noise"), tmp_path)
    assert problem.value.exit_code == 7 and plant.n == 4  # 8 rows: 1, 2, 4 and 8 parts


def test_a_synthesis_step_is_done_once_more_to_the_same_bits(monkeypatch, tmp_path):
    clean = small.prepared("muse")
    small.run(clean)
    Plant(monkeypatch, "invert", no_memory(3))
    method = small.prepared("muse")
    assert small.run(method, tmp_path) == 0
    assert not apart(method, clean)
    assert any("once more with an empty cache" in w for w in warnings(tmp_path))


def test_a_synthesis_step_that_fails_twice_ends_the_run_with_7(monkeypatch):
    Plant(monkeypatch, "invert", no_memory(3, 4))
    with pytest.raises(NoMemoryError, match="'invert' twice, and it cannot be taken in parts"):
        small.run(small.prepared("muse"))


def test_a_student_step_that_couples_samples_is_not_taken_in_parts(monkeypatch, tmp_path):
    Plant(monkeypatch, "learn", no_memory(2))
    clean, method = small.prepared("muse"), small.prepared("muse")
    assert small.run(method, tmp_path) == 0 and method.pace.parts == 1
    assert any("'learn', which cannot be taken in parts" in w for w in warnings(tmp_path))
    monkeypatch.undo()
    small.run(clean)
    assert not apart(method, clean)
    Plant(monkeypatch, "learn", no_memory(2))
    free = small.prepared("muse", {"r": 0.0})
    assert small.run(free) == 0 and free.pace.parts == 2


def test_what_the_update_had_changed_comes_back_from_the_checkpoint(monkeypatch, tmp_path):
    clean = small.prepared("fast")
    small.run(clean)
    method, original, calls = small.prepared("fast"), torch._foreach_add_, []

    def add(*args, **kw):  # after the update of an inner step
        if method.updated() and method.log.prefix == "adapt":
            calls.append(1)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args, **kw)

    monkeypatch.setattr(torch, "_foreach_add_", add)
    assert small.run(method, tmp_path, every_steps=4) == 0
    assert len(calls) > 4 and not apart(method, clean)
    assert any(e["kind"] == "resumed" for e in events.read(tmp_path / "events.jsonl"))


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(monkeypatch):
    method, original = small.prepared("fast"), torch._foreach_add_

    def add(*args, **kw):
        if method.updated() and method.log.prefix == "adapt":
            raise MemoryError("no more")
        return original(*args, **kw)

    monkeypatch.setattr(torch, "_foreach_add_", add)
    with pytest.raises(NoMemoryError, match="after its update had begun, and there is no checkpoint to go back to"):
        small.run(method)


def test_host_numbers_come_back(monkeypatch):
    clean, method = small.prepared("fast"), small.prepared("fast")
    small.run(clean)
    original, calls = type(method.task.pool).put, []

    def put(store, *args, **kw):
        found = original(store, *args, **kw)
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("after the rows were written")
        return found

    monkeypatch.setattr(type(method.task.pool), "put", put)
    assert small.run(method) == 0
    assert len(calls) > 2 and not apart(method, clean)


# Collapse -------------------------------------------------------------------------------------------------------------

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


# Heartbeats -----------------------------------------------------------------------------------------------------------


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
