"""The BN-statistic ops in C++ and CUDA: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import NCHW, NHWC, blank, dense, vector

_ACT = {"none": 0, "relu": 1, "relu6": 2, "leaky_relu": 3}


def pieces(n: int, c: int, hw: int, layout: int, cuda: bool) -> tuple[int, int]:
    """How a sum over [n, c, hw] is cut: (number of pieces, images or rows a piece). Shape decides, never the thread count."""
    if n * c * hw == 0:
        return 0, 1
    if layout == NCHW:
        per = min(max(4096 // hw, 1), n)
        return -(-n // per), per
    rows = n * hw
    per = max(256, -(-rows // 512)) if cuda else 256
    return -(-rows // per), per


def _sizes(x: Tensor) -> tuple[Any, int]:
    """Sizes of a dense tensor, and the number of its pieces."""
    n, c = x.shape[:2]
    hw = x.numel() // max(n * c, 1) if n * c else 0
    layout = NHWC if hw == 1 or not x.is_contiguous() else NCHW
    groups, per = pieces(n, c, hw, layout, x.is_cuda)
    return _native.sizes(n, c, hw, groups, per, _native.DTYPE[x.dtype], layout), groups


def bn_fwd(
    x: Tensor, shift: Tensor, frozen: tuple[Tensor, Tensor] | None, residual: Tensor | None, act: str, slope: float
) -> tuple[Tensor | None, Tensor]:
    """(y or None, sums [2, C]); `frozen` is (scale, bias) where y is wanted."""
    x = dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    size, groups = _sizes(x)
    shift = vector(shift, wide)
    scale, bias = (vector(v, wide) for v in frozen) if frozen else (None, None)
    residual = None if residual is None else dense(residual, x)
    y = blank(x) if frozen else None
    sums = torch.empty((2, x.shape[1]), dtype=wide, device=x.device)
    partial = torch.empty((groups, 2, x.shape[1]), dtype=torch.float64, device=x.device)
    _native.launch("bn_fwd", (x, residual, scale, bias, shift, y, partial, sums), size, _ACT[act], slope, work=x)
    return y, sums


def bn_bwd(
    gy: Tensor | None,
    gsums: Tensor | None,
    x: Tensor,
    shift: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dresidual or None) in the layout of x."""
    x = dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    size, _ = _sizes(x)
    gsums = None if gsums is None else gsums.to(wide).contiguous()
    gy = None if gy is None else dense(gy.to(x.dtype), x)
    shift = vector(shift, wide)
    scale, bias = (vector(v, wide) for v in frozen) if frozen else (None, None)
    residual = None if residual is None else dense(residual, x)
    dx = blank(x)
    dresidual = None
    if want_residual:
        dresidual = torch.zeros_like(dx) if gy is None else gy.clone() if residual is None else blank(x)
    written = dresidual if gy is not None and residual is not None else None
    _native.launch("bn_bwd", (gy, gsums, x, residual, scale, bias, shift, dx, written), size, _ACT[act], slope, work=x)
    return dx, dresidual
