"""All state of a run, found by walking the method's attributes. No method has a line of save code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastkd import ranks
from fastkd.errors import MethodTypeError
from fastkd.log import Log
from fastkd.memory import Store
from fastkd.memory.ahead import Ahead
from fastkd.memory.shard import deal
from fastkd.method import GIVEN, Method
from fastkd.rng import Rng

KEPT_GIVEN = {"student", "log", "pace"}
"""Of what `assemble` gives, only these change during a run."""
Kind = TypeVar("Kind")
CONSTANTS = (str, bytes, type(None), torch.device, torch.dtype, range, slice)


@dataclass
class TensorItem:
    """A tensor of the state; `per_sample`: it holds this rank's rows of a global batch."""

    path: str
    tensor: Tensor
    per_sample: bool

    def globally(self) -> Tensor:
        """The value that a checkpoint holds: rows of all ranks joined, on the host."""
        x = self.tensor.detach()
        return (ranks.gather(x) if self.per_sample else x).cpu().contiguous().clone()

    def restore(self, saved: Tensor) -> None:
        """Copy a global value into the existing tensor."""
        mine = ranks.local(saved) if self.per_sample else saved
        if mine.shape != self.tensor.shape or mine.dtype != self.tensor.dtype:
            raise ValueError(f"{self.path} is {tuple(self.tensor.shape)} {self.tensor.dtype}, saved as {tuple(mine.shape)} {mine.dtype}")
        with torch.no_grad():
            self.tensor.copy_(mine)


@dataclass
class NumberItem:
    """A host number of the state, with the way to set it."""

    path: str
    value: int | float | bool
    restore: Callable[[Any], None]


@dataclass
class ImagesItem:
    """The images of a store that a checkpoint keeps in files of their own."""

    path: str
    store: Store


Item = TensorItem | NumberItem | ImagesItem


def walk(method: Method) -> Iterator[Item]:
    """Every tensor and host number that changes during a run, once each, under its attribute path.

    Raises:
      MethodTypeError: an attribute of a kind that cannot be saved; the message names it.
    """
    constant = {f.name for f in fields(method)} if is_dataclass(method) else set()
    constant |= set(GIVEN) - KEPT_GIVEN
    seen: set[int] = set()
    for name, value in sorted(vars(method).items()):
        if not name.startswith("_") and name not in constant:
            yield from _visit(name, value, None, seen)


def _visit(path: str, value: Any, setter: Callable[[Any], None] | None, seen: set[int]) -> Iterator[Item]:
    if isinstance(value, bool | int | float):
        if setter is not None:  # without one it sits in a sealed object or a tuple and cannot change
            yield NumberItem(path, value, setter)
        return
    if isinstance(value, CONSTANTS) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield TensorItem(path, value, getattr(value, "per_sample", False))
    elif isinstance(value, nn.Module):
        for name, tensor in [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]:
            yield from _visit(f"{path}.{name}", tensor, None, seen)
    elif isinstance(value, torch.optim.Optimizer):
        yield from _optimizer(path, value, seen)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _visit(f"{path}.{key}", inner, _into(value, key), seen)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _visit(f"{path}.{i}", inner, _into(value, i), seen)
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from _visit(f"{path}.{i}", inner, None, seen)
    elif isinstance(value, Rng | Ahead):
        return  # made again from the rest
    elif type(value).__module__.split(".")[0] == "fastkd" or is_dataclass(value):
        for name, inner in sorted(vars(value).items()):
            if name == "images" and isinstance(value, Store) and value.apart:
                yield ImagesItem(f"{path}.{name}", value)
            else:
                yield from _visit(f"{path}.{name}", inner, _attribute(value, name), seen)
    else:
        raise MethodTypeError(
            f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; keep tensors, modules, optimisers, stores or numbers"
        )


def _optimizer(path: str, opt: torch.optim.Optimizer, seen: set[int]) -> Iterator[Item]:
    for i, group in enumerate(opt.param_groups):
        yield from _visit(f"{path}.{i}.lr", group["lr"], None, seen)
        for j, p in enumerate(group["params"]):
            for name, tensor in sorted(opt.state[p].items()):
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield TensorItem(f"{path}.{i}.{j}.{name}", tensor, getattr(p, "per_sample", False) and tensor.shape == p.shape)


def _into(container: Any, key: Any) -> Callable[[Any], None]:
    return lambda value: container.__setitem__(key, value)


def _attribute(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


def collect(method: Method) -> tuple[dict[str, Tensor], dict[str, int | float | bool]]:
    """The global state but for `images`: tensors on the host and host numbers, by path. A collective: every rank calls it."""
    tensors, numbers = {}, {}
    for item in walk(method):
        if isinstance(item, TensorItem):
            tensors[item.path] = item.globally()
        elif isinstance(item, NumberItem):
            numbers[item.path] = item.value
    return tensors, numbers


def images(method: Method) -> tuple[dict[str, Tensor], bool]:
    """The images [n, H, W, C] that this rank writes to a file of its own, by path, not copied; and whether other ranks write some, too."""
    stores = {item.path: item.store for item in walk(method) if isinstance(item, ImagesItem)}
    own = {path: store.held() for path, store in stores.items() if store.shards > 1 or ranks.rank() == 0}
    return own, any(store.shards > 1 for store in stores.values())


def restore(
    method: Method, tensors: dict[str, Tensor], numbers: dict[str, Any], images: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Copy a global state into the existing tensors and objects.

    Args:
      images: path → the parts that the ranks wrote (`memory.shard.deal`); it does not matter whether this run keeps them apart.
    Raises:
      ValueError: paths or shapes differ from those of the method as it was built.
    """
    log: Log = method.log
    images = images or {}
    for path in tensors:
        if path.startswith("log.sums."):
            log.slot(path.removeprefix("log.sums."))
    items = {item.path: item for item in walk(method)}
    saved = {*tensors, *numbers, *images}
    missing = sorted(set(items) - saved - {p for p in items if p.startswith("log.sums.")})
    foreign = sorted(saved - set(items))
    if missing or foreign:
        raise ValueError(
            f"the saved state is of another run: {(missing or foreign)[0]} is {'not in it' if missing else 'not part of this one'}"
        )
    for path, item in items.items():
        if isinstance(item, ImagesItem):
            item.store.load(images[path] if path in images else [tensors[path]])
        elif isinstance(item, TensorItem) and path in images:
            deal(images[path], item.tensor, 0, 1)
        elif isinstance(item, TensorItem) and path in tensors:
            item.restore(tensors[path])
        elif isinstance(item, NumberItem):
            item.restore(numbers[path])


def hanging(method: Method, kind: type[Kind]) -> list[Kind]:
    """What is of a kind (module, optimiser, store) among the attributes of a method and of the objects of fastkd that it holds; the
    teacher and real images excepted."""
    found: list[Kind] = []
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, kind):
            found.append(value)
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)
        elif isinstance(value, Tensor | nn.Module | torch.optim.Optimizer):
            return
        elif type(value).__module__.startswith("fastkd.") and hasattr(value, "__dict__"):
            for inner in vars(value).values():
                visit(inner)

    for name, value in vars(method).items():
        if name not in ("teacher", "real", "rng", "log"):
            visit(value)
    return found
