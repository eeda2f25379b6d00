"""Ratios, spreads, thread counts: the arithmetic of the tables."""

from __future__ import annotations

import pytest
import torch

from benches import _timing, check
from benches._case import Case, Plan, Provider
from fastkd.ops import _registry

from .records import row

CPU = Plan(torch.device("cpu"), quick=True, compile=False)


def test_ratios_are_over_the_baseline_and_the_fastest_compiled_form_of_the_dtype():
    rows = [
        row("published", 12.0, "eager"),
        row("compile(a)", 6.0, "compile"),
        row("compile(b)", 4.0, "compile"),
        row("compile(b), bf16", 1.0, "compile", dtype="bfloat16"),
        row("ours", 2.0),
        row("ours, bf16", 0.5, dtype="bfloat16"),
    ]
    _timing.ratios("published", rows)
    assert [r["x_eager"] for r in rows] == [1, 2, 3, 12, 6, 24]
    assert [r["x_compile"] for r in rows] == [0.333, 0.667, 1, 1, 2, 2]


def test_a_rung_is_over_the_nearest_one_below_that_has_a_right_time():
    rows = [
        row("a", 8.0, rung="as published"),
        row("b", None, rung="freezing"),
        row("c", 1.0, rung="kernels", ok=False),
        row("d", 2.0, rung="identity"),
        row("aside", 1.5, "compile"),
        row("e", 1.0, rung="bf16"),
    ]
    _timing.ratios("a", rows)
    assert [r.get("x_rung") for r in rows] == [None, None, None, 4, None, 2]
    assert "x_eager" not in rows[2]


def test_each_thread_count_is_measured_and_seen_by_the_provider():
    seen = []

    def call():
        seen.append(torch.get_num_threads())
        return (torch.ones(2),)

    case = Case("an_op", {"case": "a"}, [Provider("eager", "eager", call)], lambda: (torch.ones(2).double(),), "eager", threads=(1, 3))
    rows = _timing.measure(case, CPU)
    assert [r["threads"] for r in rows] == [1, 3] and set(seen) == {1, 3}
    case.threads = None
    assert "threads" not in _timing.measure(case, CPU)[0]


def test_a_call_of_several_batches_has_the_time_of_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_timing._Clock, "__call__", lambda clock, call, inner: 8.0)
    one, eight = Provider("one", "eager", lambda: (torch.ones(2),)), Provider("eight", "peer", lambda: (torch.ones(2),), batches=8)
    rows = _timing.measure(Case("bn_sums", {"case": "a"}, [one, eight], lambda: (torch.ones(2).double(),), "one"), CPU)
    assert [r["ms"] for r in rows] == [8.0, 1.0] and rows[1]["x_eager"] == 8.0


def test_kernels_are_compared_without_their_launches_too():
    rows = [row("published", 9.0, "eager", graph_ms=4.0), row("ours: triton", 3.0, graph_ms=2.0), row("ours: cuda", 2.0, graph_ms=1.0)]
    _timing.ratios("published", rows)
    assert [r["graph_x_eager"] for r in rows] == [1, 2, 4] and "x_triton" not in rows[1]
    assert (rows[2]["x_triton"], rows[2]["graph_x_triton"]) == (1.5, 2)


def test_a_backend_that_is_left_out_says_so():
    from benches._case import backends

    left = Plan(torch.device("cpu"), quick=True, compile=False, without=("cpp",))
    assert "--without" in {name: why for name, _, why in backends("bn_sums", left)}["ours: cpp"]


def test_swapped_rows_have_the_same_ratios():
    case = Case("an_op", {}, [], lambda: (), "a")
    case.providers = [Provider(name, "eager", lambda: (torch.ones(2),), rung=name) for name in ("a", "b")]
    case.truth = lambda: (torch.ones(2).double(),)
    rows = _timing.measure(case, Plan(torch.device("cpu"), quick=True, swap=True, compile=False))
    assert [r["provider"] for r in rows] == ["b", "a"]
    assert rows[0]["x_rung"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"], rel=0.01) and "x_rung" not in rows[1]


@pytest.mark.parametrize(("tolerance", "right"), [((1e-3, 1.0), True), ((1.0, 1e-3), False), (1.0, True), (1e-3, False), (None, False)])
def test_a_tolerance_for_each_output(tolerance, right: bool):
    truth = torch.ones(2, 3).double()
    found = truth.float() * torch.tensor([[1.0], [1.5]])
    assert check.verdict(list(found), list(truth), tolerance)[0] == right


def test_only_what_a_case_compares_is_compared():
    case = Case("an_op", {}, [], lambda: (), "a", compared=lambda outputs: outputs[:1])
    outputs, truth = (torch.ones(2), torch.zeros(2)), (torch.ones(2).double(), torch.ones(2).double())
    assert check.of_provider(case, Provider("a", "eager"), outputs, truth)[0]
    case.compared = None
    assert not check.of_provider(case, Provider("a", "eager"), outputs, truth)[0]
    assert check.of_provider(case, Provider("a", "eager", tolerance=2.0), outputs, truth)[0]


def test_twice_the_error_of_plain_torch_is_allowed_where_a_case_says_so():
    truth, plain = (torch.ones(4).double(),), (torch.full((4,), 1.1).bfloat16(),)
    case = Case("an_op", {}, [], lambda: truth, "a", tolerance=lambda: plain)
    for off, right in ((1.19, True), (1.25, False)):
        assert check.of_provider(case, Provider("a", "eager"), (torch.full((4,), off).bfloat16(),), truth)[0] == right


def test_the_interpreter_is_for_toy_sizes(monkeypatch: pytest.MonkeyPatch):
    from benches._case import backends

    monkeypatch.setattr(_registry, "interpreting", lambda: True)
    assert {name: why for name, _, why in backends("bn_sums", CPU)}["ours: triton"] == ""
    whole = Plan(torch.device("cpu"), compile=False)
    assert "interpreted" in {name: why for name, _, why in backends("bn_sums", whole)}["ours: triton"]
