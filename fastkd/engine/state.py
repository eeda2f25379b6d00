"""All state of a run, found by walking the method's attributes. No method has a line of save code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import ranks
from fastkd.engine.attributes import entered, nodes
from fastkd.errors import MethodTypeError
from fastkd.log import Log
from fastkd.memory import Store
from fastkd.memory.shard import deal
from fastkd.method import GIVEN, Method

KEPT_GIVEN = {"student", "log", "pace"}
"""Of what `assemble` gives, only these change during a run."""


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
    constant = set(GIVEN) - KEPT_GIVEN
    if is_dataclass(method):
        constant |= {f.name for f in fields(method)}
    seen: set[int] = set()
    for path, value, replace in nodes(method, *constant):
        if isinstance(value, bool | int | float):
            if replace is not None:  # without one it sits in a sealed object or a tuple and cannot change
                yield NumberItem(path, value, replace)
        elif isinstance(value, Tensor):
            yield from _tensor(path, value, seen)
        elif isinstance(value, nn.Module):
            for name, tensor in [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]:
                yield from _tensor(f"{path}.{name}", tensor, seen)
        elif isinstance(value, torch.optim.Optimizer):
            yield from _optimizer(path, value, seen)
        elif isinstance(value, Store) and value.apart:
            seen.add(id(value.images))
            yield ImagesItem(f"{path}.images", value)
        elif not isinstance(value, dict | list | tuple) and not entered(value):
            raise MethodTypeError(
                f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; keep tensors, modules, optimisers, stores or numbers"
            )


def _tensor(path: str, tensor: Tensor, seen: set[int]) -> Iterator[TensorItem]:
    if id(tensor) not in seen:
        seen.add(id(tensor))
        yield TensorItem(path, tensor, getattr(tensor, "per_sample", False))


def _optimizer(path: str, opt: torch.optim.Optimizer, seen: set[int]) -> Iterator[Item]:
    for i, group in enumerate(opt.param_groups):
        if isinstance(group["lr"], Tensor):
            yield from _tensor(f"{path}.{i}.lr", group["lr"], seen)
        for j, p in enumerate(group["params"]):
            for name, tensor in sorted(opt.state[p].items()):
                if isinstance(tensor, Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield TensorItem(f"{path}.{i}.{j}.{name}", tensor, getattr(p, "per_sample", False) and tensor.shape == p.shape)


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
