"""A dry run: every kind of step of a method once, on fake tensors of the real sizes. Nothing is computed, nothing is written."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.engine import loop
from fastkd.engine.attributes import nodes
from fastkd.errors import ConfigError, MethodError
from fastkd.memory import Store
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


@dataclass(frozen=True)
class Kind:
    """A step as it first comes in a run, and how many times a run takes it; numbers of eager steps (learning rates) make no kind."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    epoch: int
    occurrence: int
    times: int

    @property
    def row(self) -> dict[str, Any]:
        """step, phase, args, times: what is printed of it."""
        args = "" if _numbered(self.fn, self.args) else ", ".join(map(str, self.args))
        return {"step": self.fn.__name__, "phase": self.fn.phase, "args": args, "times": self.times}  # type: ignore[attr-defined]


def kinds(method: Method) -> list[Kind]:
    """Each distinct (step, arguments) of a run, in the order in which it is met."""
    first: dict[tuple[str, tuple[Any, ...]], tuple[Callable[..., Any], tuple[Any, ...], int, int]] = {}
    times: Counter[tuple[str, tuple[Any, ...]]] = Counter()
    for e in range(method.epochs):
        for _, fn, args, n in steps(method, e):
            key = (fn.__name__, () if _numbered(fn, args) else args)
            first.setdefault(key, (fn, args, e, n))
            times[key] += 1
    return [Kind(*found, times[key]) for key, found in first.items()]


def _numbered(fn: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    return bool(fn.eager and args and not isinstance(args[0], bool))  # type: ignore[attr-defined]


class Wire(TorchDispatchMode):
    """Counts the bytes that a rank sends in collectives, as a ring sends them. `take` gives the count and begins anew."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.sent = world, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._schema.name.removeprefix("c10d::") in self.SHARES:
            share = self.SHARES[func._schema.name.removeprefix("c10d::")]
            # A ring passes on all but its own piece: of what is summed twice, of what is gathered or scattered once.
            own = sum(t.nbytes for t in tree_leaves(args[0]) if isinstance(t, Tensor))
            self.sent += share * (self.world - 1) / self.world * own
        return func(*args, **(kwargs or {}))

    SHARES = {"allreduce_": 2, "allgather_": 1, "_allgather_base_": 1, "reduce_scatter_": 1, "broadcast_": 1, "alltoall_base_": 1}
    """Collectives, by how often the bytes of their first argument (the whole result, of this rank) go around."""

    def take(self) -> int:
        sent, self.sent = round(self.sent), 0.0
        return sent


def walk(method: Method, given: Given, *, precision: str = "fp32", global_bn: bool = True, world: int = 1) -> dict[str, Any]:
    """Build the method on fake tensors and run each distinct (step, arguments) once, in the order in which a run meets them.

    Args:
      world: how many ranks the run would have; what is returned is one rank's.
    Returns:
      steps: one row a kind of step: name, phase, arguments, how often a run takes it, bytes that it sends to other ranks. bytes: of what
      `build` made, by attribute, on the device; host: the same of images in the host memory of a GPU's machine (on a CPU both are one).
      epochs, total: numbers of epochs and steps. wire: bytes sent in all steps.
    Raises:
      ConfigError: sizes that do not fit together; the step is named. MethodError: a step that reads values of a tensor on the host.
    """
    rows: list[dict[str, Any]] = []
    with pretended(world), FakeTensorMode(allow_non_fake_inputs=True), Wire(world) as wire:
        loop.prepare(method, given, global_bn=global_bn)
        autocast = loop.autocast(method.device, precision)
        wire.take()
        for kind in kinds(method):
            method.rng.at(given.seed, kind.epoch, kind.fn.__name__, kind.occurrence)
            method.log.prefix = kind.fn.__name__
            try:
                with autocast():
                    kind.fn(*kind.args)
            except (DataDependentOutputException, DynamicOutputShapeException) as problem:
                raise MethodError(
                    f"step '{kind.fn.__name__}' of epoch {kind.epoch} reads values of a tensor on the host ({problem.func}), and a dry run"
                    " has none; keep them on the device: an eager step may read host numbers, such as how full a store is."
                ) from None
            except (RuntimeError, ValueError, IndexError) as problem:
                said = str(problem).splitlines()[0]
                raise ConfigError(f"step '{kind.fn.__name__}' of epoch {kind.epoch} cannot run with these sizes: {said}") from None
            method.step_ends()
            rows.append({**kind.row, "wire": wire.take()})
    held = _held(method, given)
    apart = given.places is not None and given.places.on_gpu
    sizes = {name: own + (0 if apart else host) for name, (own, host) in held.items()}
    hosted = {name: host for name, (_, host) in held.items() if apart}
    total, sent = sum(r["times"] for r in rows), sum(r["times"] * r["wire"] for r in rows)
    by_part = {kind: {name: size for name, size in table.items() if size} for kind, table in (("bytes", sizes), ("host", hosted))}
    return {"steps": rows, **by_part, "epochs": method.epochs, "total": total, "ranks": world, "wire": sent}


def _held(method: Method, given: Given) -> dict[str, tuple[int, int]]:
    """By attribute the bytes of all tensors that hang on it and were not counted yet: where it computes, and in host memory."""
    held: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()

    def count(attribute: str, tensors: Iterable[Any], *, hosted: bool = False) -> None:
        new = {id(t): t.nbytes for t in tensors if isinstance(t, Tensor) and id(t) not in seen}
        seen.update(new)
        own, host = held.get(attribute, (0, 0))
        held[attribute] = (own, host + sum(new.values())) if hosted else (own + sum(new.values()), host)

    if given.teacher is not None:
        count("teacher", _of(given.teacher))
    for node in nodes(method, "teacher", "real", "log"):
        if isinstance(node.value, Store) and node.value.hosted:
            count(node.attribute, [node.value.images], hosted=True)
        count(node.attribute, _of(node.value))
    return held


def _of(value: Any) -> list[Any]:
    """The tensors of a value that the walk does not enter, or itself."""
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    if isinstance(value, torch.optim.Optimizer):
        return [t for s in value.state.values() for t in s.values()]
    return [value]
