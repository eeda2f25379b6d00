"""Configuration → teacher, student, data, method → engine: behind `fastkd run`, `eval`, `models`, `teach` and `fastkd.distil`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd import data
from fastkd.assemble.device import resolve_device, resolve_precision
from fastkd.assemble.execute import Outcome, execute, refuse_folder
from fastkd.assemble.job import Job, make_job
from fastkd.assemble.networks import load_network, metadata, network_facts, placed
from fastkd.assemble.target import Target, target
from fastkd.config import RunConfig, TeacherConfig
from fastkd.engine import dry, evaluation, folder
from fastkd.engine.events import Listener
from fastkd.errors import ConfigError, InputError
from fastkd.nn import instrument

__all__ = [
    "Job",
    "Outcome",
    "Target",
    "describe_model",
    "distil",
    "dry_run",
    "evaluate",
    "execute",
    "load_network",
    "make_job",
    "metadata",
    "network_facts",
    "placed",
    "resolve_device",
    "resolve_precision",
    "target",
]


def distil(
    config: RunConfig, out: Path | None, *, resume: str = "no", listeners: Sequence[Listener] = (), time_limit: float | None = None
) -> Outcome:
    """Distil a student. `resume`: no, must (refuse where nothing can be resumed) or auto (start where nothing is there).

    Args:
      time_limit: seconds after which the run stops with a checkpoint, or None.
    Raises:
      FastkdError: one sentence; the exit code is its class's.
    """
    return execute(make_job(config), out, resume=resume, listeners=listeners, time_limit=time_limit)


def dry_run(
    config: RunConfig, world: int = 1, out: Path | None = None, *, resume: str = "no", where: Target | None = None
) -> dict[str, Any]:
    """Every kind of step on fake tensors of the real sizes, as one of `world` ranks; see `engine.dry.walk`. Nothing is written.

    Args:
      out: the folder that a run would have, which is looked at; None: of no run. resume: as `distil`.
      where: the device that it would be on, which need not be here; None: as `config.device` says.
    Raises:
      FastkdError: what `distil` would refuse before its first step.
    """
    where = where or target(config.device, world)
    job = make_job(config, where, fake=True)
    if out is not None:
        refuse_folder(job, out, resume)
        folder.refuse_unwritable(out)
        folder.refuse_owned(out)
    precision = job.settings.precision
    walked = dry.walk(job.method, job.given, precision=precision, global_bn=job.settings.global_bn, world=world)
    places = job.given.places.said if job.given.places is not None else []
    return {**walked, "device": where.name, "precision": precision, "notes": [*job.notes, *places], "config": job.config}


def evaluate(network: TeacherConfig, spec: str, *, device: str = "auto", limit: int | None = None) -> dict[str, Any]:
    """Scores of a network on a data set, in 0 … 1: top1 and top5, for a set with labels of pixels miou and pixel_accuracy."""
    where = resolve_device(device)
    found = load_network(network, spec, what="model")
    test = data.open_set(spec, "test", size=found.shape[1], channels=found.shape[0])
    if test is None:
        raise ConfigError("data 'none' cannot be evaluated on; expected a data set by name or a folder.")
    if test.classes != found.classes:
        raise InputError(f"the network has {found.classes} classes, '{spec}' has {test.classes}; expected the set it was trained on.")
    if limit:
        test = test.subset(limit, seed=0)
    net, test = placed(found.net, where), test.to(where)
    began = time.monotonic()
    scores = evaluation.measure(net, test, torch.tensor(found.mean, device=where), torch.tensor(found.std, device=where))
    return {
        **network_facts(found.spec, net),
        "data": spec,
        **scores,
        "images": len(test),
        "seconds": round(time.monotonic() - began, 2),
        "notes": [*found.notes, *test.notes],
    }


def describe_model(network: TeacherConfig, spec_data: str | None = None) -> dict[str, Any]:
    """What a network is to fastkd: size, BatchNorm layers, feature width, whether its CAM is exact."""
    found = load_network(network, spec_data, what="model")
    teacher = instrument(found.net, shape=found.shape)
    return {
        **network_facts(found.spec, found.net),
        "classes": found.classes,
        "shape": list(found.shape),
        "mean": list(found.mean),
        "std": list(found.std),
        "bn_layers": len(teacher.split) - 1,
        "bn_channels": teacher.split[-1],
        "cam": "exact" if teacher.head is not None else teacher.head_reason,
        "sha256": found.sha256,
        "surgery": teacher.report,
        "notes": found.notes,
    }
