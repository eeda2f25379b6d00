"""The BN-statistic ops in C++ and CUDA: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._native import NCHW, NHWC, blank, dense, vector

_ACT = {"none": 0, "relu": 1, "relu6": 2, "leaky_relu": 3}
_KIND = {"l2": 0, "gauss_kl": 1}


def pieces(n: int, c: int, hw: int, layout: int, gpu: bool, plane: int = 4096) -> tuple[int, int]:
    """How a sum over [n, c, hw] is cut: (number of pieces, images or rows a piece). Shape decides, never the thread count.

    Args:
      gpu: for kernels of a GPU. plane: elements of a channel in a piece of NCHW, about.
    """
    if n * c * hw == 0:
        return 0, 1
    if layout == NCHW:
        per = min(max(plane // hw, 1), n)
        return -(-n // per), per
    rows = n * hw
    if gpu:
        per = max(256, -(-rows // max(512 // -(-c // 64), 1)))  # a block takes 64 channels; some 512 blocks
    else:
        per = max(256, min(65536 // c, rows // 64))  # of a quarter megabyte, where that leaves enough of them
    return -(-rows // per), per


def sized(x: Tensor, plane: int = 4096) -> tuple[Any, int]:
    """Sizes of a dense tensor, and the number of its pieces (`plane` as in `pieces`)."""
    n, c = x.shape[:2]
    hw = x.numel() // max(n * c, 1) if n * c else 0
    layout = NHWC if hw == 1 or not x.is_contiguous() else NCHW
    groups, per = pieces(n, c, hw, layout, x.is_cuda, plane)
    return _native.sizes(n, c, hw, groups, per, _native.DTYPE[x.dtype], layout), groups


def bn_fwd(
    x: Tensor, shift: Tensor, frozen: tuple[Tensor, Tensor] | None, residual: Tensor | None, act: str, slope: float
) -> tuple[Tensor | None, Tensor]:
    """(y or None, sums [2, C]); `frozen` is (scale, bias) where y is wanted."""
    x = dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    size, groups = sized(x)
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
    size, _ = sized(x)
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


@functools.lru_cache(maxsize=64)
def layer_offsets(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """The offsets on the device; made once for each teacher, as a copy from the host cannot be captured in a graph."""
    return torch.tensor(offsets, dtype=torch.int64, device=device)


def loss_fwd(
    stats: Tensor,
    target: Tensor,
    average: Tensor | None,
    calls: Tensor | None,
    offsets: list[int],
    momentum: float,
    first: float,
    kind: str,
) -> Tensor:
    """[] in the dtype of `stats`."""
    layers, terms = len(offsets) - 1, torch.empty(len(offsets) - 1, dtype=torch.float64, device=stats.device)
    out = torch.empty((), dtype=stats.dtype, device=stats.device)
    tensors = (*_loss_inputs(stats, target, average, calls, offsets), terms, out)
    _native.launch(
        "bn_loss_fwd", tensors, stats.shape[1], layers, _native.DTYPE[stats.dtype], _KIND[kind], momentum, first, work=stats
    )
    return out


def loss_bwd(
    grad: Tensor,
    stats: Tensor,
    target: Tensor,
    average: Tensor | None,
    calls: Tensor | None,
    offsets: list[int],
    momentum: float,
    first: float,
    kind: str,
) -> Tensor:
    """d loss / d stats, [2, C]."""
    layers, out = len(offsets) - 1, torch.empty(stats.shape, dtype=stats.dtype, device=stats.device)
    tensors = (*_loss_inputs(stats, target, average, calls, offsets), vector(grad, stats.dtype), out)
    _native.launch(
        "bn_loss_bwd", tensors, stats.shape[1], layers, _native.DTYPE[stats.dtype], _KIND[kind], momentum, first, work=stats
    )
    return out


def _loss_inputs(
    stats: Tensor, target: Tensor, average: Tensor | None, calls: Tensor | None, offsets: list[int]
) -> tuple[Tensor | None, ...]:
    average = None if average is None else vector(average, stats.dtype)
    calls = None if calls is None else vector(calls, torch.int64)
    return stats.contiguous(), vector(target, stats.dtype), average, calls, layer_offsets(tuple(offsets), stats.device)
