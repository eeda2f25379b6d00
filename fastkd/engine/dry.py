"""A dry run: every kind of step of a method once, on fake tensors of the real sizes. Nothing is computed, nothing is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd.engine import loop
from fastkd.errors import ConfigError
from fastkd.method import Given, Method, steps


@contextlib.contextmanager
def pretended(world: int) -> Iterator[None]:
    """Be rank 0 of `world` ranks that are not there: collectives return at once, shapes are those of a rank."""
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch ships it for dry runs such as this one

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def walk(method: Method, given: Given, *, precision: str = "fp32", global_bn: bool = True, world: int = 1) -> dict[str, Any]:
    """Build the method on fake tensors and run each distinct (step, arguments) once, in the order in which a run meets them.

    Args:
      world: how many ranks the run would have; what is returned is one rank's.
    Returns:
      steps: one row a kind of step: name, phase, arguments, how often a run takes it. bytes: of what `build` made, by attribute.
      epochs, total: numbers of epochs and steps.
    Raises:
      ConfigError: sizes that do not fit together; the step is named.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with pretended(world), FakeTensorMode(allow_non_fake_inputs=True):
        loop.prepare(method, given, global_bn=global_bn)
        autocast = loop.autocast(method.device, precision)
        for e in range(method.epochs):
            for _, fn, args, n in steps(method, e):
                # Numbers of eager steps (learning-rate positions) are no variants.
                key = (fn.__name__, "" if fn.eager and args and not isinstance(args[0], bool) else ", ".join(map(str, args)))  # type: ignore[attr-defined]
                if key in rows:
                    rows[key]["times"] += 1
                    continue
                rows[key] = {"step": key[0], "phase": fn.phase, "args": key[1], "times": 1}  # type: ignore[attr-defined]
                method.rng.at(given.seed, e, fn.__name__, n)
                method.log.prefix = fn.__name__
                try:
                    with autocast():
                        fn(*args)
                except (RuntimeError, ValueError, IndexError) as problem:
                    raise ConfigError(f"step '{key[0]}' of epoch {e} cannot run with these sizes: {str(problem).splitlines()[0]}") from None
                method.step_ends()
    seen: set[int] = set()
    parts = {"teacher": given.teacher, **{k: v for k, v in sorted(vars(method).items()) if k not in ("teacher", "real")}}
    sizes = {name: size for name, value in parts.items() if (size := _bytes(value, seen))}
    total = sum(r["times"] for r in rows.values())
    return {"steps": list(rows.values()), "bytes": sizes, "epochs": method.epochs, "total": total, "ranks": world}


def _bytes(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors that hang on a value and were not counted yet."""
    if isinstance(value, Tensor):
        new = id(value) not in seen
        seen.add(id(value))
        return value.numel() * value.element_size() if new else 0
    if isinstance(value, nn.Module):
        inner: Any = [*value.parameters(), *value.buffers()]
    elif isinstance(value, torch.optim.Optimizer):
        inner = [t for s in value.state.values() for t in s.values()]
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif type(value).__module__.startswith(("fastkd.memory", "fastkd.methods")):
        inner = vars(value).values()
    else:
        return 0
    return sum(_bytes(v, seen) for v in inner)
