"""Captured steps: on the CPU a recorder of aten calls stands in for a CUDA graph, behind the same engine."""

from __future__ import annotations

import pytest
import torch

from fastkd.engine import graphs, loop, state
from fastkd.engine.events import Events
from fastkd.engine.guards import Guards, Position
from fastkd.memory import Store
from fastkd.method import steps
from fastkd.methods.noise import Noise
from tests import small
from tests.recorder import Recording

LONGER = {"epochs": 4, "kd_steps": 4}
VARIANTS = [
    ("muse", {**LONGER, "g_steps": 4, "resolutions": (8, 16)}),
    ("fast", {**LONGER, "g_steps": 4}),
    ("ssd", {"epochs": 4, "g_steps": 4}),
    ("noise", LONGER),
]
each = pytest.mark.parametrize("variant", VARIANTS, ids=small.ident)


class Captures:
    """Records instead of capturing, executes nothing on the way, and counts replays."""

    def __init__(self) -> None:
        self.made, self.replays, self.fail = 0, 0, ""

    def __call__(self, body, generators, pool):
        self.made += 1
        if self.fail:
            raise RuntimeError(self.fail)
        return self._replay(body)

    def _replay(self, body):
        recording: list[Recording] = []

        def replay() -> None:
            self.replays += 1
            if not recording:
                with Recording() as made:
                    body()
                recording.append(made)
            else:
                recording[0].replay()

        return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    made = Captures()
    monkeypatch.setattr(graphs, "capturable", lambda method: True)
    monkeypatch.setattr(graphs, "capture", made)
    return made


def walked(variant, said=None, **settings):
    method = small.prepared(*variant, seed=0)
    listen = [lambda e: said.append(e["text"]) if e["kind"] == "warning" and "guard" not in e else None] if said is not None else []
    assert loop.run(method, loop.Settings(poll=2, every_minutes=1e6, **settings), Events(None, listen), None) == 0
    tensors, numbers = state.collect(method)
    return {**tensors, **numbers}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        equal = torch.equal(value.nan_to_num(7e7), b[name].nan_to_num(7e7)) if isinstance(value, torch.Tensor) else value == b[name]
        assert equal, name


@each
def test_a_run_of_replayed_steps_ends_with_the_same_bits(variant, captures):
    eager = walked(variant, graphs=False)
    assert captures.made == 0
    assert_same(eager, walked(variant))
    assert captures.made > 0 and captures.replays > captures.made


def test_what_cannot_be_captured_stays_eager_and_is_said_once(captures):
    captures.fail, said = "operation not permitted when stream is capturing", []
    assert_same(walked(("noise", LONGER)), walked(("noise", LONGER), said))
    assert said == ["step 'learn' stays eager, it could not be captured in a CUDA graph: operation not permitted when stream is capturing"]


def test_new_sums_of_the_log_drop_what_was_captured(captures):
    method, dropped = small.prepared("noise"), []
    taken = graphs.Graphs(method, True, dropped.append)
    first, second = object(), object()
    body = lambda: None  # noqa: E731
    assert [taken.take("a", first, body) for _ in range(4)] == [False, False, True, True]
    assert captures.made == 1
    assert taken.take("a", second, body) and captures.made == 2
    assert not taken.take("b", second, body) and not dropped


def test_what_is_first_logged_while_it_is_captured_stays_eager(captures):
    method, said = small.prepared("noise"), []
    taken, calls = graphs.Graphs(method, True, said.append), [0]

    def body():
        calls[0] += 1
        method.log.add(late=torch.zeros(()))

    assert [taken.take("a", None, body) for _ in range(4)] == [False, False, False, False]
    assert "logs 'late'" in said[0] and not method.log.sums and len(said) == 1


def test_a_step_that_draws_on_the_cpu_stays_eager(captures):
    said = []
    taken = graphs.Graphs(small.prepared("noise"), True, said.append)
    assert [taken.take("a", None, lambda: torch.rand(1)) for _ in range(3)] == [False, False, False]
    assert "draws random numbers on the CPU" in said[0]


def test_out_of_memory_drops_what_was_captured_before_anything_is_split(captures, monkeypatch):
    original, fail, said = Noise.student_terms, [False], []

    def terms(self, x, t, rows):
        if fail[0]:
            fail[0] = False
            raise MemoryError("planted")
        return original(self, x, t, rows)

    monkeypatch.setattr(Noise, "student_terms", terms)
    whole = walked(("noise", LONGER), graphs=False)
    method = small.prepared("noise", LONGER)
    guards = Guards(method, Events(None, [lambda e: said.append(e["text"]) if e["kind"] == "warning" else None]), None, graphs=True)
    done = 0
    for epoch in range(method.epochs):
        for _, fn, args, occurrence in steps(method, epoch):
            if done == 8 and fn.__name__ == "learn":  # as another step of the run would that is not captured yet
                fail[0] = guards.graphs._eager.add((fn, args, 1)) is None
            guards.step(Position(0, epoch, done, fn, args, occurrence))
            method.step_ends()
            done += 1
    assert "captured steps gave theirs back" in said[0] and len(said) == 1 and not guards.graphs.on and method.pace.parts == 1
    tensors, _ = state.collect(method)
    assert all(torch.equal(v, whole[k]) for k, v in tensors.items() if k.startswith("student"))


def test_a_replayed_step_does_not_bring_back_the_numbers_of_an_earlier_one(captures):
    method = small.prepared("noise", LONGER)
    guards = Guards(method, Events(None), None, graphs=True)
    done = 0
    for epoch in range(method.epochs):
        for _, fn, args, occurrence in steps(method, epoch):
            guards.step(Position(0, epoch, done, fn, args, occurrence))
            method.step_ends()
            done += 1
    assert captures.replays
    method.pace.rolled_back = True
    guards.snapshot.restore()
    assert method.pace.rolled_back


def test_variants_are_captured_one_by_one(captures):
    taken = graphs.Graphs(small.prepared("noise"), True, print)
    for variant in ("a", "b", "a", "b", "a", "b"):
        taken.take(variant, None, lambda: None)
    assert captures.made == 2 and captures.replays == 2


def test_a_step_with_data_for_an_argument_does_not_fill_the_memory_with_graphs(captures):
    said = []
    taken = graphs.Graphs(small.prepared("noise"), True, said.append)
    taken.method.log.prefix = "adapt"
    done = [[taken.take(("adapt", n), None, lambda: None) for _ in range(4)] for n in range(graphs.VARIANTS + 9)]
    assert done == [[False, False, True, True]] * graphs.VARIANTS + [[False] * 4] * 9
    assert captures.made == graphs.VARIANTS
    assert len(said) == 1 and f"step 'adapt' was called with more than {graphs.VARIANTS} different arguments" in said[0]
    taken.method.log.prefix = "learn"  # the others go on
    assert [taken.take("learn", None, lambda: None) for _ in range(4)] == [False, False, True, True]


def test_nothing_is_captured_on_a_cpu_or_with_images_elsewhere_or_where_it_is_switched_off(captures, monkeypatch):
    monkeypatch.undo()
    method = small.prepared("muse")
    assert not graphs.capturable(method) and not graphs.Graphs(method, True, print).on
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda"), "store": Store(method.rng, 4, (1, 2, 2))})()
    assert graphs.capturable(on_gpu) and not graphs.Graphs(on_gpu, False, print).on
    on_gpu.store = Store(method.rng, 4, (1, 2, 2), tier="host")
    assert not graphs.capturable(on_gpu)
