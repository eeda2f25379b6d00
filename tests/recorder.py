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


SYNCHRONISING = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::unique_dim"),
    "aten::lift_fresh",  # torch.tensor of a host value: on a GPU it waits for a copy
}
TO_THE_HOST = ("cpu", "tolist", "numpy")
"""Functions of a tensor that copy to the host; on the CPU the dispatcher sees nothing of them."""


class NoHostRead(TorchDispatchMode):
    """Collects the calls that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self):  # type: ignore[no-untyped-def]
        self._own = {name: getattr(torch.Tensor, name) for name in TO_THE_HOST}
        for name, function in self._own.items():
            setattr(torch.Tensor, name, self._noted(name, function))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for name, function in self._own.items():
            setattr(torch.Tensor, name, function)

    def _noted(self, name: str, function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.found.append(f"Tensor.{name}")
            return function(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in SYNCHRONISING or _masked(func, args):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def _masked(func: Any, args: Any) -> bool:
    """Whether rows are chosen by a mask: how many there are is read."""
    return func._schema.name == "aten::index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


class OwnDraws(TorchDispatchMode):
    """Collects draws outside of the run's streams: from torch's global generator, which every rank seeds alike, so that rows of different
    ranks would be the same. Parameters that all ranks hold are re-initialised from it, and that is as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.Tag.nondeterministic_seeded in func.tags and (kwargs or {}).get("generator") is None:
            shared = args and isinstance(args[0], torch.nn.Parameter) and not getattr(args[0], "per_sample", False)
            if not (shared and func._schema.is_mutable):
                self.found.append(f"{func._schema.name}, a draw outside of the run's streams")
        return func(*args, **(kwargs or {}))
