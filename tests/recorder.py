"""A stand-in for a CUDA graph on the CPU: records the aten calls of a step and replays them on the same memory, without host code."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Records every call made under it; `replay` makes them again and writes each result where the first one stood."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _has_memory(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if _has_memory(old) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)


def _has_memory(x: Any) -> bool:
    """Not so the zeros that stand for a missing gradient of a gradient."""
    return isinstance(x, torch.Tensor) and not x._is_zerotensor()


SYNCHRONISING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::unique_dim"}


class NoHostRead(TorchDispatchMode):
    """Collects the calls that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in SYNCHRONISING:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))
