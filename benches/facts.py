"""What a reader of a record needs to know of the machine and of the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from fastkd import __version__, ops

from ._case import Plan

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
"""CPU features that decide what a figure means."""


def facts(plan: Plan) -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(plan.device) if plan.cuda else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "fastkd": __version__,
        "revision": revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"system": platform.system(), "machine": platform.machine(), "cpu": cpuinfo("model name"), "cores": cores},
        "flags": [f for f in FLAGS if f in cpuinfo("flags").split()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "driver": nvidia("driver_version") if plan.cuda else None,
        "clocks": nvidia("clocks.sm,clocks.max.sm,clocks.mem") if plan.cuda else None,
        "type": plan.device.type,
        "device": gpu.name if gpu else "cpu",
        "slug": slug(gpu.name) if gpu else f"cpu-{cores}-cores",
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "threads": list(plan.threads) or torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": torch.backends.cudnn.allow_tf32 if plan.cuda else None,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
        "settings": {"quick": plan.quick, "swap": plan.swap, "compile": plan.compile, "graphs": plan.graphs and plan.cuda},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "compiled": ops.build_info(),
        "ops": chosen(),
    }


def chosen() -> list[dict[str, Any]]:
    """Which backend each op takes by itself, called and while a CUDA graph is captured, and why not another one."""
    with ops.captured():
        in_graphs = {(op, device): name for op, device, name, _ in ops.table()}
    return [
        {"op": op, "device": device, "chosen": name, "captured": in_graphs[op, device], "backends": why}
        for op, device, name, why in ops.table()
    ]


def slug(name: str) -> str:
    """A device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpuinfo(key: str) -> str:
    """A line of what Linux says of the first core; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() if key == "model name" else ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def triton_version() -> str | None:
    try:
        import triton
    except Exception:  # absent, or built for another torch: its rows say why
        return None
    return str(triton.__version__)


def nvidia(query: str) -> str | None:
    """One line of nvidia-smi; None where there is none."""
    try:
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0].strip() if said else None


def revision() -> str | None:
    """The git revision of the code, with a + where files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():  # an installed copy may lie in somebody else's repository
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed.strip() else "")
