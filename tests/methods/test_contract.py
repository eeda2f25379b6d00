"""What every registered method inherits from the engine, whatever it does."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter

import pytest
import torch

from fastkd.engine import dry
from fastkd.engine.guards import snapshot
from fastkd.engine.guards.memory import Backoff
from fastkd.log import Log
from fastkd.memory.ahead import Ahead
from fastkd.method import GIVEN, Method, steps
from fastkd.rng import Rng
from tests import small
from tests.recorder import NoHostRead, OwnDraws, Recording

each = pytest.mark.parametrize("variant", small.VARIANTS, ids=small.ident)
OTHERS_SLOW = [pytest.param(v, id=small.ident(v), marks=[pytest.mark.slow] * bool(v[1])) for v in small.VARIANTS]
plain = pytest.mark.parametrize("variant", OTHERS_SLOW)
"""Of each method the usual form; its others are slow tests."""


def bits(method):
    """All that a run may have changed, by path: found by a walk of its own, so that what a checkpoint forgets is seen."""
    left_out = {*GIVEN, "_life", "_touched", "_rows"} - {"student", "log", "pace"}
    found = {}
    for name, value in vars(method).items():
        if name not in left_out:
            _bits(name, value, found, [method])
    return found


def _bits(path, value, found, above):
    if isinstance(value, torch.Tensor):
        found[path] = value.detach().clone()
    elif isinstance(value, torch.nn.Module):
        inner = {n: {k: v for k, v in vars(m).items() if not k.startswith("_")} for n, m in value.named_modules()}
        inner = {n: {k: v for k, v in m.items() if isinstance(v, bool | int | float)} for n, m in inner.items()}
        _bits(path, [dict(value.named_parameters()), dict(value.named_buffers()), inner], found, above)
    elif isinstance(value, torch.optim.Optimizer):
        _bits(path, value.state_dict(), found, above)
    elif isinstance(value, Rng | Ahead) or any(value is x for x in above):
        return
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _bits(f"{path}.{key}", inner, found, [*above, value])
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        _bits(path, vars(value), found, [*above, value])
    else:
        found[path] = value


def epochs(method):
    """Names, arguments and occurrences of all steps, by epoch."""
    return [[(i, fn.__name__, args, n) for i, fn, args, n in steps(method, e)] for e in range(method.epochs)]


def differing(a, b):
    assert a.keys() == b.keys()
    same = lambda x, y: torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return [k for k in a if not same(a[k], b[k])]


@functools.cache
def any_given(dense):
    """What is given, once for all that do not change it."""
    return small.given(dense=dense)


@each
def test_walking_an_epoch_changes_nothing(variant):
    method = small.prepared(*variant)
    before, global_rng = bits(method), torch.get_rng_state()
    generators = {k: g.get_state() for k, g in method.rng._streams.items()}
    first = epochs(method)
    again = [[(i, fn.__name__, args, n) for i, fn, args, n in steps(method, e)] for e in reversed(range(method.epochs))][::-1]
    assert first == again and sum(map(len, first)) > 0
    assert not differing(before, bits(method))
    assert torch.equal(global_rng, torch.get_rng_state())
    assert all(torch.equal(s, method.rng._streams[k].get_state()) for k, s in generators.items()) and len(generators) == len(
        method.rng._streams
    )


@plain
def test_killed_at_random_steps_and_resumed_is_bit_identical(variant, tmp_path):
    whole = small.prepared(*variant)
    total = sum(1 for e in range(whole.epochs) for _ in steps(whole, e))
    assert small.run(whole) == 0
    at = random.Random(str(variant)).sample(range(1, total - 1), 2)
    for kill in (*at, total - 1):
        out = tmp_path / f"at{kill}"
        out.mkdir()
        assert small.run(small.prepared(*variant), out, max_steps=kill) == 75
        resumed = small.prepared(*variant)
        fresh = epochs(resumed)
        assert small.run(resumed, out, resume=True) == 0
        assert not differing(bits(whole), bits(resumed)), f"killed after step {kill} of {total}"
        assert epochs(whole) == fresh, "what an epoch yields depends on what the run has done"


@each
def test_a_step_that_ran_out_of_memory_before_its_update_can_be_done_again(variant, monkeypatch):
    monkeypatch.setattr(snapshot, "LIMIT", 64)  # of these small runs as well, images and labels are not copied
    whole, method = small.prepared(*variant), small.prepared(*variant)
    assert small.run(whole) == 0
    monkeypatch.setattr(Backoff, "decide", lambda self, at, rows, problem: "again")
    calls: Counter[str] = Counter()
    original = Method._valued

    def valued(self, *args):
        calls[self.log.prefix] += not self.updated()
        if calls[self.log.prefix] in (1, 4) and not self.updated():
            raise MemoryError("planted")
        return original(self, *args)

    monkeypatch.setattr(Method, "_valued", valued)
    assert small.run(method) == 0
    assert calls and not differing(bits(whole), bits(method))


@each
def test_no_host_synchronisation_in_a_capturable_step_and_no_foreign_draw_in_any(variant):
    method, read = small.prepared(*variant), {}
    for e in range(2):
        for _, fn, args, n in steps(method, e):
            method.rng.at(0, e, fn.__name__, n)
            drawn = torch.get_rng_state()
            with OwnDraws() if fn.eager else NoHostRead() as watch:
                fn(*args)
            method.step_ends()
            found = set(watch.found)
            if not fn.eager and not torch.equal(drawn, torch.get_rng_state()):  # a graph would draw on the CPU once, for ever
                found.add("a draw outside of the run's streams")
            if found:
                read[fn.__name__] = found
    # On the CPU torch's fused optimisers read nothing through the dispatcher, so nothing is excused.
    assert not read


@each
def test_arguments_select_a_variant_and_are_not_data(variant):
    name, over = variant
    dense, reads = bool(over.get("dense")), small.small(name, over).uses_real()
    given = small.given_to(small.small(name, over), dense=dense) if reads else any_given(dense)
    variants = {}
    for n in (4, 8):
        method = small.small(name, {**over, "epochs": n})
        method.bind(given)  # an epoch needs nothing that `build` makes
        variants[n] = {(step, args) for e in epochs(method) for _, step, args, _ in e if not getattr(method, step).eager}
    assert len(variants[8]) <= len(variants[4]), f"a longer run has more variants: {sorted(variants[8] - variants[4], key=str)}"


@plain
def test_it_walks_on_tensors_without_values(variant):
    method = small.small(*variant)
    given = small.given_to(method, dense=bool(variant[1].get("dense")))
    walked = dry.walk(method, dataclasses.replace(given, rng=Rng()))
    assert {row["step"] for row in walked["steps"]} == {kind.fn.__name__ for kind in dry.kinds(method)}


@each
def test_recorded_and_replayed_steps_equal_eager_ones(variant):
    eager, replayed = small.prepared(*variant), small.prepared(*variant)
    graphs, replays = {}, 0
    seen: dict[tuple, int] = {}
    for e in range(eager.epochs):
        for (_, fn, args, n), (_, same, _, _) in zip(steps(eager, e), steps(replayed, e), strict=True):
            key = (fn.__name__, args)
            for method, call in ((eager, fn), (replayed, same)):
                method.rng.at(0, e, fn.__name__, n)
                method.log.prefix = fn.__name__
                if method is eager or fn.eager or seen.get(key, 0) < 1:  # the first call is eager: it makes the slots of the log
                    call(*args)
                elif key not in graphs:
                    with Recording() as graphs[key]:
                        call(*args)
                else:
                    graphs[key].replay()
                    replays += 1
                method.step_ends()
            seen[key] = seen.get(key, 0) + 1
    assert replays > 0
    assert not differing(bits(eager), bits(replayed))


@each
def test_teacher_is_frozen_and_terms_are_named_and_finite(variant):
    method = small.prepared(*variant)
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    student = [p.detach().clone() for p in method.student.parameters()]
    seen: dict[str, float] = {}
    log, method_log = Log(), method.log
    assert log.read() == {}
    for e in range(method.epochs):
        for _, fn, args, n in steps(method, e):
            method.rng.at(0, e, fn.__name__, n)
            method_log.prefix = fn.__name__
            fn(*args)
            assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
            method.step_ends()
            assert all(p.grad is None for p in method.student.parameters())
        seen |= method_log.read()
    assert seen and all(name.count(".") == 1 for name in seen)
    assert all(v == v and abs(v) != float("inf") for v in seen.values()), seen
    assert all(v == 0 for k, v in seen.items() if k.endswith(".skipped"))
    names = {fn.__name__ for _, fn, _, _ in steps(method, method.epochs - 1) if fn.phase == "distillation" and not fn.eager}
    assert any(k.split(".")[0] in names and v > 0 for k, v in seen.items()), f"no positive term in the student steps {names}: {seen}"
    assert all(torch.equal(v, method.teacher.state_dict()[k]) for k, v in before.items())
    assert not method.teacher.training
    assert any(not torch.equal(a, b) for a, b in zip(student, method.student.parameters(), strict=True))


@each
def test_attributes_are_sealed_after_build(variant):
    method = small.prepared(*variant)
    for name in ("opt_s", "anything", "epochs", "learn"):
        with pytest.raises(AttributeError, match=name):
            setattr(method, name, 1)
