"""Guards on small runs: what is not finite moves nothing, a step that ran out of memory is done again."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd.engine import checkpoint, events, loop, state
from fastkd.engine.guards import Guards, Position
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


def test_the_dump_is_of_a_step_that_was_not_finite_also_where_good_ones_followed(monkeypatch, tmp_path):
    """Steps 0, 1 and 2 of eight are bad, whenever they are done; all eight have been taken when the guard looks."""
    method = small.prepared("noise", {"kd_steps": 8})
    Plant(monkeypatch, "learn", lambda n: float("nan") if method.rng._key[1:] in [(1, "learn", i) for i in (0, 1, 2)] else None)
    with pytest.raises(NumericalError, match=r" were not finite \(term kl\); its batch is in not-finite-\d+-r0.safetensors, and there"):
        loop.run(method, loop.Settings(poll=10**6, every_minutes=1e6), events.Events(tmp_path), tmp_path)
    from safetensors import safe_open

    (path,) = tmp_path.glob("not-finite-*")
    with safe_open(path, "pt") as f:
        about = json.loads(f.metadata()["fastkd"])
    assert (about["step"], about["epoch"], about["occurrence"]) == ("learn", 1, 2)


def test_a_step_that_is_finite_when_it_is_done_again_leaves_no_dump_to_mislead(monkeypatch, tmp_path):
    Plant(monkeypatch, "learn", nan(1, 2, 3))
    with pytest.raises(NumericalError, match=r"; done again, that step is finite, so no batch is kept, and there is no"):
        small.run(small.prepared("noise", {"kd_steps": 8}), tmp_path)
    assert not list(tmp_path.glob("not-finite-*"))


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
