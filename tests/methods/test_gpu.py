"""What only a GPU can show of the methods: every capturable step without a word between host and device, captured and replayed."""

from __future__ import annotations

import pytest
import torch

from fastkd.engine import graphs, loop, state
from fastkd.engine.events import Events
from fastkd.method import steps
from fastkd.methods.noise import Noise
from tests import small

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")]
each = pytest.mark.parametrize("variant", small.VARIANTS, ids=small.ident)


@pytest.fixture(autouse=True)
def repeatable():
    """The same algorithms every time: what is compared is the engine, not the choice of a library."""
    before = torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before


def prepared(variant):
    return small.prepared(*variant, device="cuda")


@each
def test_no_host_synchronisation_in_a_capturable_step(variant):
    method = prepared(variant)
    for e in range(2):
        for _, fn, args, n in steps(method, e):
            method.rng.at(0, e, fn.__name__, n)
            method.log.prefix = fn.__name__
            torch.cuda.set_sync_debug_mode("default" if fn.eager or e == 0 else "error")  # the first calls load kernels
            try:
                fn(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            method.step_ends()


@each
def test_replayed_runs_equal_eager_ones(variant, monkeypatch):
    replays, said = [0], []
    original = graphs.capture

    def counted(body, generators, pool):
        replay = original(body, generators, pool)

        def again():
            replays[0] += 1
            replay()

        return again

    monkeypatch.setattr(graphs, "capture", counted)
    listen = [lambda e: said.append(e["text"]) if e["kind"] == "warning" and "guard" not in e else None]
    found = []
    for on in (False, True):
        method = prepared(variant)
        assert loop.run(method, loop.Settings(poll=2, every_minutes=1e6, graphs=on), Events(None, listen), None) == 0
        found.append({**state.collect(method)[0]})
    assert not said
    assert replays[0] > 0 or max(_calls(prepared(variant)).values()) <= graphs.EAGER
    eager, replayed = found
    assert eager.keys() == replayed.keys()
    for name, value in eager.items():
        assert torch.allclose(value.double(), replayed[name].double(), rtol=1e-3, atol=1e-4, equal_nan=True), name
    unequal = [name for name, value in eager.items() if not torch.equal(value.nan_to_num(7e7), replayed[name].nan_to_num(7e7))]
    print(f"{small.ident(variant)}: {replays[0]} replays, {len(unequal)} of {len(eager)} tensors differ in a bit {unequal[:3]}")


def _calls(method):
    calls: dict[tuple, int] = {}
    for e in range(method.epochs):
        for _, fn, args, _ in steps(method, e):
            if not fn.eager:
                calls[fn.__name__, args] = calls.get((fn.__name__, args), 0) + 1
    return calls or {"none": 0}


@pytest.mark.parametrize("name", ["muse", "noise"])
def test_killed_and_resumed_with_graphs(name, tmp_path):
    whole = prepared((name, {}))
    assert small.run(whole) == 0
    out = tmp_path / "run"
    out.mkdir()
    assert small.run(prepared((name, {})), out, max_steps=7) == 75
    resumed = prepared((name, {}))
    assert small.run(resumed, out, resume=True) == 0
    for (key, a), b in zip(state.collect(whole)[0].items(), state.collect(resumed)[0].values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True), key


def test_a_step_that_reads_on_the_host_stays_eager_and_the_run_goes_on(monkeypatch):
    original, said, found = Noise.student_terms, [], []

    def reading(self, x, t, rows):
        assert float(x.sum()) == float(x.sum())  # waits for the device
        return original(self, x, t, rows)

    for broken in (False, True):
        if broken:
            monkeypatch.setattr(Noise, "student_terms", reading)
        method = prepared(("noise", {"epochs": 4, "kd_steps": 4}))
        listen = [lambda e: said.append(e["text"]) if e["kind"] == "warning" and "guard" not in e else None]
        assert loop.run(method, loop.Settings(poll=2, every_minutes=1e6, graphs=broken), Events(None, listen), None) == 0
        found.append(state.collect(method)[0])
    assert len(said) == 1 and "'learn' stays eager" in said[0]
    for name, value in found[0].items():
        assert torch.allclose(value.double(), found[1][name].double(), rtol=1e-3, atol=1e-4, equal_nan=True), name
