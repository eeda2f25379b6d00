"""Every registered method on the embedded digits teacher: milliseconds a step by kind, and where an epoch's time goes.

The steps are the engine's: `assemble.make_job` makes the run, `method.steps` walks it, with the engine's draws and precision.
Epoch 0 is warm-up; then the backends take turns, an epoch each: three, on a GPU one. On a CPU with the largest of the plan's thread
counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fastkd import assemble, methods, ops
from fastkd.config import read_recipe, recipes, resolve
from fastkd.engine import loop
from fastkd.method import Method, steps

from . import check
from ._case import Plan
from ._timing import spread, threads

SMALL: dict[str, Any] = {
    **{"batch": 20, "kd_batch": 16, "kd_steps": 6, "g_steps": 4, "g_loops": 1, "gwp_loops": 1, "loops": 1, "hidden": 32, "nz": 32},
    **{"n_images": 64},
}
"""--quick: whichever of these fields a method has."""


def run(plan: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with threads(max(plan.threads)) if plan.threads else contextlib.nullcontext():
        for name in methods.names():
            rows += [{"method": name, "provider": "every one", "reason": "no time was left"}] if plan.late else bench(name, plan)
            if plan.progress is not None:
                plan.progress(rows)
    return rows


def settings(name: str, plan: Plan, epochs: int) -> dict[str, Any]:
    """The method's digits recipe, cut to one warm-up epoch and `epochs` timed ones; sizes stay but for --quick."""
    recipe = f"{name}-digits"
    table = read_recipe(recipe).get("method", {}) if recipe in recipes() else {}
    fields = {f.name: f.default for f in dataclasses.fields(methods.method_class(name, {"name": name}))}
    over: dict[str, Any] = {"epochs": epochs + 1, "warmup": min(1, table.get("warmup", fields.get("warmup", 0)))}
    over |= SMALL if plan.quick else {}
    return {"name": name, **{k: v for k, v in over.items() if k in fields}}


def bench(name: str, plan: Plan) -> list[dict[str, Any]]:
    """Rows of one method: a phase or a kind of step each, for each backend."""
    epochs = 1 if plan.quick or plan.cuda else 3
    wanted = ["reference", "auto"]
    if plan.swap:
        wanted.reverse()
    rows: list[dict[str, Any]] = []
    walkers: dict[str, Walker] = {}
    for backend in wanted:
        try:
            ops.use(backend)
            walkers[backend] = Walker(name, backend, settings(name, plan, epochs), plan)
            walkers[backend].epoch(0)
            walkers[backend].clear()
        except Exception as error:  # what a method needs and does not get here is its row's reason
            walkers.pop(backend, None)
            rows.append({"method": name, "provider": label(backend), "reason": check.one_line(error)})
    for e in range(1, epochs + 1):
        for backend, walker in list(walkers.items()):
            try:
                walker.epoch(e)
            except Exception as error:
                del walkers[backend]
                rows.append({"method": name, "provider": label(backend), "reason": check.one_line(error)})
    ops.use("auto")
    made = {backend: walker.rows() for backend, walker in walkers.items()}
    base = {row["step"]: row["ms"] for row in made.get("reference", [])}
    for backend, own in made.items():
        faults = [f"{op}, {said}" for (op, provider), said in plan.wrong.items() if fits(backend, op, provider, plan)]
        for row in own:
            row["ok"] = not faults
            if faults:
                row["check"] = faults[0]
            elif base.get(row["step"]):
                row["x_eager"] = round(base[row["step"]] / row["ms"], 3)
        rows += own
    return rows


def label(backend: str) -> str:
    return {"reference": "definitions", "auto": "ours: auto"}.get(backend, f"ours: {backend}")


def fits(backend: str, op: str, provider: str, plan: Plan) -> bool:
    """Whether a run with this backend uses what the gate found wrong."""
    if backend == "reference":
        return provider == "definition"
    if backend == "auto":
        chosen = next((c for name, device, c, _ in ops.table() if name == op and device == plan.device.type), "")
        return provider.removeprefix("ours: ") == chosen
    return provider == f"ours: {backend}"


class Walker:
    """A run of a method under one backend, with a time for each step."""

    def __init__(self, name: str, backend: str, table: dict[str, Any], plan: Plan):
        self.name, self.backend = name, backend
        self.job = assemble.make_job(resolve(None, {"method": table, "device": str(plan.device), "ops": {"backend": backend}}))
        self.method: Method = self.job.method
        loop.prepare(self.method, self.job.given)
        self.cast = loop.autocast(self.method.device, self.job.settings.precision)
        self.cuda = plan.cuda
        self.clear()

    def clear(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.phase: dict[str, str] = {}
        self.walls: list[float] = []

    def epoch(self, e: int) -> None:
        ops.use(self.backend)
        self.wait()
        marks: list[tuple[str, Callable[[], float]]] = []
        begin = time.perf_counter()
        for _, fn, args, occurrence in steps(self.method, e):
            step = fn.__name__
            self.phase[step] = fn.phase  # type: ignore[attr-defined]
            self.method.rng.at(self.job.settings.seed, e, step, occurrence)
            self.method.log.prefix = step
            marks.append((step, self.timed(lambda fn=fn, args=args: fn(*args))))  # type: ignore[misc]
        self.wait()
        self.walls.append(1e3 * (time.perf_counter() - begin))
        for step, ms in marks:
            self.times.setdefault(step, []).append(ms())

    def timed(self, fn: Callable[[], None]) -> Callable[[], float]:
        """Run a step; the result reads its milliseconds later, so that the GPU is not waited for between steps."""
        if self.cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            with self.cast():
                fn()
            self.method.step_ends()
            last.record()
            return lambda: float(first.elapsed_time(last))
        begin = time.perf_counter()
        with self.cast():
            fn()
        self.method.step_ends()
        took = 1e3 * (time.perf_counter() - begin)
        return lambda: took

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def rows(self) -> list[dict[str, Any]]:
        total = sum(sum(t) for t in self.times.values())
        common: dict[str, Any] = {"method": self.name, "provider": label(self.backend)}
        common |= {} if self.cuda else {"threads": torch.get_num_threads()}
        common |= {"precision": self.job.settings.precision, "epochs": len(self.walls)}
        wall = statistics.median(self.walls) if self.walls else 0.0
        out = []
        for step, times in self.times.items():
            median, p20, p80 = (round(v, 6) for v in spread(times))
            out.append({**common, "phase": self.phase[step], "step": step, "ms": median, "p20": p20, "p80": p80, "count": len(times)})
            out[-1]["share"] = round(sum(times) / total, 4)
        for phase in sorted(set(self.phase.values())):
            own = sum(sum(t) for step, t in self.times.items() if self.phase[step] == phase)
            row = {**common, "phase": phase, "step": f"all of {phase}", "ms": round(own / max(1, len(self.walls)), 6)}
            out.append({**row, "share": round(own / total, 4), "epoch_ms": round(wall, 3)})
        return out
