"""The passes of BatchNorm with activation in C++ and CUDA: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._native import blank, dense, vector
from ..bn_match.native import sized

ACT = {"none": 0, "relu": 1, "relu6": 2, "leaky_relu": 3}


def _plane(x: Tensor) -> int:
    """Elements of a piece: on a GPU as many as its threads have under way at once."""
    return 8192 if x.is_cuda else 4096


def _optional(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if v is None else vector(v, dtype)


def fwd(
    x: Tensor, sums: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    """y, and stats [4, C]."""
    x, wide = dense(x), sums.dtype
    size, _ = sized(x, _plane(x))
    y, stats = blank(x), torch.empty((4, x.shape[1]), dtype=wide, device=x.device)
    tensors = (x, sums.contiguous(), vector(shift, wide), _optional(weight, wide), _optional(bias, wide), y, stats)
    _native.launch("bn_act_fwd", tensors, size, count, eps, ACT[act], slope, work=x)
    return y, stats


def bwd_sums(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, act: str, slope: float) -> Tensor:
    """[2, C]: gradients of bias and weight."""
    x = dense(x)
    size, groups = sized(x, _plane(x))
    partial = torch.empty((groups, 2, x.shape[1]), dtype=torch.float64, device=x.device)
    gsums = torch.empty((2, x.shape[1]), dtype=stats.dtype, device=x.device)
    tensors = (dense(gy.to(x.dtype), x), x, stats, _optional(bias, stats.dtype), partial, gsums, None)
    _native.launch("bn_act_bwd", tensors, size, 1, ACT[act], slope, work=x)
    return gsums


def bwd(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, gsums: Tensor, count: int, act: str, slope: float) -> Tensor:
    """dx in the layout of x."""
    x = dense(x)
    size, _ = sized(x, _plane(x))
    dx = blank(x)
    tensors = (dense(gy.to(x.dtype), x), x, stats, _optional(bias, stats.dtype), None, gsums.contiguous(), dx)
    _native.launch("bn_act_bwd", tensors, size, count, ACT[act], slope, work=x)
    return dx
