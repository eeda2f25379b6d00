"""Runs a job in its folder: configuration and environment before the first step, network and summary after the last.

With several ranks all of them walk the same way; rank 0 alone touches the folder.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd import models, ops, ranks
from fastkd.assemble.device import crowded
from fastkd.assemble.job import Job
from fastkd.config import SAFE_ON_RESUME
from fastkd.engine import checkpoint, evaluation, loop, saver, signals
from fastkd.engine.determinism import deterministic
from fastkd.engine.events import Events, Heartbeat, Listener, curve, final
from fastkd.engine.folder import locked, prepare, refuse
from fastkd.errors import CheckpointError, ConfigError, FastkdError, PlaceError, exit_code
from fastkd.files import write_atomic


@dataclass
class Outcome:
    """How a run ended: exit code (0, or 75 stopped with a checkpoint), its folder, and what the summary shows."""

    code: int
    out: Path | None
    summary: dict[str, Any]


def execute(job: Job, out: Path | None, *, resume: str, listeners: Sequence[Listener], time_limit: float | None = None) -> Outcome:
    """Run a job in its folder: lock, configuration and environment before the first step, network and summary after the last.

    Args:
      time_limit: seconds after which the run stops with a checkpoint, or None.
    """
    first = ranks.rank() == 0
    if out is not None and first:
        refuse_folder(job, out, resume)
    with deterministic(job.settings.deterministic):
        loop.prepare(job.method, job.given, global_bn=job.settings.global_bn)  # a method that refuses leaves no folder behind
    refuse_different_ranks(job)
    with contextlib.ExitStack() as stack:
        if out is not None and first:
            prepare(out, resume=resume != "no")
            stack.enter_context(locked(out))
        # Rank 0 looks: on a network disk the others may still see an older state of the folder.
        found = out is not None and first and _has_checkpoints(out)
        go_on = bool(ranks.max(torch.tensor(float(found))).item())
        return _execute(job, out, resume=go_on, anew=resume == "auto", listeners=listeners, time_limit=time_limit)


def refuse_folder(job: Job, out: Path, resume: str) -> None:
    """Refuse a folder that the job cannot start or go on in, touching nothing.

    Raises:
      CheckpointError: nothing to resume. ConfigError: it is not empty, or holds another run. PlaceError: it is a file.
    """
    if resume == "must" and not _has_checkpoints(out):
        raise CheckpointError(nothing_to_resume(out))
    refuse(out, resume=resume != "no")
    if _has_checkpoints(out):
        refuse_changes(out, job.config)


def nothing_to_resume(out: Path) -> str:
    damaged = ", ".join(checkpoint.set_aside(out / "checkpoints"))
    found = f"its checkpoints are damaged and were set aside ({damaged})" if damaged else "no checkpoint is there"
    return f"nothing to resume in '{out}': {found}; start it {'anew ' if damaged else ''}with --resume=auto, or with a new --out."


def _has_checkpoints(out: Path) -> bool:
    return any((out / "checkpoints").glob("step-*"))


def refuse_different_ranks(job: Job) -> None:
    """Compare what must be equal on all ranks before the first step, such as the file that each found under the teacher's path.

    Raises:
      ConfigError: something differs; it and the odd ranks are named.
    """
    if ranks.world() == 1:
        return
    networks = {"teacher": job.given.teacher, "student": job.given.student}
    parts = {"configuration": config_hash(job.config).encode(), "versions": json.dumps(versions()).encode()}
    parts |= {name: _fingerprint(net) for name, net in networks.items()}
    for name, content in parts.items():
        odd = ranks.odd_ones(hashlib.sha256(content).digest())
        if odd:
            who = ", ".join(map(str, odd))
            raise ConfigError(f"the {name} of rank {who} is not that of rank 0; give all ranks the same files and code.")


def _fingerprint(net: torch.nn.Module | None) -> bytes:
    digest = hashlib.sha256()
    for name, t in net.state_dict().items() if net is not None else ():
        digest.update(name.encode())
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def refuse_changes(out: Path, config: dict[str, Any]) -> None:
    """Compare with the configuration that the folder holds, before anything in it is touched.

    Raises:
      ConfigError: a key that decides the run differs; it is named with both values.
    """
    for key, was, now in changes(out, config):
        if key not in SAFE_ON_RESUME:
            raise ConfigError(
                f"the run in '{out}' cannot be continued with another {key}: it was {was!r}, now {now!r}; "
                "leave that option out, or choose a new --out."
            )


def changes(out: Path, config: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, was, now) of what differs from the configuration that the folder holds; nothing where that cannot be read, because the
    checkpoint's own record is compared later."""
    try:
        before = _flat(json.loads((out / "config.json").read_bytes()))
    except (OSError, ValueError, AttributeError):
        return []
    now = _flat(json.loads(json.dumps(config)))
    return [(key, before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _execute(job: Job, out: Path | None, *, resume: bool, anew: bool, listeners: Sequence[Listener], time_limit: float | None) -> Outcome:
    began = time.monotonic()
    first = ranks.rank() == 0
    events = Events(out if first else None, list(listeners) if first else [])
    events.listeners.append(Heartbeat(events))
    method, given = job.method, job.given
    notes = [*job.notes, *(given.places.said if given.places is not None else ()), *method.notes()]
    if crowd := crowded(given.device):
        notes.append(crowd)
    about = {"config": config_hash(job.config), "method": job.name, "teacher": job.teacher_sha256, "versions": versions()}
    settings = replace(job.settings, about=about)
    if out is not None and first and not resume:
        _write_json(out / "config.json", job.config)
    events.status("running")
    try:
        with deterministic(settings.deterministic), signals.watched(time_limit) as stop:
            if out is not None and first:
                _write_json(out / "environment.json", environment())
            facts = _measured(job, stop)
            where = {"device": str(given.device), "precision": settings.precision, "deterministic": settings.deterministic}
            events.write("start", method=job.name, **facts, **where, epochs=method.epochs, notes=notes)
            for key, was, now in changes(out, job.config) if resume and out is not None and first else ():
                events.write("changed", key=key, was=was, now=now)
            damaged = checkpoint.set_aside(out / "checkpoints") if out is not None and first and not resume else []
            if damaged:
                beside = f"damaged checkpoints of an earlier start lie beside ({', '.join(damaged)})"
                events.write("warning", text=f"the run starts anew; {beside}")
            code = loop.run(method, settings, events, out, stop, resume=resume, anew=anew)
        summary = _summary(job, facts, notes, events, out, time.monotonic() - began)
        if code == loop.DONE and out is not None and first:
            score = evaluation.headline(settings.data)
            reached = summary["student"].get(score)
            scored = {"accuracy" if score == "top1" else score: f"{reached:.6f}"} if reached is not None else {}
            last = {**settings.student_metadata, **scored}
            models.save_weights(out / job.out_name, saver.student_tensors(method.student), last)
    except BaseException as e:
        # Any rank may know why; what the others then meet is a consequence, of which rank 0 speaks where nobody has.
        if out is not None and final(out) is None and (first or exit_code(e) != FastkdError.exit_code):
            Events(out).status("fatal", code=exit_code(e), reason=str(e))
        raise
    events.status("done" if code == loop.DONE else "preempted", code=code)
    events.write("done" if code == loop.DONE else "stopped", code=code, summary=summary)
    return Outcome(code, out, summary)


def _measured(job: Job, stop: signals.Stop) -> dict[str, Any]:
    """The facts of a job with its teacher's score, None where there is none or a rank was asked to stop meanwhile."""
    test, given = job.settings.data, job.given
    score, reached = evaluation.headline(test), None
    if test is not None and given.teacher is not None:  # all ranks share the work
        with contextlib.suppress(evaluation.Interrupted):
            asked = lambda: loop.any_rank(bool(stop))  # noqa: E731
            reached = evaluation.measure(given.teacher, test, given.mean, given.std, asked)[score]
    return {**job.facts, "teacher": {**job.facts.get("teacher", {}), score: reached}}


def _summary(job: Job, facts: dict[str, Any], notes: list[str], events: Events, out: Path | None, wall: float) -> dict[str, Any]:
    epochs = _epochs(events, out)
    score = evaluation.headline(job.settings.data)
    scores = [e[score] for e in epochs if e.get("trained") and score in e]
    seconds: dict[str, float] = {}
    for e in events.epochs:  # as `wall`: of this start
        for phase, s in e.get("seconds", {}).items():
            seconds[phase] = seconds.get(phase, 0.0) + s
    student = {
        **facts["student"],
        score: scores[-1] if scores else None,
        "best": max(scores, default=None),
        "last10": sum(scores[-10:]) / len(scores[-10:]) if scores else None,
        "mean": sum(scores) / len(scores) if scores else None,
    }
    extra: dict[str, Any] = {k: epochs[-1][k] for k in ("agreement", "confidence", "balance") if epochs and k in epochs[-1]}
    return {
        "method": job.name,
        **facts,
        "student": student,
        "epochs": len(epochs),
        "steps": max(events.step, epochs[-1]["step"] if epochs else 0),
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "wall": round(wall, 2),
        "device": str(job.given.device),
        "precision": job.settings.precision,
        "seed": job.settings.seed,
        "notes": notes,
        **job.method.report(),
        **extra,
    }


def _epochs(events: Events, out: Path | None) -> list[dict[str, Any]]:
    """The epochs in order: what the log has of starts that this one goes on from, and those of this process, whose log may have failed."""
    logged: list[dict[str, Any]] = []
    if out is not None and ranks.rank() == 0:
        with contextlib.suppress(OSError):
            logged = curve(out / "events.jsonl")
    return [e for _, e in sorted({e["epoch"]: e for e in [*logged, *events.epochs]}.items())]


def versions() -> dict[str, str]:
    """What must be equal for the same bits."""
    return {"fastkd": fastkd.__version__, "torch": torch.__version__}


def config_hash(config: dict[str, Any]) -> str:
    """Identity of a configuration, leaving out what may change when a run is continued."""
    body = copy.deepcopy(config)
    for path in SAFE_ON_RESUME:
        *parents, key = path.split(".")
        inner = body
        for parent in parents:
            inner = inner.get(parent, {})
        inner.pop(key, None)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, machine and op backends, for the run folder."""
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "ranks": ranks.world(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": ops.table(),
    }


def _write_json(path: Path, value: Any) -> None:
    try:
        write_atomic(path, (json.dumps(value, indent=1, default=str) + "\n").encode())
    except OSError as e:
        raise PlaceError(f"'{path}' cannot be written: {e.strerror}; choose an --out with room and write permission.") from None
