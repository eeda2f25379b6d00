"""Sums, means and gathers over all ranks, differentiable; with one rank: plain torch.

The objective of a run is the mean over ranks of each rank's local loss. Rows of a global batch are dealt like cards:
rank r holds rows r, r + W, r + 2W, … so that `x[:n]`, `chunk` and `cat` mean the same on any number of ranks.
The adjoint of an all-reduce is an all-reduce, so every function here is differentiable to any order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.errors import ConfigError

PATIENCE = timedelta(days=2)
_patient: list[Any] = []
"""The process group, and one of the same ranks in which they wait for a busy one."""


_beside: list[Any] = []
"""The group that `within` has set; of the process, because torch runs backward passes of GPUs in threads of their own."""


@contextlib.contextmanager
def within(group: dist.ProcessGroup) -> Iterator[None]:
    """Context: the ranks talk in `group`, not in the process group that somebody else has made for them."""
    _beside.append(group)
    try:
        yield
    finally:
        _beside.remove(group)


def _group() -> Any:
    return _beside[-1] if _beside else None


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size(_group()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank(_group()) if dist.is_available() and dist.is_initialized() else 0


def local_world() -> int:
    """Number of ranks on this machine, as far as the launcher says it; else all of them."""
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return min(world(), int(said)) if said.isdigit() and int(said) else world()


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, group=_group())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduce.apply(grad)


class _Gather(torch.autograd.Function):
    """Local rows [b, …] → global rows [b·W, …] in card order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, x.contiguous(), group=_group())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduce.apply(grad)[rank() :: world()]


def total(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, any shape; equal on all of them."""
    return x if world() == 1 else _AllReduce.apply(x)


def mean(x: Tensor) -> Tensor:
    """Mean of `x` over all ranks, any shape; equal on all of them."""
    return x if world() == 1 else _AllReduce.apply(x) / world()


def batch_mean(x: Tensor, *dims: int) -> Tensor:
    """Mean over `dims` (default: dimension 0, the batch) and over all ranks: the mean over the global batch."""
    return mean(x.mean(dims or (0,)))


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, [b, …] → [b·W, …], in the order of the global batch; differentiable."""
    return x if world() == 1 else _Gather.apply(x)


def max(x: Tensor) -> Tensor:
    """Largest value of each element over all ranks; no gradient."""
    if world() == 1:
        return x.detach()
    out = x.detach().clone()
    dist.all_reduce(out, op=dist.ReduceOp.MAX, group=_group())
    return out


def swap(x: Tensor, send: list[int] | None = None, receive: list[int] | None = None) -> tuple[Tensor, dist.Work]:
    """Begin to send rows to all ranks, as bytes, and to receive theirs; the host does not wait.

    Args:
      x: [n, …] contiguous rows in the order of their receivers; kept unchanged until the work is done.
      send: rows for each rank. receive: rows from each rank. None: equally many for and from each.
    Returns:
      What arrives, [m, …] in the order of the senders, and the work: after its `wait()` the rows may be used on the current stream.
    """
    out = torch.empty((len(x) if receive is None else sum(receive), *x.shape[1:]), dtype=x.dtype, device=x.device)
    # Bytes: every backend moves them, whatever the dtype.
    arriving, leaving = out.flatten(1).view(torch.uint8), x.flatten(1).view(torch.uint8)
    work = dist.all_to_all_single(arriving, leaving, receive, send, group=_group(), async_op=True)
    return out, work


def barrier() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier(group=_group())


def meet() -> None:
    """Wait until all ranks are here, however long one of them is busy with a file: it may take hours, and ends at once if that one dies.

    The process group's own timeout, which ends a rank that waits in any other collective, is for steps.
    """
    if world() == 1:
        return
    group = dist.group.WORLD
    if _patient[:1] != [group]:
        _patient[:] = [group, dist.new_group(backend="gloo", timeout=PATIENCE)]
    dist.all_reduce(torch.zeros(1), group=_patient[1])


def odd_ones(fingerprint: bytes) -> list[int]:
    """Ranks whose `fingerprint` (equally many bytes on each) is not that of rank 0; the same list on all of them."""
    if world() == 1:
        return []
    mine = torch.frombuffer(bytearray(fingerprint), dtype=torch.uint8)
    all_ = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(all_, mine, group=_group())
    return [r for r, other in enumerate(all_) if not torch.equal(other, all_[0])]


def rows(batch: int) -> range:
    """Row numbers of a global batch that this rank holds.

    Raises:
      ConfigError: `batch` is not a multiple of the number of ranks.
    """
    if batch % world():
        near = (round(batch / world()) or 1) * world()
        raise ConfigError(
            f"a global batch of {batch} rows cannot be dealt to {world()} ranks; expected a multiple of {world()} (nearest: {near})."
        )
    return range(rank(), batch, world())


def local(x: Tensor) -> Tensor:
    """This rank's rows of a tensor that holds the global batch on every rank."""
    return x if world() == 1 else x[rank() :: world()]
