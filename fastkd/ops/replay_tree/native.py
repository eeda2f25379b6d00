"""Prioritised sampling in C++ and CUDA: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .reference import size

REFUSES_ALL = True
"""Whether `replay_update` on the CPU writes nothing where an entry is refused."""
_DUPLICATES = {"last": 0, "max": 1, "mean": 2}


def philox_uniform(key: Tensor, n: int) -> Tensor:
    """[n] fp64."""
    out = torch.empty(n, dtype=torch.float64, device=key.device)
    _native.launch("philox_uniform", (key.contiguous(), out), n, work=out)
    return out


def replay_sums(leaves: Tensor) -> Tensor:
    """[2, size] fp64."""
    sums = torch.empty((2, size(len(leaves))), dtype=torch.float64, device=leaves.device)
    _native.launch("replay_sums", (leaves, sums), len(leaves), _native.DTYPE[leaves.dtype], work=leaves)
    return sums


def replay_sample(leaves: Tensor, sums: Tensor, u: Tensor | None, key: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index [n], probability [n], least [])."""
    index = torch.empty(n, dtype=torch.int64, device=leaves.device)
    probability = torch.empty(n, dtype=leaves.dtype, device=leaves.device)
    least = torch.empty((), dtype=leaves.dtype, device=leaves.device)
    u = None if u is None else u.to(torch.float64).contiguous()
    key = None if key is None else key.contiguous()
    tensors = (leaves, sums, u, key, index, probability, least)
    _native.launch("replay_sample", tensors, len(leaves), n, _native.DTYPE[leaves.dtype], work=index)
    return index, probability, least


def replay_update(leaves: Tensor, sums: Tensor, index: Tensor, value: Tensor, duplicates: str) -> Tensor:
    """Writes leaves and sums; [] how many entries were refused."""
    index, value = index.contiguous(), value.contiguous()
    order = None if leaves.is_cuda or duplicates == "last" else index.argsort(stable=True)
    refused = torch.zeros((), dtype=torch.int64, device=leaves.device)
    tensors = (leaves, sums, index, value, order, refused)
    _native.launch(
        "replay_update", tensors, len(leaves), len(index), _native.DTYPE[leaves.dtype], _DUPLICATES[duplicates], work=index
    )
    return refused
