"""What a run would take: memory by part and rank, steps, bytes over the wire, hours, and whether it fits. Nothing is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastkd import assemble, models
from fastkd.config import RunConfig
from fastkd.engine import loop, probe
from fastkd.errors import NoMemoryError, no_memory

ROOM = 0.9
"""Share of the free memory that a run may take: allocators round up and leave gaps."""


def plan(config: RunConfig, world: int = 1, *, probed: bool = True) -> dict[str, Any]:
    """Walk a run on tensors without memory, then time one step of each kind on real ones, as rank 0 of `world`.

    Args:
      probed: take the real steps; without them hours and the memory of activations stay unknown.
    Returns:
      what `assemble.dry_run` returns, and
      steps: also seconds and peak (bytes beside what is held) of each. evaluation, checkpoint: the same.
      memory: bytes of a rank: held, guards (their copies), activations (of the hungriest step), rank: all of it; available, and machine:
      what the ranks that share it need. hours: without communication. fits: None where that is not known. why: a sentence.
    Raises:
      ConfigError, InputError: as `run`, before anything is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        config, said = with_weights(config, Path(folder))
        walked = assemble.dry_run(config, world)
        job = assemble.make_job(config)  # once more: what a dry run has built is not there
    walked["notes"] = said + walked["notes"]
    device = job.given.device
    data = 0 if job.test is None else sum(t.numel() * t.element_size() for t in (job.test.images, job.test.labels))
    parts = walked["bytes"] | ({"evaluation data": data} if data else {})
    shares = world if device.type == "cpu" else 1  # ranks on the CPU share its memory
    memory: dict[str, Any] = {"held": sum(parts.values()), "available": free(device)}
    planned = {**walked, "bytes": parts, "memory": memory, "device": str(device), "precision": job.precision, "hours": None, "fits": None}
    memory["machine"] = memory["held"] * shares
    if memory["machine"] > memory["available"]:
        return planned | {"fits": False, "why": "what is held for the whole run alone is more than there is"}
    if not probed:
        return planned | {"why": "not known without the probe: the memory of activations is not counted"}
    settings = loop.Settings(seed=job.seed, precision=job.precision, global_bn=job.global_bn, data=job.test)
    try:
        found = probe.probe(job.method, job.given, settings, world=world)
    except Exception as e:
        if not (isinstance(e, NoMemoryError) or no_memory(e)):
            raise
        return planned | {"fits": False, "why": f"a probe of its steps ran out of memory: {str(e).splitlines()[0]}"}
    rows = [{**fake, "seconds": real["seconds"], "peak": real["peak"]} for fake, real in zip(walked["steps"], found["steps"], strict=True)]
    on_device = [*rows, found["evaluation"], *([found["checkpoint"]] if device.type == "cpu" else [])]
    memory["guards"], memory["activations"] = found["guards"], max(row["peak"] for row in on_device)
    memory["rank"] = memory["held"] + memory["guards"] + memory["activations"]
    memory["machine"] = memory["rank"] * shares
    seconds = sum(row["times"] * row["seconds"] for row in rows) + planned["epochs"] * found["evaluation"]["seconds"]
    fits = memory["machine"] <= ROOM * memory["available"]
    planned |= {"steps": rows, "evaluation": found["evaluation"], "checkpoint": found["checkpoint"], "hours": seconds / 3600}
    why = f"{'less' if fits else 'more'} than {ROOM:.0%} of what is free"
    return planned | {"fits": fits, "why": why, "notes": [*walked["notes"], *found["said"]]}


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
