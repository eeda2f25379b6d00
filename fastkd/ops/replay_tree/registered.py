"""`fastkd::philox_uniform` and `fastkd::replay_{sums,sample,update}`: backends behind one name. No gradient: draws are data."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._library import define, kernels_for
from . import reference as ref

_kernels = functools.partial(kernels_for, str(__package__))


def _uniform(key: Tensor, n: int) -> Tensor:
    kernels = _kernels("philox_uniform", key)
    return ref.philox_uniform_ref(key, n) if kernels is None else kernels.philox_uniform(key, n)  # type: ignore[no-any-return]


def _sums(leaves: Tensor) -> Tensor:
    kernels = _kernels("replay_sums", leaves)
    sums: Tensor = ref.replay_sums_ref(leaves) if kernels is None else kernels.replay_sums(leaves)
    if not leaves.is_cuda and bool(sums[0, -1].isnan()):
        raise ValueError("a leaf is negative or not finite; priorities are finite numbers of 0 or more")
    return sums


def _sample(leaves: Tensor, sums: Tensor, u: Any, key: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels("replay_sample", leaves)
    if kernels is not None:
        drawn: tuple[Tensor, Tensor, Tensor] = kernels.replay_sample(leaves, sums, u, key, n)
        _some(leaves, drawn[2])
        return drawn
    _some(leaves, sums[1, -1])
    return ref.replay_sample_ref(leaves, u if key is None else ref.philox_uniform_ref(key, n))


def _some(leaves: Tensor, least: Tensor) -> None:
    """CPU only: the smallest positive leaf is infinite where there is none."""
    if not leaves.is_cuda and not float(least) < torch.inf:
        raise ValueError("no leaf is positive, so that no row can be drawn; write priorities first")


def _sample_like(leaves: Tensor, sums: Any, u: Any, key: Any, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return leaves.new_empty(n, dtype=torch.int64), leaves.new_empty(n), leaves.new_empty(())


def _update(leaves: Tensor, sums: Tensor, index: Tensor, value: Tensor, duplicates: str) -> Tensor:
    kernels, value = _kernels("replay_update", leaves), value.to(leaves.dtype)
    looks = kernels is not None and kernels.REFUSES_ALL  # itself, and writes nothing
    if not leaves.is_cuda and not looks:
        _refuse(leaves, index, value)
    if kernels is None:
        return ref.replay_update_ref(leaves, sums, index, value, duplicates)
    refused: Tensor = kernels.replay_update(leaves, sums, index, value, duplicates)
    if not leaves.is_cuda and int(refused):
        _refuse(leaves, index, value)
    return refused


def _refuse(leaves: Tensor, index: Tensor, value: Tensor) -> None:
    """CPU only, where looking costs no synchronisation: say which entry is wrong, if one is."""
    if not len(index):
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= len(leaves):
        raise ValueError(f"row {low if low < 0 else high} is outside 0..{len(leaves) - 1}")
    least, most = (float(v) for v in value.aminmax())
    if not (least >= 0 and most < torch.inf):  # NaN reaches both
        raise ValueError(f"priorities are finite numbers of 0 or more, found {least if not least >= 0 else most}")


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise ValueError("draws have no gradient; pass leaves and u that do not require one")


uniform = define(
    "philox_uniform(Tensor key, int n) -> Tensor",
    _uniform,
    lambda key, n: key.new_empty(n, dtype=torch.float64),
    backward=_no_gradient,
)
sums = define(
    "replay_sums(Tensor leaves) -> Tensor",
    _sums,
    lambda leaves: leaves.new_empty((2, ref.size(leaves.shape[0])), dtype=torch.float64),
    backward=_no_gradient,
)
sample = define(
    "replay_sample(Tensor leaves, Tensor sums, Tensor? u, Tensor? key, int n) -> (Tensor, Tensor, Tensor)",
    _sample,
    _sample_like,
    backward=_no_gradient,
)
update = define(
    "replay_update(Tensor(a!) leaves, Tensor(b!) sums, Tensor index, Tensor value, str duplicates) -> Tensor",
    _update,
    lambda leaves, sums, index, value, duplicates: index.new_empty(()),
    backward=None,
)
