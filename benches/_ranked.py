"""Benches that run on several ranks of this machine: start them, time parts of a step, join what they found."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd.engine.launch import leave

from ._timing import spread
from .facts import cpuinfo, revision


def options(prog: str, description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m benches.{prog}", description=description)
    made.add_argument("--gpus", type=int, default=2, metavar="N", help="ranks; on a CPU they talk through gloo")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, its times mean nothing")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def launch(work: Callable[..., list[dict[str, Any]]], args: argparse.Namespace, world: int) -> list[dict[str, Any]]:
    """The rows that rank 0 of `world` ranks finds with `work(args, device)`; every rank does the same."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, work, args), nprocs=world)
        return json.loads((Path(folder) / "rows.json").read_text())  # type: ignore[no-any-return]


def _rank(rank: int, world: int, folder: str, work: Callable[..., list[dict[str, Any]]], args: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        rows = work(args, device)
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json.dumps(rows))
    finally:  # also after an error: with the group still up its threads would end the process before its traceback is seen
        if world > 1:
            dist.destroy_process_group()
    leave(0)  # at once: gloo's threads sometimes end the interpreter's own way out with SIGABRT


class Parts:
    """Milliseconds of a step and of parts of it. On a GPU the part's own stream is timed, stalls included, and nothing is waited for."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: dict[str, list[list[Any]]] = {}

    def step(self) -> None:
        """A new step begins."""
        for marks in self.marks.values():
            marks.append([])

    def __call__(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, timed as a part of the step that runs; calls before the first `step` are not counted."""
        marks = self.marks.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            first = self._now()
            out = fn(*args, **kwargs)
            if marks:
                marks[-1].append((first, self._now()))
            return out

        return timed

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, name: str) -> list[float]:
        """Of each step the sum over the part's calls."""
        if self.cuda:
            torch.cuda.synchronize()
        return [sum(a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in marks) for marks in self.marks[name]]


def row(labels: dict[str, Any], whole: list[float], part: list[float]) -> dict[str, Any]:
    """A line of the record: the step's median with its spread, the part's median, and the part's share of all the time."""
    median, p20, p80 = (round(v, 4) for v in spread(whole))
    share = sum(part) / sum(whole)
    return {**labels, "ms": median, "p20": p20, "p80": p80, "part_ms": round(statistics.median(part), 4), "share": round(share, 4)}


def publish(what: str, prog: str, argv: list[str], args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Show the rows, and write them with the command and the machine that they were measured on."""
    from . import tables

    keys = list(dict.fromkeys(k for r in rows for k in r))
    print("\n".join(tables.aligned([keys, *([tables.cell(k, r.get(k)) for k in keys] for r in rows)])))
    if args.json is not None:
        device = torch.cuda.get_device_name() if args.device == "cuda" else cpuinfo("model name")
        words = [w for i, w in enumerate(argv) if "--json" not in argv[max(0, i - 1) : i + 1]]
        about = {"what": what, "command": " ".join(["python -m", f"benches.{prog}", *words]), "commit": revision(), "device": device}
        about |= {"torch": torch.__version__, "cores": len(os.sched_getaffinity(0)), "quick": args.quick}
        args.json.write_text(json.dumps({**about, "load": os.getloadavg()[0], "rows": rows}, indent=1) + "\n", encoding="utf-8")
