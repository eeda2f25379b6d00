"""The one walk over what hangs on a method: what is saved, copied back, counted or globalised is taken from it, so none misses a part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastkd.errors import MethodTypeError
from fastkd.memory import Store
from fastkd.memory.ahead import Ahead
from fastkd.method import OWN, Method
from fastkd.rng import Rng

Kind = TypeVar("Kind")
Setter = Callable[[Any], None]
CONSTANTS = (str, bytes, type(None), torch.device, torch.dtype, range, slice)
AGAIN = (Rng, Ahead)
"""Objects that are made again from the rest."""


class Node(NamedTuple):
    """Something that hangs on a method: its path, itself, and the way to replace it there (None: it cannot be)."""

    path: str
    value: Any
    replace: Setter | None

    @property
    def attribute(self) -> str:
        """The method's attribute that it hangs on."""
        return self.path.partition(".")[0]


def nodes(method: Method, *skip: str) -> Iterator[Node]:
    """All that hangs on the attributes of a method but `skip`, private ones as well, outer things before inner ones.

    It enters dicts, lists, tuples, objects of fastkd's classes and dataclasses. Modules, optimisers and what is of another kind are not
    entered; constants, what can be made again, the toolbox's own attributes and cached properties (`check_caches`) are left out. An object
    that hangs in several places comes once, a number each time.
    """
    seen = {id(method)}
    for name, value in sorted(vars(method).items()):
        if name not in skip and name not in OWN and not _cached(method, name):
            yield from _nodes(name, value, None, seen)


def _nodes(path: str, value: Any, replace: Setter | None, seen: set[int]) -> Iterator[Node]:
    if isinstance(value, bool | int | float):
        yield Node(path, value, replace)
        return
    if isinstance(value, (*CONSTANTS, *AGAIN)) or id(value) in seen:
        return
    seen.add(id(value))
    yield Node(path, value, replace)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _nodes(f"{path}.{key}", inner, functools.partial(value.__setitem__, key), seen)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _nodes(f"{path}.{i}", inner, functools.partial(value.__setitem__, i), seen)
    elif isinstance(value, tuple):
        for i, inner in enumerate(value):
            yield from _nodes(f"{path}.{i}", inner, None, seen)
    elif entered(value):
        for name, inner in sorted(vars(value).items()):
            yield from _nodes(f"{path}.{name}", inner, functools.partial(setattr, value, name), seen)


def entered(value: Any) -> bool:
    """Whether it is an object whose attributes are walked."""
    if isinstance(value, Tensor | nn.Module | torch.optim.Optimizer | type) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.split(".")[0] == "fastkd" or is_dataclass(value)


def hanging(method: Method, kind: type[Kind]) -> list[Kind]:
    """What is of a kind (module, optimiser, store) among all that hangs on a method; the teacher and real images excepted."""
    return [node.value for node in nodes(method, "teacher", "real") if isinstance(node.value, kind)]


def check_caches(method: Method) -> None:
    """Cached properties depend on fields and what was given alone; they are not saved.

    Raises:
      MethodTypeError: one holds what a run may change; the message names it.
    """
    names = sorted({name for cls in type(method).__mro__ for name in vars(cls) if _cached(method, name)})
    for name in names:
        for node in _nodes(name, getattr(method, name), None, set()):
            if isinstance(node.value, Tensor | nn.Module | torch.optim.Optimizer | Store):
                kind = type(node.value).__name__
                raise MethodTypeError(f"{node.path} is a {kind} in a cached property, which a checkpoint does not hold; make it in build()")


def _cached(method: Method, name: str) -> bool:
    return isinstance(getattr(type(method), name, None), functools.cached_property)
