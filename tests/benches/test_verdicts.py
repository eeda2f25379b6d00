"""Targets against records: met, short, not run, wrong, not gated; and what may be said of each."""

from __future__ import annotations

import pytest

from benches import BENCHES, targets, verdicts
from benches.targets import Target
from benches.verdicts import judge
from fastkd.ops._registry import OPS

from .records import record, row

EAGER = Target("a row", "eager", "bn_match", {"case": "BN layers*"}, 5, ("hooks",))
COMPILED = Target("a row", "compile", "bn_match", {"case": "BN layers*"}, 1, ("compile*",), even=True)


def status(target: Target, *rows, threads: int | None = 1, **facts) -> tuple[str, str]:
    found = judge(target, record(list(rows), **facts), threads)
    return found.status, found.text


def test_met_and_short():
    assert status(EAGER, row("hooks", 10.0, "eager"), row("ours: cpp", 2.0)) == ("met", "met: 5.00x")
    assert status(EAGER, row("hooks", 8.2, "eager"), row("ours: cpp", 2.0)) == ("short", "short: 4.10x of 5x")


def test_the_worst_case_counts():
    other = {"shape": "64x3x32x32"}
    rows = [row("hooks", 10.0, "eager"), row("ours: cpp", 1.0), row("hooks", 8.0, "eager", **other), row("ours: cpp", 2.0, **other)]
    assert status(EAGER, *rows) == ("short", "short: 4.00x to 10x of 5x")


def test_the_backend_that_the_op_takes_by_itself_is_held_to_it():
    rows = [row("hooks", 10.0, "eager"), row("definition", 0.1), row("ours: triton", 1.0), row("ours: cpp", 5.0)]
    assert status(EAGER, *rows) == ("short", "short: 2.00x of 5x")


def test_replayed_is_judged_by_graphs_alone():
    target = Target("a row", "compile", "bn_match", {"case": "BN layers*"}, 1.2, ("compile*",), graph=True)
    taken = [{"op": "frozen_bn_act_stats", "device": "cpu", "chosen": "cpp", "captured": "triton", "backends": {}}]
    other = row("compile(a)", 1.0, "compile")
    rows = [row("ours: cpp", 1.0, graph_ms=9.0), row("ours: triton", 2.0, graph_ms=1.0), other]
    assert status(target, *rows, ops=taken) == ("not run", "not run: no time from a graph")
    rows.append(row("compile(b)", 5.0, "compile", graph_ms=2.0))
    assert status(target, *rows, ops=taken) == ("met", "met: 2.00x (compile(a) not replayed)")
    other["graph_ms"] = 1.1
    assert status(target, *rows, ops=taken) == ("short", "short: 1.10x of 1.2x")


def test_not_run_says_why():
    assert judge(EAGER, None).text == "not run: no record of the bench bn_match"
    assert status(EAGER)[1] == "not run: the bench bn_match has no such row"
    assert status(EAGER, row("hooks", 1.0, "eager"), row("ours: cpp")) == ("not run", "not run: is not here")
    assert status(EAGER, row("hooks", None, "eager"), row("ours: cpp", 1.0)) == ("not run", "not run: is not here")
    stopped = record([]) | {"error": "RuntimeError: no memory"}
    assert judge(EAGER, stopped, 1).text == "not run: RuntimeError: no memory"


def test_a_case_that_did_not_run_stands_beside_those_that_did():
    other = {"shape": "64x3x32x32"}
    rows = [row("hooks", 10.0, "eager"), row("ours: cpp", 1.0), row("hooks", None, "eager", **other), row("ours: cpp", 2.0, **other)]
    assert status(EAGER, *rows) == ("met", "met: 10x (1 of 2 cases not run: is not here)")


@pytest.mark.parametrize("who", ["ours: cpp", "hooks"])
def test_no_ratio_for_a_wrong_one(who: str):
    rows = [row("hooks", 10.0, "eager"), row("ours: cpp", 1.0)]
    next(r for r in rows if r["provider"] == who).update(ok=False, check="output 0 is off by 2.0e-01")
    found, text = status(EAGER, *rows)
    assert found == ("wrong" if who == "ours: cpp" else "not run") and "x" not in text.replace("output", "").replace("off", "")


def test_a_machine_without_the_unit_is_not_held_to_it():
    half = Target("a row", "eager", "bn_match", {}, 3, ("hooks",), needs="amx_bf16")
    rows = [row("hooks", 2.0, "eager"), row("ours: cpp", 1.0)]
    assert status(half, *rows) == ("not gated", f"not gated: {targets.MACHINE['amx_bf16']}; measured 2.00x")
    assert status(half, *rows, flags=["amx_bf16"]) == ("short", "short: 2.00x of 3x")


def test_not_slower_means_within_the_spread():
    assert status(COMPILED, row("compile(a)", 1.0, "compile"), row("ours: cpp", 1.08))[0] == "met"
    assert status(COMPILED, row("compile(a)", 1.0, "compile"), row("ours: cpp", 1.2))[0] == "short"


def test_the_fastest_rival_counts():
    rows = [row("compile(a)", 9.0, "compile"), row("compile(b)", 1.5, "compile"), row("ours: cpp", 3.0)]
    assert status(COMPILED, *rows) == ("short", "short: 0.50x of 1x")


def test_what_a_rival_adds_to_a_forward():
    added = Target("a row", "peer", "bn_match", {}, 100, ("grad-cam",), ours="ours: maps alone", less="forward")
    rows = [row("forward", 10.0, "eager", ok=None), row("grad-cam", 40.0, "peer"), row("ours: maps alone", 0.1)]
    assert status(added, *rows) == ("met", "met: 300x")
    assert status(added, *rows[1:]) == ("not run", "not run: no row 'forward'")


def test_share_of_a_copy():
    share = Target("a row", "a copy", "bn_match", {}, 0.85)
    assert status(share, row("ours: cpp", 1.0, of_copy=0.91)) == ("met", "met: 91 %")
    assert status(share, row("ours: cpp", 1.0, of_copy=0.7)) == ("short", "short: 70 % of 85 %")
    assert status(share, row("ours: cpp", 1.0))[1] == "not run: no byte count for this case"


def test_a_kernel_that_loses_to_its_twin_is_named():
    called, replayed = (t for t in targets.GPU if t.row.startswith("CUDA kernel of bn_sums"))
    rows = [row("ours: cuda", 1.0, op="bn_sums", graph_ms=0.5), row("ours: triton", 1.05, op="bn_sums", graph_ms=0.4)]
    assert status(called, *rows) == ("short", "short: 1.05x of 1.1x")
    assert status(replayed, *rows) == ("short", "short: 0.80x of 1.1x: graphs take Triton's")


def test_kernels_are_judged_without_their_launches():
    twin = next(t for t in targets.GPU if t.against == "its Triton twin" and t.graph)
    rows = [row("ours: cuda", 1.0, op=twin.where["op"], case="single op", graph_ms=0.5)]
    rows += [row("ours: triton", 1.0, op=twin.where["op"], case="single op", graph_ms=0.8)]
    assert status(twin, *rows) == ("met", "met: 1.60x")
    share = Target("a row", "a copy", "bn_match", {}, 0.85, graph=True)
    assert status(share, row("ours: cpp", 1.0, of_copy=0.6, graph_of_copy=0.9)) == ("met", "met: 90 %")


def test_two_threads_beside_one():
    rows = [row("hooks", 10.0, "eager"), row("ours: cpp", 1.0)]
    rows += [r | {"threads": 2, "ms": r["ms"] / 2} for r in rows]
    head, lines, found = verdicts.table([EAGER], {"bn_match": record(rows)})
    assert head[3:] == ["1 thread", "2 threads", "ours, more threads"]
    assert lines == [["a row", "eager", "≥ 5x", "met: 10x", "met: 10x", "2.00x"]] and len(found) == 2


@pytest.mark.parametrize("target", [*targets.CPU, *targets.GPU], ids=lambda t: f"{t.row}, {t.against}")
def test_every_target_says_what_it_wants(target: Target):
    assert target.least > 0 and target.wanted and target.bench in BENCHES
    assert not target.needs or target.needs in targets.MACHINE


def test_every_op_with_two_kinds_of_gpu_kernels_is_held_to_its_twin():
    both = {name for name, op in OPS.items() if {"cuda", "triton"} <= set(op.order.get("cuda", ()))}
    assert both <= targets.TWINS.keys() <= OPS.keys()


def test_the_ladder_differs_in_labels_and_is_one_case():
    step = next(t for t in targets.CPU if t.bench == "generator" and t.against == "the published way")
    rows = [row("published", 30.0, "eager"), row(step.ours, 10.0, layout="channels_last")]
    assert judge(step, record(rows, "generator"), 1).text == "met: 3.00x"
