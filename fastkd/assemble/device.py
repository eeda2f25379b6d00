"""The device and the precision that a name stands for on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from fastkd.errors import ConfigError, PlaceError


def resolve_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one. Without a number it is the current one, a rank's own.

    Raises:
      ConfigError: not a device name. PlaceError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}'; expected auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported; expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PlaceError(
            f"device '{name}' is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; use --device cpu."
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def crowded(device: torch.device) -> str | None:
    """What to say where a run on the CPU has more threads than the machine has idle cores; None otherwise.

    OpenMP's threads wait for each other spinning: beside other work on the same cores two of them do less than one alone.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    others = running_beside()
    if others is None or threads + others <= cores or others <= cores / 4:
        return None
    beside = f"{threads} threads beside {others:.0f} of other work on the same {cores} cores"
    return f"{beside} may be slower than one: OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=passive"


def running_beside(looks: int = 8) -> float | None:
    """How many threads of others run or want to, on average over some 80 ms; None where the system does not tell.

    Not the load average: that still holds what this process, or an installation before it, did a minute ago.
    """
    found = []
    for _ in range(looks):
        try:
            found.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)  # without this one
        except (OSError, ValueError, IndexError):
            return None
        time.sleep(0.01)
    return sum(found) / looks


def resolve_precision(name: str | None, *, on_gpu: bool) -> str:
    """bf16 on a GPU, fp32 on a CPU, unless named."""
    return name or ("bf16" if on_gpu else "fp32")
