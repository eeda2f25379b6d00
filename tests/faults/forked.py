"""Small runs in processes of their own that die for real: forked from one server that has imported everything, a fraction of a second each.

A run has one or two ranks, joined through a file, without a launcher: what is left of it is looked at afterwards by this process.
"""

from __future__ import annotations

import multiprocessing
import os
import uuid
from functools import cache
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.engine import checkpoint, events
from tests import small
from tests.cli.conftest import environment

LIMIT = 300
"""Seconds that a rank has."""


@cache
def _server() -> Any:
    """A context whose server runs, with one thread, because threads are not forked, and with this checkout on its path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.warm", "tests.faults.forked"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        ensure_running()
    return context


def _rank(rank: int, world: int, meeting: str, out: Path, plant: dict[str, Any] | None, variant: Any, settings: dict[str, Any]) -> None:
    from fastkd.engine import loop
    from tests.faults.planted import sitecustomize

    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    if plant:
        os.environ["RANK"] = str(rank)
        sitecustomize.plant(**plant)
    method = small.prepared(*variant)
    chosen = loop.Settings(seed=method.seed, **{"poll": 2, "every_minutes": 1e6, **settings})
    code = loop.run(method, chosen, events.Events(out if rank == 0 else None), out, resume=True)
    os._exit(code)


def start(
    out: Path, *, world: int = 1, plant: dict[str, Any] | None = None, variant: Any = ("fast",), **settings: Any
) -> list[BaseProcess]:
    """The processes of a run that goes on where `out` ends; a plant's rank is one of 0 … world - 1."""
    out.mkdir(exist_ok=True)
    context, meeting = _server(), str(out.with_name(f"{out.name}-{uuid.uuid4().hex}"))
    ranks = [context.Process(target=_rank, args=(r, world, meeting, out, plant, variant, settings)) for r in range(world)]
    for process in ranks:
        process.start()
    return ranks


def run(out: Path, **how: Any) -> list[int | None]:
    """Run to the end, one way or another; the exit codes, -n after signal n."""
    ranks = start(out, **how)
    for process in ranks:
        process.join(LIMIT)
    if hanging := [process for process in ranks if process.is_alive()]:
        for process in hanging:
            process.kill()
        raise AssertionError(f"{len(hanging)} of {len(ranks)} ranks did not end within {LIMIT} s")
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.close()
    return codes


def state(out: Path) -> dict[str, Any]:
    """Everything that the newest checkpoint holds, which must be whole."""
    said: list[str] = []
    saved = checkpoint.newest(out / "checkpoints", said)
    assert saved is not None and not said, said
    return {**saved.tensors, **saved.numbers, "position": saved.position}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names under which two states differ by a bit."""
    assert a.keys() == b.keys()
    same = lambda x, y: torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return [name for name in a if not same(a[name], b[name])]


def log(out: Path) -> list[dict[str, Any]]:
    """The epochs of a run without what the clock says."""
    return [{k: v for k, v in e.items() if k not in ("time", "seconds", "wall")} for e in events.curve(out / "events.jsonl")]
