"""The one loop: walks the steps of any method."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd import files, ops, ranks
from fastkd.engine import allocator, attributes, checkpoint, evaluation, heartbeat, state
from fastkd.engine.clock import Clock
from fastkd.engine.events import Events
from fastkd.engine.guards import GoBack, Guards, Position
from fastkd.engine.resume import restored
from fastkd.engine.saver import Saver
from fastkd.engine.settings import Settings
from fastkd.engine.signals import Stop
from fastkd.errors import NumericalError
from fastkd.memory import placed
from fastkd.method import Given, Method, steps
from fastkd.nn import globalise

DONE = 0
HEALTH_IMAGES, SCORE_IMAGES = 128, 512
"""Newest synthetic images that are looked at after an epoch: for their health alone, and where that stands for an accuracy."""
SKIPS_ALLOWED = 0.5
"""Share of non-finite steps in an interval above which a run gives up."""


def prepare(method: Method, given: Given, *, global_bn: bool = True) -> None:
    """Bind, check, build and seal a method. Its GPU becomes the current one: streams, events and graphs are made there."""
    if given.device.type == "cuda" and given.device.index is not None:  # "cuda" is the current one already
        torch.cuda.set_device(given.device)
    method.bind(given)
    method.check()
    method.rng.at(given.seed, -1, "build", 0)
    with placed(given.places):
        method.build()
    if global_bn:
        for net in attributes.hanging(method, nn.Module):
            globalise(net)
    method.seal()
    for _ in state.walk(method):  # refuses now, not at the first save, what a checkpoint cannot hold
        pass
    attributes.check_caches(method)


def run(
    method: Method,
    settings: Settings,
    events: Events,
    out: Path | None,
    stop: Stop | None = None,
    *,
    resume: bool = False,
    anew: bool = False,
) -> int:
    """Walk all epochs of a prepared method.

    Args:
      out: run folder, or None to save nothing.
      stop: flag of the stop signals. resume: go on from the newest valid checkpoint in `out` (from the start if there is none).
      anew: from the start also where all checkpoints are damaged.
    Returns:
      0, or 75 when it stopped early with a checkpoint.
    Raises:
      NumericalError: most steps of an interval were not finite.
      CheckpointError: nothing there can be resumed, or three saves failed in a row.
    """
    guards = Guards(method, events, out, autocast(method.device, settings.precision), graphs=settings.graphs)
    saver = Saver(method, settings, events, out, guards.collapse)
    at, done = restored(method, settings, events, out, anew, guards.collapse) if resume and out else ((0, 0), 0)
    around = ops.captured(guards.graphs.on)
    with allocator.kept(method.device), around, heartbeat.beating(out) as beat, files.told(beat.moves):
        while True:
            try:
                return _walk(method, settings, events, saver, guards, beat, stop, at, done)
            except GoBack as back:
                at, done = _go_back(method, settings, events, saver, guards, back)


def _walk(
    method: Method,
    settings: Settings,
    events: Events,
    saver: Saver,
    guards: Guards,
    beat: heartbeat.Beat,
    stop: Stop | None,
    begin: tuple[int, int],
    done: int,
) -> int:
    """From a position to the end, or to a stop; the exit code."""
    # While the teacher was measured. A time limit leaves some steps: a job that is started over and over gets on.
    if any_rank(stop is not None and stop.signal is not None):
        return saver.stop(begin, done)
    total = done + sum(1 for e in range(begin[0], method.epochs) for i, *_ in steps(method, e) if (e, i) >= begin)
    clock, began, begun_at, images = Clock(method.device), time.monotonic(), done, 0

    for epoch in range(begin[0], method.epochs):
        epoch_began, walked = time.monotonic(), 0
        for i, fn, args, occurrence in steps(method, epoch):
            walked, stopping, looked = i + 1, False, False
            if (epoch, i) < begin:
                continue
            beat.now(fn.phase, fn.__name__, epoch, done)  # type: ignore[attr-defined]
            with clock(fn.phase):  # type: ignore[attr-defined]
                guards.step(Position(settings.seed, epoch, done, fn, args, occurrence))
            method.step_ends()
            done, images = done + 1, images + (0 if fn.eager else method.images_of(fn.phase))  # type: ignore[attr-defined]
            if done % settings.poll == 0:
                stopping, looked = guards.look(bool(stop)), True
                elapsed = max(1e-9, time.monotonic() - began)
                events.tell(
                    "poll",
                    epoch=epoch,
                    epochs=method.epochs,
                    step=done,
                    steps=total,
                    phase=fn.phase,  # type: ignore[attr-defined]
                    terms=method.log.read,
                    steps_per_second=(done - begun_at) / elapsed,
                    images_per_second=images / elapsed,
                )
            stopping |= settings.max_steps is not None and done - begun_at >= settings.max_steps
            if stopping or saver.due(done):
                if not looked:  # a step that is not finite is not saved
                    guards.look(False)
                beat.now("checkpoint", "save", epoch, done)
                if stopping:
                    return saver.stop((epoch, walked), done)
                saver.save((epoch, walked), done)
        beat.now("evaluation", "evaluate", epoch, done)
        if guards.look(bool(stop)):  # before the evaluation, which may take longer than a stop signal allows
            return saver.stop((epoch, walked), done)
        method.rng.at(settings.seed, epoch, "evaluate", 0)
        try:
            with clock("evaluation"):
                scores, health = evaluate(method, settings, lambda: any_rank(bool(stop)))
        except evaluation.Interrupted:
            return saver.stop((epoch, walked), done)
        terms = method.log.read()
        _refuse_non_finite(terms)
        method.log.clear()
        events.write(
            "epoch",
            epoch=epoch,
            step=done,
            steps=total,
            trained=method.trains_student(epoch),
            terms=terms,
            **scores,
            health=health,
            seconds=clock.flush(),
            wall=round(time.monotonic() - epoch_began, 4),
        )
        guards.collapse.judge(health, trained=method.trains_student(epoch))
        saver.best(scores)
        if guards.look(bool(stop)) and epoch + 1 < method.epochs:
            return saver.stop((epoch + 1, 0), done)
    beat.now("checkpoint", "save", method.epochs, done)
    saver.save((method.epochs, 0), done)
    return DONE


def _go_back(
    method: Method, settings: Settings, events: Events, saver: Saver, guards: Guards, back: GoBack
) -> tuple[tuple[int, int], int]:
    """Restore the newest checkpoint for a guard; where the run goes on from.

    Raises:
      what the guard wants raised where there is no checkpoint.
    """
    method.step_ends()
    method.log.clear()
    out = saver.out
    if out is None or not any_rank(bool(checkpoint.listed(out / "checkpoints"))):
        raise back.otherwise
    slower = f", with learning rates times {back.rate:g}" if back.rate != 1.0 else ""
    events.write("warning", guard="back", text=f"{back}; back to the last checkpoint{slower}")
    at, done = restored(method, settings, events, out, False, guards.collapse)
    guards.went_back(back.rate)
    if back.rate != 1.0:
        checkpoint.forget_after(out / "checkpoints", done)
        saver.save(at, done)  # a run that is killed now must not forget it
    return at, done


def any_rank(flag: bool) -> bool:
    """Whether it holds on a rank; a collective."""
    return bool(ranks.max(torch.tensor(float(flag))).item())


def autocast(device: torch.device, precision: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if precision == "fp32":
        return contextlib.nullcontext
    # A weight cache would outlive the in-place updates of a step.
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def evaluate(
    method: Method, settings: Settings, asked: evaluation.Asked | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the student, and the health of the synthetic images; without evaluation data those are the scores.

    Raises:
      Interrupted: `asked`, a collective, said that a rank is to stop.
    """
    with autocast(method.device, settings.precision)():
        data = settings.data
        scores = evaluation.measure(method.student, data, method.mean, method.std, asked) if data is not None else {}
        found = evaluation.health(method, HEALTH_IMAGES if scores else SCORE_IMAGES)
        read = torch.stack(list(found.values())).tolist() if found else []
    health = dict(zip(found, read, strict=True))
    return scores or {name: health[name] for name in ("agreement", "confidence", "balance") if health}, health


def _refuse_non_finite(terms: dict[str, float]) -> None:
    """`skipped` is the share of an interval's steps that were not applied because something in them was not finite."""
    for name, share in terms.items():
        if name.endswith(".skipped") and share > SKIPS_ALLOWED:
            others = [n for n, v in terms.items() if v != v or abs(v) == float("inf")]
            raise NumericalError(
                f"{share:.0%} of the '{name.removesuffix('.skipped')}' steps were not finite"
                f"{' (term ' + others[0] + ')' if others else ''}; the last checkpoint is finite: lower the learning rate and use --resume."
            )
