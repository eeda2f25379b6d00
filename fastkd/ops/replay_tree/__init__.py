"""Prioritised sampling: leaves with sums over blocks of them, exact draws in proportion, updates that recompute what they touch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import registered as _registered
from .reference import size

DUPLICATES = ("last", "max", "mean")


def philox_uniform(key: Tensor, n: int) -> Tensor:
    """Uniform numbers that depend on a key and their position alone: Philox-4x32-10 (Salmon et al., SC 2011).

      1. x    = philox(counter = (offset + i, 0), key = seed)     four words of 32 bits, of which two are used
      2. u[i] = (x0 · 2^21 + ⌊x1 / 2^11⌋) · 2^-53

    Args:
      key: [2] int64 on any device: (seed, offset). Who draws n numbers adds n to the offset.
      n:   how many.
    Returns:
      [n] fp64 in [0, 1). All backends give the same bits.
    Raises:
      ValueError: a key of another shape or dtype, or a negative n.
    """
    _check_key(key, n)
    return _registered.uniform(key, n)  # type: ignore[no-any-return]


def replay_sums(leaves: Tensor) -> Tensor:
    """Sums and smallest positive values of the leaves: what `replay_sample` searches and `replay_update` keeps.

    With B = ⌈N/1024⌉ blocks, row 0 holds sums and row 1 the minima over leaves > 0 (infinity where there are none) of
      1. 16·B pieces of 64 leaves,  2. B blocks of 1024,  3. all blocks up to and with this one.
    So [:, -1] is the sum of all leaves and the smallest positive one. Within rounding of fp64, the order of additions is free.

    Bytes:  reads the leaves once, writes 288 a block.

    Args:
      leaves: [N] fp32 or fp64, N >= 1; 0 where a row is never to be drawn.
    Returns:
      [2, 18·B] fp64.
    Raises:
      ValueError: shapes or dtypes that do not fit; on the CPU also a leaf that is negative or not finite. On a GPU, which is not
      asked, such a leaf makes the sums over it NaN, and with them every probability.
    """
    _check_leaves(leaves)
    return _registered.sums(leaves)  # type: ignore[no-any-return]


def replay_sample(
    leaves: Tensor, sums: Tensor, *, u: Tensor | None = None, key: Tensor | None = None, n: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws rows with replacement, row i with probability leaves[i] / Q, where Q is the sum of all leaves.

      1. t     = u · Q                                 u as given, or u = philox_uniform(key, n)
      2. index = the first i whose prefix sum leaves[0] + … + leaves[i] exceeds t; for t >= Q the last i with leaves[i] > 0

    Exact: prefix sums are fp64, u has 53 bits, and a leaf of 0 is never drawn. For the same u all backends and all devices draw the
    same rows: always where sums are exact (integers), otherwise up to a neighbour where t is within rounding of a boundary.

    Bytes:  a draw reads 64 leaves and 17 sums, and bisects the ends of the blocks.

    Args:
      leaves: [N] fp32 or fp64, not negative.
      sums:   `replay_sums(leaves)`, kept by `replay_update`.
      u:      [B] floating in [0, 1], or
      key, n: [2] int64 (seed, offset) on the device of `leaves`, and how many rows to draw.
    Returns:
      index [B] int64, probability [B] and least [], the smallest positive leaf, both in the dtype of `leaves`.
    Raises:
      ValueError: shapes or dtypes that do not fit, both u and key, or, on the CPU, no positive leaf (on a GPU: NaN probabilities).
    """
    _check_leaves(leaves)
    _check_sums(sums, leaves)
    if (u is None) == (key is None) or (key is None) != (n is None):
        raise ValueError("replay_sample draws either by u or by key and n; give one of them")
    if u is not None:
        if u.dim() != 1 or not u.is_floating_point():
            raise ValueError(f"u must be floating point [B], found {u.dtype} of shape {tuple(u.shape)}")
        return _registered.sample(leaves, sums, u, None, u.shape[0])  # type: ignore[no-any-return]
    assert key is not None and n is not None
    _check_key(key, n)
    return _registered.sample(leaves, sums, None, key, n)  # type: ignore[no-any-return]


def replay_update(leaves: Tensor, sums: Tensor, index: Tensor, value: Tensor, *, duplicates: str = "last") -> Tensor:
    """Writes leaves and recomputes, from the leaves, the sums over them: nothing drifts. Changes `leaves` and `sums` in place.

    Where a row comes more than once in `index`, its leaf becomes the "last" value given, the largest ("max") or the "mean".
    The same bits every time, whatever the number of threads.

    Bytes:  an entry writes one leaf and reads the leaves of its piece (CPU) or block (GPU) again; then the ends of the blocks.

    Args:
      leaves: [N] fp32 or fp64. sums: `replay_sums(leaves)`.
      index:  [k] int64 in 0..N-1.
      value:  [k] floating, not negative.
      duplicates: "last", "max" or "mean".
    Returns:
      [] int64: how many entries were refused, because the value is negative or not finite or the row is outside the leaves.
    Raises:
      ValueError: shapes or dtypes that do not fit, a value that requires a gradient; on the CPU also a refused entry, and then
      nothing is written. On a GPU, which is not asked, refused entries are left out and counted.
    """
    _check_leaves(leaves)
    _check_sums(sums, leaves)
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [k], found {index.dtype} of shape {tuple(index.shape)}")
    if value.shape != index.shape or not value.is_floating_point():
        raise ValueError(f"value must be floating point [{index.shape[0]}], found {value.dtype} of shape {tuple(value.shape)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError("value requires a gradient, which this op does not compute; pass value.detach()")
    if duplicates not in DUPLICATES:
        raise ValueError(f"unknown duplicates '{duplicates}'; expected one of {', '.join(DUPLICATES)}")
    return _registered.update(leaves, sums, index, value, duplicates)  # type: ignore[no-any-return]


def _check_leaves(leaves: Tensor) -> None:
    if leaves.dim() != 1 or leaves.dtype not in (torch.float32, torch.float64) or not leaves.is_contiguous() or leaves.numel() == 0:
        raise ValueError(f"leaves must be contiguous float32 or float64 [N], N >= 1, found {leaves.dtype} of shape {tuple(leaves.shape)}")
    if leaves.requires_grad:
        raise ValueError("leaves require a gradient, which this op does not compute; pass a tensor that does not")


def _check_sums(sums: Tensor, leaves: Tensor) -> None:
    expected = (2, size(leaves.numel()))
    if sums.shape != expected or sums.dtype != torch.float64 or not sums.is_contiguous():
        raise ValueError(f"sums must be contiguous float64 {expected}, from replay_sums; found {sums.dtype} of shape {tuple(sums.shape)}")


def _check_key(key: Tensor, n: int) -> None:
    if key.shape != (2,) or key.dtype != torch.int64:
        raise ValueError(f"key must be int64 [2], (seed, offset), found {key.dtype} of shape {tuple(key.shape)}")
    if n < 0:
        raise ValueError(f"n must be 0 or more, found {n}")
