"""Timers: providers interleaved round by round, medians with p20 and p80, CUDA events on a GPU.

Warm-up comes first; between rounds nothing else runs. On a CPU each provider is called once untimed before its timed calls of a
round (its own caches: "warm"); on a GPU a buffer larger than the L2 cache is overwritten before each call ("flushed").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import ops

from . import check
from ._case import Call, Case, Plan, Provider


class _Clock:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=plan.device) if plan.cuda else None

    def __call__(self, call: Call, inner: int) -> float:
        """Milliseconds a call."""
        if self.flush is None:
            call()
            begin = time.perf_counter()
            for _ in range(inner):
                call()
            return 1e3 * (time.perf_counter() - begin) / inner
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def graph(self, call: Call) -> float:
        """Milliseconds of the same work replayed from a CUDA graph: kernels without launches."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> Sequence[Tensor]:
            graph.replay()
            return kept

        return statistics.median(self(replay, 1) for _ in range(20))


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, p20, p80."""
    ordered = sorted(times)
    at = [ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))] for q in (0.2, 0.8)]
    return statistics.median(ordered), at[0], at[1]


def copy_rate(plan: Plan) -> float:
    """Measured GB/s (read and write) of a copy of 64 MiB (quick: 4 MiB)."""
    x = torch.ones((4 if plan.quick else 64) << 18, device=plan.device)
    y, clock = torch.empty_like(x), _Clock(plan)
    for _ in range(3):
        y.copy_(x)
    times = [clock(lambda: [y.copy_(x)], 1) for _ in range(5 if plan.quick else 15)]
    return 2 * x.numel() * 4 / statistics.median(times) / 1e6


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(case: Case, plan: Plan) -> list[dict[str, Any]]:
    """Check, warm up and time the providers of a case: one row each."""
    if plan.compile:
        torch._dynamo.reset()
    truth, failed = check.attempt(case.truth, "reference")
    rows, running, clock = [], [], _Clock(plan)
    for p in reversed(case.providers) if plan.swap else case.providers:
        row: dict[str, Any] = {"op": case.op, **case.labels, "provider": p.name, "kind": p.kind, "backend": p.backend, "ok": None}
        rows.append(row)
        found, reason = (None, p.reason) if p.call is None else check.attempt(p.call, p.backend)
        if found is None or p.call is None:
            row["reason"] = reason
            continue
        if not p.checked:
            row["check"] = "draws its own rows: times only"
        elif truth is None:
            row["ok"], row["check"] = False, f"the definition did not run: {failed}"
        else:
            row["ok"], row["check"] = check.verdict(found, truth, case.tolerance)
        if p.kind == "ours" and row["ok"] is not False and (case.op, p.name) in plan.wrong:
            row["ok"], row["check"] = False, plan.wrong[case.op, p.name]
        del found
        running.append((p, row, _warm(p.call, plan)))
    del truth
    times: list[list[float]] = [[] for _ in running]
    least, most, limit = (3, 3, 1.0) if plan.quick else (5, 50 if plan.cuda else 15, case.seconds)
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > limit:
            break
        for own, (p, _, inner) in zip(times, running):
            assert p.call is not None
            ops.use(p.backend)
            if plan.cuda and done == 0:
                p.call()  # the choice of the backend is looked up here, not under the clock
            own.append(clock(p.call, inner))
    for own, (p, row, inner) in zip(times, running):
        row["ms"], row["p20"], row["p80"] = (round(v, 6) for v in spread(own))
        row |= {"rounds": len(own), "calls": inner, "cache": "flushed" if plan.cuda else "warm", **_rates(case, plan, row["ms"])}
        if plan.cuda:
            row |= _on_gpu(p, plan, clock)
    ops.use("auto")
    _ratios(case, rows)
    return rows


def _warm(call: Call, plan: Plan) -> int:
    """More than 200 ms of calls; returns how many make a timed round long enough."""
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (not plan.quick and time.perf_counter() - begin < 0.25):
        call()
        calls += 1
        if plan.quick:
            break
    each = (time.perf_counter() - begin) / calls
    return 1 if plan.cuda else max(1, min(200, int((0.002 if plan.quick else 0.02) / max(each, 1e-7))))


def _rates(case: Case, plan: Plan, ms: float) -> dict[str, float]:
    out = {}
    if case.bytes:
        out["gbps"] = round(case.bytes / ms / 1e6, 2)
        if plan.copy_gbps:
            out["of_copy"] = round(out["gbps"] / plan.copy_gbps, 3)
    if case.flops:
        out["tflops"] = round(case.flops / ms / 1e9, 4)
    return out


def _on_gpu(p: Provider, plan: Plan, clock: _Clock) -> dict[str, Any]:
    assert p.call is not None
    ops.use(p.backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    p.call()
    torch.cuda.synchronize()
    out: dict[str, Any] = {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)}
    if plan.graphs and p.kind != "peer":
        try:
            out["graph_ms"] = round(clock.graph(p.call), 6)
        except Exception as error:
            out["graph_reason"] = check.one_line(error)
    return out


def _ratios(case: Case, rows: list[dict[str, Any]]) -> None:
    """Speed-ups, only between rows that are right."""
    fine = [r for r in rows if "ms" in r and r["ok"]]
    eager = next((r["ms"] for r in fine if r["provider"] == case.baseline), None)
    best = min((r["ms"] for r in fine if r["kind"] == "compile"), default=None)
    for r in fine:
        if eager:
            r["x_eager"] = round(eager / r["ms"], 3)
        if best:
            r["x_compile"] = round(best / r["ms"], 3)


def measure_all(cases: Iterable[Case], plan: Plan) -> list[dict[str, Any]]:
    return [row for case in cases for row in measure(case, plan)]
