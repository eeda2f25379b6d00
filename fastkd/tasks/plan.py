"""What a run would take: memory by part and rank, steps, bytes over the wire, hours, and whether it fits. Nothing is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastkd import assemble, models
from fastkd.config import RunConfig
from fastkd.engine import probe
from fastkd.engine.determinism import deterministic
from fastkd.errors import NoMemoryError, no_memory
from fastkd.memory import host_memory

ROOM = 0.9
"""Share of the free memory that a run may take: allocators round up and leave gaps."""


def plan(config: RunConfig, world: int = 1, *, probed: bool = True, device_memory: int | None = None) -> dict[str, Any]:
    """Walk a run on tensors without memory, then time one step of each kind on real ones, as rank 0 of `world`.

    It is planned for the device that it would use, which need not be here (`assemble.target`): images are placed and memory is counted
    as there, and what its steps need is measured on the CPU instead.

    Args:
      probed: take the real steps; without them hours and the memory of activations stay unknown.
      device_memory: bytes of the GPU, which then need not be here.
    Returns:
      what `assemble.dry_run` returns, and
      steps: also seconds and peak (bytes beside what is held) of each. evaluation, checkpoint: the same.
      memory: bytes of a rank on its device: held, guards (their copies), activations (of the hungriest step), rank: all of it; available,
      and machine: what the ranks that share it need. On a GPU also host: held, checkpoint (a copy of the state), machine, available.
      hours: without communication, on `measured_on`. fits: None where that is not known. why: a sentence.
    Raises:
      ConfigError, InputError: as `run`, before anything is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = assemble.target(config.device, world, device_memory)
        config, said = with_weights(config, Path(folder))
        walked = assemble.dry_run(config, world, where=where)
        job = assemble.make_job(config, where)  # once more: what a dry run has built is not there
    walked["notes"] = said + walked["notes"]
    test = job.settings.data
    data = 0 if test is None else sum(t.numel() * t.element_size() for t in (test.images, test.labels))
    parts = walked["bytes"] | ({"evaluation data": data} if data else {})
    room = where.memory if where.here is None or device_memory else free(where.here)
    memory: dict[str, Any] = {"held": sum(parts.values()), "available": room}
    planned = {**walked, "bytes": parts, "memory": memory, "measured_on": str(where.stand_in), "hours": None, "fits": None}
    _count_ranks(memory, where, sum(walked["host"].values()), memory["held"])
    if _too_much(memory, 1.0):
        return planned | {"fits": False, "why": "what is held for the whole run alone is more than there is"}
    if not probed:
        return planned | {"why": "not known without the probe: the memory of activations is not counted"}
    if memory["held"] + sum(walked["host"].values()) > free(where.stand_in):  # of a GPU that is elsewhere
        return planned | {"why": "not known: no step can be tried here, where what is held alone is more than there is"}
    try:
        with deterministic(job.settings.deterministic):
            found = probe.probe(job.method, job.given, job.settings, world=world)
    except Exception as e:
        if not (isinstance(e, NoMemoryError) or no_memory(e)):
            raise
        why = f"a probe of its steps ran out of memory: {str(e).splitlines()[0]}"
        return planned | {"fits": False if where.here is not None else None, "why": why}
    rows = [{**fake, "seconds": real["seconds"], "peak": real["peak"]} for fake, real in zip(walked["steps"], found["steps"], strict=True)]
    on_device = [*rows, found["evaluation"], *([] if where.on_gpu else [found["checkpoint"]])]
    memory["guards"], memory["activations"] = found["guards"], max(row["peak"] for row in on_device)
    memory["rank"] = memory["held"] + memory["guards"] + memory["activations"]
    _count_ranks(memory, where, sum(walked["host"].values()), memory["rank"], found["checkpoint"]["peak"])
    seconds = sum(row["times"] * row["seconds"] for row in rows) + planned["epochs"] * found["evaluation"]["seconds"]
    planned |= {"steps": rows, "evaluation": found["evaluation"], "checkpoint": found["checkpoint"], "hours": seconds / 3600}
    short = _too_much(memory, ROOM)
    why = f"{short or 'less'} than {ROOM:.0%} of what is free"
    return planned | {"fits": not short, "why": why, "notes": [*walked["notes"], *found["said"]]}


def _count_ranks(memory: dict[str, Any], where: assemble.Target, host: int, rank: int, checkpoint: int = 0) -> None:
    """Write what all ranks of a machine need: of the one memory that they share on CPUs; of a GPU each, and of its host's."""
    memory["machine"] = rank if where.on_gpu else where.world * rank
    if where.on_gpu:
        # Every rank copies its state to the host, the images of its stores excepted.
        memory["host"] = {"held": host, "checkpoint": checkpoint, "machine": where.world * (host + checkpoint), "available": host_memory()}


def _too_much(memory: dict[str, Any], share: float) -> str:
    """Which memory is too small, as the beginning of a sentence; empty where none is."""
    if memory["machine"] > share * memory["available"]:
        return "more"
    host = memory.get("host")
    return "more host memory" if host and host["machine"] > share * host["available"] else ""


def with_weights(config: RunConfig, folder: Path) -> tuple[RunConfig, list[str]]:
    """The configuration, its teacher with random weights in `folder` where none are named (only sizes count); and what is to be said."""
    t = config.teacher
    if t.weights is not None or t.spec is None or None in (t.classes, t.mean, t.input_size):
        return config, []
    channels = t.channels or len(t.mean or ())
    net = models.build(t.spec, classes=int(t.classes or 0), channels=channels, input_size=int(t.input_size or 0))
    models.save_weights(folder / "teacher.safetensors", net.state_dict())
    teacher = t.model_copy(update={"weights": str(folder / "teacher.safetensors")})
    return config.model_copy(update={"teacher": teacher}), ["no --teacher-weights: the teacher is random, which changes no cost"]


def free(device: torch.device) -> int:
    """Bytes of memory that a process may still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
