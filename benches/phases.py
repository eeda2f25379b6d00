"""What a method's steps cost beside the passes of their networks: `python -m benches.phases --out DIR [--only NAME] [--batch 128]`.

Each step of an epoch runs as the engine runs it. Then the passes that it made are run alone: the same networks, forward on the same
inputs and backward to what required a gradient, and its optimisers' steps. The two take turns; times are CPU seconds (user + system) of
the process. CIFAR shapes: teacher resnet20, student wrn10_1, 3 × 32 × 32, 10 classes, all with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimisers
from torch.utils._pytree import tree_leaves, tree_map

from fastkd import methods, models
from fastkd.data import ImageSet
from fastkd.engine import allocator, loop
from fastkd.log import Log
from fastkd.method import Augment, Given, Method, steps
from fastkd.nn import Student, Teacher, instrument
from fastkd.rng import Rng

from . import _budget
from .check import one_line
from .facts import cpuinfo, revision
from .tables import aligned

TARGET = 1.10
SHAPE, CLASSES = (3, 32, 32), 10
FIELDS: dict[str, Any] = {
    **{"warmup": 1, "kd_steps": 2, "g_steps": 2, "g_loops": 1, "gwp_loops": 1, "loops": 1, "rounds": 1},
    **{
        "iterations": 2,
        "s_steps": 2,
        "vae_steps": 1,
        "push_period": 1,
        "milestones": (1,),
        "adi_period": 1,
        "bank_rows": 512,
        "bank_draw": 256,
    },
}
"""Whichever of these a method has: few steps an epoch. What decides a step's cost stays as the method has it, but for the batch."""


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    wanted = options.only or methods.names()
    same = {"batch": options.batch, "threads": options.threads}
    older = _budget.older(options.out / "phases.json", **same).get("rows", [])
    if options.freeing:
        return freeing(older, wanted, options)
    rows = [r for r in older if r["method"] not in wanted]
    for name in wanted:
        try:
            rows += [{**row, "commit": revision()} for row in measure(name, options.batch, options.epochs)]
        except Exception as error:  # what a method needs and does not get here is its row's reason
            rows.append({"method": name, "reason": one_line(error)})
        print(f"{name}: {' '.join(said(r) for r in rows if r['method'] == name)}", flush=True)
        _budget.write(options.out / "phases.json", record(rows, options))
    print("\n".join(["", *table(rows)]))
    return 0


def freeing(rows: list[dict[str, Any]], wanted: list[str], options: argparse.Namespace) -> int:
    """Write into the rows that are there what their steps cost without the engine's hold on freed memory. A process of its own: once
    held, memory stays in one piece."""
    for name in wanted:
        own = [r for r in rows if r["method"] == name and "ms" in r]
        found = {r["phase"]: r["ms"] for r in measure(name, options.batch, options.epochs, keep=False)} if own else {}
        for row in own:
            row["freeing_ms"] = found[row["phase"]]
            print(f"{name}: {row['phase']} {row['ms']:.1f} ms, {row['freeing_ms']:.1f} ms freeing", flush=True)
        _budget.write(options.out / "phases.json", record(rows, options))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benches.phases", description="Cost of the methods' steps over that of their networks.")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for phases.json; a run adds to it")
    made.add_argument("--only", choices=methods.names(), action="append", default=[], help="this method only; may be given again")
    made.add_argument("--batch", type=int, default=128, metavar="N", help="images of every step")
    made.add_argument("--epochs", type=int, default=3, metavar="N", help="measured epochs")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads")
    made.add_argument("--freeing", action="store_true", help="add to the rows of DIR what steps cost without the engine's hold on memory")
    made.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the record")
    return made


def record(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "what": "CPU milliseconds of a step, by phase, and of the network passes and optimiser steps in it alone",
        "cpu": cpuinfo("model name"),
        "torch": torch.__version__,
        "threads": options.threads,
        "batch": options.batch,
        "epochs": options.epochs,
        "load": options.load,
        "rows": rows,
    }


# What a step calls ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Pass:
    """One call of a network: its inputs, whether they and which parameters required a gradient, and whether the network trained.

    Attributes:
      others: parameters that stood in the place of its own (`functional_call`), by name. twice: its gradient was differentiated again.
    """

    net: nn.Module
    args: tuple[Any, ...]
    grad: bool
    wanted: list[bool]
    params: list[Tensor]
    training: bool
    others: dict[str, Tensor]
    twice: bool = False

    def run(self, ask: bool) -> None:
        """Forward, and backward from the logits (or images); with `ask`, also what the step asked the teacher for."""
        flags = iter(self.wanted)
        args = tree_map(lambda v: v.detach().requires_grad_(next(flags)) if isinstance(v, Tensor) else v, self.args)
        if isinstance(self.net, Teacher) and not ask:
            args = args[:1]
        params = self.params
        with torch.set_grad_enabled(self.grad):
            if self.others:
                others = {n: p.detach().requires_grad_(self.grad) for n, p in self.others.items()}
                params = list(others.values())
                out = functional_call(self.net, others, args)
            else:
                out = self.net(*args)
        if not self.grad:
            return
        seeds = [out.logits, *([out.bn] if out.bn is not None else [])] if hasattr(out, "logits") else tree_leaves(out)[:1]
        seeds = [y for y in seeds if y.requires_grad]
        inputs = [v for v in tree_leaves(args) if isinstance(v, Tensor) and v.requires_grad]
        if seeds and (inputs or params):
            wanted = [*inputs, *params]
            given = [torch.full_like(y, 1e-3) for y in seeds]
            grads = torch.autograd.grad(seeds, wanted, given, allow_unused=True, create_graph=self.twice)
            again = [g for g in grads if g is not None and g.requires_grad]
            if again:
                torch.autograd.grad(again, wanted, [torch.full_like(g, 1e-3) for g in again], allow_unused=True)


class Tape:
    """Notes what is called while it is open: networks that no other network calls, and optimisers."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.optimisers: list[torch.optim.Optimizer] = []
        self._depth = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[Tape]:
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
            optimisers.register_optimizer_step_pre_hook(lambda opt, *_: self.optimisers.append(opt)),
        ]
        plain = torch.autograd.grad

        def grad(*args: Any, **kw: Any) -> Any:
            if kw.get("create_graph"):
                for own in self.passes:
                    own.twice = own.grad
            return plain(*args, **kw)

        torch.autograd.grad = grad
        try:
            yield self
        finally:
            torch.autograd.grad = plain
            for handle in handles:
                handle.remove()

    def _enter(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        grad = torch.is_grad_enabled()
        wanted = [grad and v.requires_grad for v in tree_leaves(args) if isinstance(v, Tensor)]
        params: list[Tensor] = [p for p in net.parameters() if grad and p.requires_grad]
        others = {n: p.detach() for n, p in net.named_parameters() if not isinstance(p, nn.Parameter)}
        kept = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, args)
        self.passes.append(Pass(net, kept, grad and (any(wanted) or bool(params)), wanted, params, net.training, others))

    def _leave(self, *_: Any) -> None:
        self._depth -= 1

    def alone(self, ask: bool) -> float:
        """CPU seconds of the passes and of the optimisers' steps, one after another."""
        spent = 0.0
        for own in self.passes:
            modes = [(m, m.training) for m in own.net.modules()]
            flags = [(p, p.requires_grad) for p in own.net.parameters()]
            chosen = {id(p) for p in own.params}
            own.net.train(own.training)
            for p, _ in flags:
                p.requires_grad_(id(p) in chosen)
            spent += timed(lambda own=own: own.run(ask))  # type: ignore[misc]
            for m, mode in modes:
                m.training = mode
            for p, flag in flags:
                p.requires_grad_(flag)
        for opt in self.optimisers:
            params = [p for group in opt.param_groups for p in group["params"]]
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.zeros_like(p)
            spent += timed(opt.step)
            for p, value in zip(params, before):
                p.grad = None
                p.data.copy_(value)
        return spent


def timed(fn: Callable[[], Any]) -> float:
    begin = time.process_time()
    fn()
    return time.process_time() - begin


# A method's steps -----------------------------------------------------------------------------------------------------------


def prepared(name: str, batch: int, fields: dict[str, Any] | None = None) -> Method:
    """A method with few steps an epoch, on random networks whose teacher has the statistics of some random images."""
    cls = methods.method_class(name)
    own = {f.name: f.default for f in dataclasses.fields(cls)}
    over = {**FIELDS, **{k: batch for k in own if k == "batch" or k.endswith("_batch")}, "n_images": 8 * batch, **(fields or {})}
    method: Method = cls(**{k: v for k, v in over.items() if k in own})
    found = given(method, batch)
    found.real = method.choose_real(found.real, CLASSES)
    loop.prepare(method, found)
    return method


def given(method: Method, batch: int) -> Given:
    torch.manual_seed(7)
    teacher = models.build("resnet20", classes=CLASSES, channels=SHAPE[0], input_size=SHAPE[1]).train()
    with torch.no_grad():
        for _ in range(5):
            teacher(torch.randn(32, *SHAPE))
    student = models.build("wrn10_1", classes=CLASSES, channels=SHAPE[0], input_size=SHAPE[1])
    pixels = torch.randint(256, (max(2 * batch, 10 * CLASSES), *SHAPE[1:], SHAPE[0]), dtype=torch.uint8)  # `cde` takes 10 a class
    fused = instrument(teacher, shape=SHAPE)
    return Given(
        teacher=fused.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        student=Student(student.to(memory_format=torch.channels_last), shape=SHAPE),  # type: ignore[call-overload]
        shape=SHAPE,
        classes=CLASSES,
        mean=torch.full((SHAPE[0],), 0.5),
        std=torch.full((SHAPE[0],), 0.25),
        seed=0,
        rng=Rng("cpu"),
        log=Log("cpu"),
        device=torch.device("cpu"),
        embeddings=torch.randn(CLASSES, 384),
        augmentation=Augment(True, 4),
        real=ImageSet("random", "train", pixels, torch.arange(len(pixels)) % CLASSES),
    )


def measure(name: str, batch: int, epochs: int, fields: dict[str, Any] | None = None, *, keep: bool = True) -> list[dict[str, Any]]:
    """Rows of one method: a phase each. Epoch 0 warms up, epoch 1 is noted, the `epochs` after it are measured.

    `ms` is the mean of the steps that call networks; `others` are steps that call none, such as a learning rate's or a new latent's,
    which stand beside many of those in a real epoch. `keep`: hold on to freed memory, as the engine does.
    """
    method = prepared(name, batch, {"epochs": 2 + epochs, **(fields or {})})
    with allocator.kept(method.device) if keep else contextlib.nullcontext():
        return _rows(name, *_beside_passes(method, epochs))


Key = tuple[str, int]
"""Name of a step and its occurrence in an epoch."""


def _beside_passes(
    method: Method, epochs: int
) -> tuple[dict[Key, list[tuple[float, float, float]]], dict[Key, Tape], dict[str, str]]:
    """CPU seconds of each step and, taking turns with it, of its passes with and without statistics; what it called; phases of steps."""
    tapes: dict[Key, Tape] = {}
    for e in range(2):
        for key, _, fn in walked(method, e):
            with Tape().open() as tapes[key]:
                fn()
    taken: dict[Key, list[tuple[float, float, float]]] = {}
    phases: dict[str, str] = {}
    for e in range(2, 2 + epochs):
        for key, phase, fn in walked(method, e):
            tape, phases[key[0]] = tapes.get(key, Tape()), phase
            taken.setdefault(key, []).append((timed(fn), tape.alone(True), tape.alone(False)))
    return taken, tapes, phases


def _rows(
    name: str,
    taken: dict[Key, list[tuple[float, float, float]]],
    tapes: dict[Key, Tape],
    phases: dict[str, str],
) -> list[dict[str, Any]]:
    parts = [(step, *(statistics.median(v) for v in zip(*times))) for (step, _), times in taken.items()]
    with_passes = {name for (name, _), tape in tapes.items() if tape.passes}
    rows = []
    for phase in dict.fromkeys(phases.values()):
        own = [p for p in parts if phases[p[0]] == phase and p[0] in with_passes]
        others = [p for p in parts if phases[p[0]] == phase and p[0] not in with_passes]
        if own:
            whole, asked, bare = (1e3 * sum(p[k] for p in own) / len(own) for k in (1, 2, 3))
            rows.append(
                {
                    **{"method": name, "phase": phase, "steps": list(dict.fromkeys(p[0] for p in own))},
                    **{"ms": round(whole, 2), "passes_ms": round(bare, 2), "passes_with_statistics_ms": round(asked, 2)},
                    **{"ratio": round(whole / bare, 3), "ratio_with_statistics": round(whole / asked, 3)},
                    "others": {n: round(1e3 * statistics.fmean(p[1] for p in others if p[0] == n), 2) for n in {p[0] for p in others}},
                }
            )
    return rows


def walked(method: Method, e: int) -> Iterator[tuple[tuple[str, int], str, Callable[[], None]]]:
    """Every step of epoch `e`: (name, occurrence), phase, and what runs it as the engine does."""
    for _, fn, args, occurrence in steps(method, e):

        def once(fn: Callable[..., None] = fn, args: Any = args, occurrence: int = occurrence) -> None:
            method.rng.at(method.seed, e, fn.__name__, occurrence)
            method.log.prefix = fn.__name__
            fn(*args)
            method.step_ends()

        yield (fn.__name__, occurrence), fn.phase, once  # type: ignore[attr-defined]


def said(row: dict[str, Any]) -> str:
    return row["reason"] if "reason" in row else f"{row['phase']} {row['ratio']:.2f} ({row['ratio_with_statistics']:.2f})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["method", "phase", "steps with passes", "ms", "passes ms", "ratio", "with statistics", "freeing ms"]
    body = [
        [
            *(r["method"], r["phase"], " ".join(r["steps"]), f"{r['ms']:.1f}", f"{r['passes_ms']:.1f}"),
            *(f"{r['ratio']:.2f}", f"{r['ratio_with_statistics']:.2f}", f"{r['freeing_ms']:.1f}" if "freeing_ms" in r else ""),
        ]
        for r in rows
        if "ms" in r
    ]
    return aligned([head, *body]) + [f"{r['method']}: {r['reason']}" for r in rows if "reason" in r]


if __name__ == "__main__":
    sys.exit(main())
