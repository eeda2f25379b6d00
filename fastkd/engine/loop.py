"""The one loop: walks the steps of any method."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastkd import ranks
from fastkd.engine import checkpoint, evaluation, heartbeat, state
from fastkd.engine.clock import Clock
from fastkd.engine.events import Events
from fastkd.engine.folder import why
from fastkd.engine.guards import GoBack, Guards, Position
from fastkd.engine.signals import Stop
from fastkd.errors import CheckpointError, ConfigError, NumericalError
from fastkd.files import tensor_bytes, write_atomic
from fastkd.memory import placed
from fastkd.method import Given, Method, steps
from fastkd.nn import globalise

DONE, PREEMPTED = 0, 75
HEALTH_IMAGES, SCORE_IMAGES = 128, 512
"""Newest synthetic images that are looked at after an epoch: for their health alone, and where that stands for an accuracy."""
SKIPS_ALLOWED = 0.5
"""Share of non-finite steps in an interval above which a run gives up."""


@dataclass
class Settings:
    """What the loop needs to know beside the method.

    Attributes:
      seed: root seed. precision: fp32 or bf16. poll: steps between looks at flags.
      every_minutes, every_steps, keep: see `config.CheckpointConfig`. global_bn: BatchNorm over the global batch.
      data: evaluation set on the device, or None. about: goes into every manifest and must be equal on resume.
      student_metadata: goes into student.safetensors. max_steps: stop with a checkpoint after so many steps (tests, plans).
    """

    seed: int = 0
    precision: str = "fp32"
    poll: int = 10
    every_minutes: float = 10.0
    every_steps: int | None = None
    keep: int = 2
    global_bn: bool = True
    data: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    student_metadata: dict[str, str] = field(default_factory=dict)
    max_steps: int | None = None


def prepare(method: Method, given: Given, *, global_bn: bool = True) -> None:
    """Bind, check, build and seal a method."""
    method.bind(given)
    method.check()
    method.rng.at(given.seed, -1, "build", 0)
    with placed(given.places):
        method.build()
    if global_bn:
        for name, value in vars(method).items():
            if name not in ("teacher", "real"):
                for net in _networks(value):
                    globalise(net)
    method.seal()
    for _ in state.walk(method):  # refuses now, not at the first save, what a checkpoint cannot hold
        pass


def _networks(value: Any) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [net for v in inner for net in _networks(v)]


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
    saver, guards = _Saver(method, settings, events, out), Guards(method, events, out, autocast(method.device, settings.precision))
    at, done = _resume(method, settings, events, out, anew) if resume and out else ((0, 0), 0)
    with heartbeat.beating(out) as beat:
        while True:
            try:
                return _walk(method, settings, events, saver, guards, beat, stop, at, done)
            except GoBack as back:
                at, done = _go_back(method, settings, events, saver, guards, back)


def _walk(
    method: Method,
    settings: Settings,
    events: Events,
    saver: _Saver,
    guards: Guards,
    beat: heartbeat.Beat,
    stop: Stop | None,
    begin: tuple[int, int],
    done: int,
) -> int:
    """From a position to the end, or to a stop; the exit code."""
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
        with clock("evaluation"):
            scores, health = evaluate(method, settings)
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
    method: Method, settings: Settings, events: Events, saver: _Saver, guards: Guards, back: GoBack
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
    at, done = _resume(method, settings, events, out, anew=False)
    guards.went_back(back.rate)
    if back.rate != 1.0:
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


def evaluate(method: Method, settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the student, and the health of the synthetic images; without evaluation data those are the scores."""
    with autocast(method.device, settings.precision)():
        scores = evaluation.measure(method.student, settings.data, method.mean, method.std) if settings.data is not None else {}
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


def _resume(method: Method, settings: Settings, events: Events, out: Path, anew: bool) -> tuple[tuple[int, int], int]:
    saved = _newest(events, out / "checkpoints", anew)
    if saved is None:
        return (0, 0), 0
    different = {k: (saved.manifest.get(k), v) for k, v in settings.about.items() if saved.manifest.get(k) != v and k != "world"}
    if different:
        key, (was, now) = next(iter(different.items()))
        raise ConfigError(
            f"the run in '{out}' cannot be continued with another {key}: it was {was}, now {now}; use the old one or a new --out."
        )
    try:
        state.restore(method, saved.tensors, saved.numbers, saved.images)
    except ValueError as e:
        raise CheckpointError(f"checkpoint {saved.path.name} does not fit this run: {e}.") from None
    if saved.manifest.get("world", 1) != ranks.world():
        events.write(
            "warning",
            text=f"saved by {saved.manifest.get('world', 1)} ranks, continued by {ranks.world()}: equal to rounding, not to the bit",
        )
    events.write("resumed", epoch=saved.position[0], step=saved.manifest["step"], checkpoint=saved.path.name)
    return saved.position, int(saved.manifest["step"])


def _newest(events: Events, folder: Path, anew: bool) -> checkpoint.Saved | None:
    """The newest checkpoint that verifies: rank 0 chooses and sets damaged ones aside, the others read the one it chose."""
    said: list[str] = []
    try:
        saved = checkpoint.newest(folder, said) if ranks.rank() == 0 else None
    except CheckpointError:
        if not anew:
            raise
        saved = None
        said.append("no checkpoint is left that can be used; the run starts anew")
    for line in said:
        events.write("warning", text=line)
    if ranks.world() == 1:
        return saved
    chosen = int(ranks.max(torch.tensor(saved.manifest["step"] if saved else -1)).item())
    if ranks.rank() == 0 or chosen < 0:
        return saved
    try:
        return checkpoint.read(folder / checkpoint.name_of(chosen))
    except ValueError as e:
        who = f"rank {ranks.rank()} cannot read the checkpoint of step {chosen} that rank 0 chose"
        raise CheckpointError(f"{who} ({e}); all ranks must see the same '{folder}'.") from None


class _Saver:
    """Decides when a checkpoint is due and writes it; a failed save costs nothing but itself."""

    def __init__(self, method: Method, settings: Settings, events: Events, out: Path | None):
        self.method, self.settings, self.events, self.out = method, settings, events, out
        self.last, self.failed, self.highest = time.monotonic(), 0, _best_so_far(out)

    def due(self, done: int) -> bool:
        """Collective: all ranks must agree, so with several ranks time alone is asked of rank 0 at poll steps."""
        if self.out is None:
            return False
        if self.settings.every_steps:
            return done % self.settings.every_steps == 0
        if done % self.settings.poll:
            return False
        late = torch.tensor(float(time.monotonic() - self.last > 60 * self.settings.every_minutes))
        return bool(ranks.max(late).item())

    def save(self, position: tuple[int, int], done: int) -> None:
        self.last = time.monotonic()
        if self.out is None:
            return
        tensors, numbers = state.collect(self.method)
        images, together = state.images(self.method)
        if ranks.rank() and not together:
            return
        about = {**self.settings.about, "world": ranks.world()}
        for _ in range(2):
            try:
                checkpoint.write(
                    self.out / "checkpoints",
                    done,
                    position,
                    tensors,
                    numbers,
                    self._student(),
                    self.settings.student_metadata,
                    about,
                    self.settings.keep,
                    images,
                    together,
                )
                self.failed = 0
                self.events.write("checkpoint", step=done, position=list(position))
                return
            except (OSError, RuntimeError) as e:  # safetensors wraps errno in its own error
                reason = why(e) if isinstance(e, OSError) else str(e)
                checkpoint.prune(self.out / "checkpoints", 1)
        self.failed += 1
        self.events.write("warning", text=f"checkpoint at step {done} could not be written: {reason}; what was saved before is intact")
        if self.failed == 3:
            raise CheckpointError(
                f"three checkpoints in a row could not be written to '{self.out}' ({reason}); "
                "the last good one is intact: make room and use --resume."
            )

    def stop(self, position: tuple[int, int], done: int) -> int:
        """Save, and the code of a run that was stopped.

        Raises:
          CheckpointError: nothing could be written and nothing older is there.
        """
        self.save(position, done)
        if self.failed and self.out is not None and not checkpoint.listed(self.out / "checkpoints"):
            raise CheckpointError(f"stopped at step {done}, and no checkpoint could be written to '{self.out}'; nothing can be continued.")
        return PREEMPTED

    def _student(self) -> dict[str, Tensor]:
        return student_tensors(self.method.student)

    def best(self, scores: dict[str, float]) -> None:
        """Keep the student of the best evaluation apart; its metadata says that test data selected it."""
        name = next((name for name in evaluation.SCORES if name in scores), None)
        if self.out is None or name is None or not scores[name] > self.highest or ranks.rank():
            return
        self.highest = scores[name]
        metadata = {**self.settings.student_metadata, name: f"{self.highest:.6f}", "note": "selected on test data"}
        try:
            folder = self.out / "checkpoints" / "best"
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "student.safetensors", tensor_bytes(self._student(), metadata))
        except OSError as e:
            self.events.write("warning", text=f"the best student could not be written: {why(e)}")


def _best_so_far(out: Path | None) -> float:
    """The score in the metadata of a best student that is there already, else -1."""
    path = out / "checkpoints" / "best" / "student.safetensors" if out is not None else None
    try:
        with safe_open(path, "pt") as f:
            return max(float(value) for name, value in f.metadata().items() if name in evaluation.SCORES)
    except (OSError, TypeError, AttributeError, ValueError, SafetensorError):
        return -1.0


def student_tensors(student: nn.Module) -> dict[str, Tensor]:
    """The student's state under its own network's keys, on the host."""
    net = getattr(student, "net", student)
    return {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
