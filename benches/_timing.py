"""Timers: providers interleaved round by round, medians with p20 and p80, CUDA events on a GPU.

Warm-up comes first; between rounds nothing else runs. On a CPU each provider whose call is short is called once untimed before its
timed calls of a round (its own caches: "warm"); on a GPU a buffer larger than the L2 cache is read before each call ("flushed": what
the cache then holds need not be written back under the clock). `ms` is a call as it is made; `graph_ms` the same work replayed from a
CUDA graph, kernels without launches: small shapes differ in it, and bandwidth is judged by it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import ops

from . import check
from ._case import Call, Case, Plan, Provider

ON_GPU = (5, 30, 1.5)
"""Rounds of a case on a GPU: at least, at most, and the seconds after which no further one begins."""
WARM = 0.03
"""Seconds of warm-up calls on a GPU, after the first one."""


class _Clock:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.flush = torch.zeros(64 << 20, device=plan.device) if plan.cuda else None

    def __call__(self, call: Call, inner: int) -> float:
        """Milliseconds a call."""
        if self.flush is None:
            if inner > 1:  # a call that fills a round alone also turns its caches over alone
                call()
            begin = time.perf_counter()
            for _ in range(inner):
                call()
            return 1e3 * (time.perf_counter() - begin) / inner
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.sum()
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def graph(self, call: Call) -> float:
        """Milliseconds of the same work replayed from a CUDA graph: kernels without launches."""
        before, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = call()
        except Exception:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own as the current one
            raise

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
    """Measured GB/s (read and write) of a copy of 64 MiB, on a GPU of 1 GiB (quick: 4 MiB)."""
    x = torch.ones((4 if plan.quick else 1024 if plan.cuda else 64) << 18, device=plan.device)
    y, clock = torch.empty_like(x), _Clock(plan)
    for _ in range(3):
        y.copy_(x)
    times = [clock(lambda: [y.copy_(x)], 1) for _ in range(5 if plan.quick else 15)]
    return 2 * x.numel() * 4 / statistics.median(times) / 1e6


# Measuring ------------------------------------------------------------------------------------------------------------


def measure_all(cases: Iterable[Case], plan: Plan) -> list[dict[str, Any]]:
    """The rows of all cases. Past the plan's deadline no further case begins, and the last row says so."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        if plan.late:
            rows.append({"op": case.op, **case.labels, "provider": "this case and those after it", "reason": "no time was left"})
        else:
            rows += measure(case, plan)
        if plan.progress is not None:
            plan.progress(rows)
        if plan.late:
            break
    return rows


def measure(case: Case, plan: Plan) -> list[dict[str, Any]]:
    """Check, warm up and time the providers of a case under each thread count: one row each."""
    truth, failed = check.attempt(case.truth, "reference")
    counts = () if plan.cuda else plan.threads if case.threads is None else case.threads
    if not counts:
        return _measure(case, plan, truth, failed, {})
    rows = []
    for count in counts:
        with threads(count):
            rows += _measure(case, plan, truth, failed, {"threads": count})
    return rows


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads for torch, for our kernels and for what is compiled meanwhile."""
    from torch._inductor import config as inductor

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with inductor.patch({"cpp.threads": count}):  # also in the key of its cache: generated code names a thread count
            yield
    finally:
        torch.set_num_threads(before)


def _measure(case: Case, plan: Plan, truth: Sequence[Tensor] | None, failed: str, common: dict[str, Any]) -> list[dict[str, Any]]:
    if plan.compile:
        torch._dynamo.reset()
    rows, running, clock = [], [], _Clock(plan)
    for p in reversed(case.providers) if plan.swap else case.providers:
        row: dict[str, Any] = {"op": case.op, **case.labels, **p.labels, **common, "provider": p.name}
        row |= {"rung": p.rung} if p.rung else {}
        row |= {"kind": p.kind, "backend": p.backend, "ok": None}
        rows.append(row)
        if p.call is not None and running and plan.late:  # a compilation may have eaten it
            row["reason"] = "no time was left"
            continue
        found, reason = (None, p.reason) if p.call is None else check.attempt(p.call, p.backend)
        if found is None or p.call is None:
            row["reason"] = reason
            continue
        if not p.checked:
            row["check"] = "draws its own rows: times only"
        elif truth is None:
            row["ok"], row["check"] = False, f"the definition did not run: {failed}"
        else:
            row["ok"], row["check"] = check.of_provider(case, p, found, truth)
        if p.kind == "ours" and row["ok"] is not False and (case.op, p.name) in plan.wrong:
            row["ok"], row["check"] = False, plan.wrong[case.op, p.name]
        del found
        running.append((p, row, _warm(p.call, plan)))
    times: list[list[float]] = [[] for _ in running]
    least, most, limit = (3, 3, 1.0) if plan.quick else ON_GPU if plan.cuda else (5, 15, case.seconds)
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and (time.perf_counter() - begin > limit or plan.late):
            break
        for own, (p, _, inner) in zip(times, running):
            assert p.call is not None
            ops.use(p.backend)
            if plan.cuda and (not own or own[-1] < 2.0):
                p.call()  # the choice of the backend is looked up here (0.1 ms), not under the clock
            own.append(clock(p.call, inner) / p.batches)
    for own, (p, row, inner) in zip(times, running):
        row["ms"], row["p20"], row["p80"] = (round(v, 6) for v in spread(own))
        row |= {"rounds": len(own), "calls": inner, "cache": "flushed" if plan.cuda else "warm", **_rates(case, plan, row["ms"])}
        if plan.cuda:
            row |= _on_gpu(p, plan, clock)
            row |= {f"graph_{k}": v for k, v in _rates(case, plan, row["graph_ms"]).items()} if "graph_ms" in row else {}
    ops.use("auto")
    ratios(case.baseline, rows if not plan.swap else rows[::-1])
    return rows


def _warm(call: Call, plan: Plan) -> int:
    """More than 200 ms of calls, on a GPU `WARM`; returns how many make a timed round long enough."""
    if plan.cuda:
        call()
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (not plan.quick and time.perf_counter() - begin < (WARM if plan.cuda else 0.25)):
        call()
        calls += 1
        if plan.cuda:
            torch.cuda.synchronize()  # or thousands of calls queue up
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


def ratios(baseline: str, rows: list[dict[str, Any]]) -> None:
    """Speed-ups, only between rows that are right: over the baseline, over the fastest compiled form of the same dtype, of a CUDA
    kernel over its Triton twin, and of a rung over the nearest one before it that has a time. `graph_…` is the same in graph time."""
    for graph in ("", "graph_"):
        ms = f"{graph}ms"
        fine = [r for r in rows if ms in r and r["ok"]]
        eager = next((r[ms] for r in fine if r["provider"] == baseline), None)
        twin = next((r[ms] for r in fine if r["provider"] == "ours: triton"), None)
        below = None
        for r in fine:
            best = min((c[ms] for c in fine if c["kind"] == "compile" and c.get("dtype") == r.get("dtype")), default=None)
            if eager:
                r[f"{graph}x_eager"] = round(eager / r[ms], 3)
            if best:
                r[f"{graph}x_compile"] = round(best / r[ms], 3)
            if twin and r["provider"] == "ours: cuda":
                r[f"{graph}x_triton"] = round(twin / r[ms], 3)
            if "rung" in r:
                if below:
                    r[f"{graph}x_rung"] = round(below / r[ms], 3)
                below = r[ms]
