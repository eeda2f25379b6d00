"""Steps of a run at CIFAR scale as the engine takes them, rung by rung: half precision, the kernels, CUDA graphs, choice of algorithms.

ResNet-34 teacher, ResNet-18 student, 32², batches of 256, random weights. Everything that a run does for a step is in the time: draws,
guards, counting. Epoch 0 is warm-up (kernels are loaded, graphs captured); a step's time is the median over the epochs after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastkd import methods, models, ops
from fastkd.engine import loop
from fastkd.engine.events import Events
from fastkd.engine.guards import Guards, Position
from fastkd.log import Log
from fastkd.method import Augment, Given, Method, steps
from fastkd.nn import Student, instrument
from fastkd.rng import Rng

from . import check
from ._case import Plan
from ._timing import spread

FIELDS: dict[str, Any] = {
    **{"batch": 256, "kd_batch": 256, "kd_steps": 12, "g_steps": 6, "g_loops": 1, "gwp_loops": 1, "loops": 1, "nz": 256},
    **{"epochs": 3, "warmup": 0, "n_images": 512},
}
SMALL: dict[str, Any] = {"batch": 8, "kd_batch": 8, "kd_steps": 3, "g_steps": 3, "nz": 8, "epochs": 2}
"""--quick: networks are smaller too."""
SHOWN = ("adapt", "invert", "learn")
"""Steps that are shown: one of synthesis, one of distillation; the others come once an epoch."""


@dataclass(frozen=True)
class Rung:
    """How the steps are taken, and what that adds to the rung before."""

    name: str
    rung: str
    backend: str
    precision: str
    graphs: bool
    tried: bool


RUNGS = (
    Rung("definitions, fp32", "plain torch, eager", "reference", "fp32", False, False),
    Rung("definitions, bf16", "bf16", "reference", "bf16", False, False),
    Rung("kernels, bf16", "the kernels", "auto", "bf16", False, False),
    Rung("kernels, bf16, graphs", "CUDA graphs", "auto", "bf16", True, False),
    Rung("kernels, bf16, graphs, tried", "cuDNN tries its algorithms", "auto", "bf16", True, True),
    Rung("definitions, bf16, graphs, tried", "", "reference", "bf16", True, True),
)
METHODS = {"muse": RUNGS, "fast": (RUNGS[0], RUNGS[4])}


def run(plan: Plan) -> list[dict[str, Any]]:
    if not plan.cuda and not plan.quick:
        return [{"method": "every one", "provider": "engine", "reason": "shows what CUDA graphs gain; on a CPU see bench step"}]
    rows: list[dict[str, Any]] = []
    for name, rungs in METHODS.items():
        for rung in reversed(rungs) if plan.swap else rungs:
            common = {"method": name, "provider": rung.name, **({"rung": rung.rung} if rung.rung else {})}
            if plan.late:
                rows.append({**common, "reason": "no time was left"})
            else:
                rows += _rows(name, rung, common, plan)
            if plan.progress is not None:
                plan.progress(rows)
    ratios(rows)
    return rows


def _rows(name: str, rung: Rung, common: dict[str, Any], plan: Plan) -> list[dict[str, Any]]:
    try:
        with _settings(rung):
            walker = Walker(name, rung, plan)
            for e in range(walker.method.epochs):
                walker.epoch(e)
        return [{**common, **row} for row in walker.rows()]
    except Exception as error:
        return [{**common, "reason": check.one_line(error)}]
    finally:
        if plan.cuda:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _settings(rung: Rung) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    ops.use(rung.backend)
    torch.backends.cudnn.benchmark = rung.tried
    try:
        with ops.captured(rung.graphs):  # as the engine does it
            yield
    finally:
        ops.use("auto")
        torch.backends.cudnn.benchmark = before


def ratios(rows: list[dict[str, Any]]) -> None:
    """Over the first rung of the same method and step, and over the rung before."""
    for row in rows:
        same = [r for r in rows if "ms" in r and (r["method"], r.get("step")) == (row["method"], row.get("step"))]
        first = next((r for r in same if r["provider"] == RUNGS[0].name), None)
        if "ms" in row and first:
            row["x_eager"] = round(first["ms"] / row["ms"], 3)
        names = [r.name for r in RUNGS if r.rung]
        if "ms" in row and row["provider"] in names[1:]:
            below = next((r for r in same if r["provider"] == names[names.index(row["provider"]) - 1]), None)
            row |= {"x_rung": round(below["ms"] / row["ms"], 3)} if below else {}


class Walker:
    """A run of a method on one rung, with the times of its steps: on the device, and of the host alone."""

    def __init__(self, name: str, rung: Rung, plan: Plan):
        self.plan, self.precision = plan, rung.precision
        self.method = made(name, plan)
        said: list[str] = []
        events = Events(None, [lambda event: said.append(event["text"]) if event["kind"] == "warning" else None])
        self.guards = Guards(self.method, events, None, loop.autocast(self.method.device, rung.precision), graphs=rung.graphs)
        self.times: dict[str, list[tuple[float, float]]] = {}
        self.done, self.said = 0, said
        if plan.cuda:
            torch.cuda.reset_peak_memory_stats()

    def epoch(self, e: int) -> None:
        marks: list[tuple[str, Callable[[], float], float]] = []
        for _, fn, args, occurrence in steps(self.method, e):
            began = time.perf_counter()
            ms = self._timed(lambda fn=fn, args=args, n=occurrence: self.guards.step(Position(0, e, self.done, fn, args, n)))  # type: ignore[misc]
            self.done += 1
            marks.append((fn.__name__, ms, 1e3 * (time.perf_counter() - began)))
        if self.plan.cuda:
            torch.cuda.synchronize()
        for name, ms, host in marks if e else ():
            self.times.setdefault(name, []).append((ms(), host))

    def _timed(self, step: Callable[[], None]) -> Callable[[], float]:
        if not self.plan.cuda:
            began = time.perf_counter()
            step()
            self.method.step_ends()
            took = 1e3 * (time.perf_counter() - began)
            return lambda: took
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        self.method.step_ends()
        last.record()
        return lambda: float(first.elapsed_time(last))

    def rows(self) -> Iterator[dict[str, Any]]:
        if self.said:
            raise RuntimeError(self.said[0])  # a step that was to be captured was not
        peak = {"peak_mib": round(torch.cuda.max_memory_allocated() / 2**20)} if self.plan.cuda else {}
        for name in SHOWN:
            if name in self.times:
                ms, p20, p80 = (round(v, 4) for v in spread([t for t, _ in self.times[name]]))
                host = round(spread([h for _, h in self.times[name]])[0], 4)
                images = round(self.method.batch / ms * 1e3) if ms else 0
                yield {"step": name, "ms": ms, "p20": p20, "p80": p80, "host_ms": host, "images_s": images, **peak, "ok": True}


def made(name: str, plan: Plan) -> Method:
    """A prepared method with networks of random weights."""
    torch.manual_seed(0)
    size, device = (16, plan.device) if plan.quick else (32, plan.device)
    teacher, student = ("resnet8", "wrn10_1") if plan.quick else ("resnet34", "resnet18")
    shape, classes = (3, size, size), 10
    nets = [models.build(n, classes=classes, channels=3, input_size=size) for n in (teacher, student)]
    frozen, small = (net.to(device, memory_format=torch.channels_last) for net in nets)  # type: ignore[call-overload]
    given = Given(
        teacher=instrument(frozen, shape=shape),
        student=Student(small, shape=shape),
        shape=shape,
        classes=classes,
        mean=torch.full((3,), 0.47, device=device),
        std=torch.full((3,), 0.25, device=device),
        seed=0,
        rng=Rng(device),
        log=Log(device),
        device=device,
        embeddings=torch.randn(classes, 384, device=device),
        augmentation=Augment(True, 4),
    )
    cls = methods.method_class(name, {"name": name})
    known = {f.name for f in dataclasses.fields(cls)}
    fields = FIELDS | (SMALL if plan.quick else {})
    method = cls(**{k: v for k, v in fields.items() if k in known})
    loop.prepare(method, given)
    return method
