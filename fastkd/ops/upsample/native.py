"""The doubled activation in C++: what the compiled part gets, and what is allocated for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._native import DTYPE, NCHW, NHWC, dense, vector

_ACT = {"tanh": 0, "sigmoid": 1}


def doubled(x: Tensor) -> Tensor:
    """An uninitialised tensor twice as high and wide, in the layout of `dense(x)`."""
    n, c, h, w = x.shape
    return torch.empty((n, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=_native.memory_format(x))


def halved(y: Tensor) -> Tensor:
    """An uninitialised tensor half as high and wide, in the layout of `dense(y)`."""
    n, c, h, w = y.shape
    return torch.empty((n, c, h // 2, w // 2), dtype=y.dtype, device=y.device, memory_format=_native.memory_format(y))


def channels_last(large: Tensor) -> bool:
    """The layout of both images. Asked of the large one: of 1x1 pixels it cannot be told."""
    return large.shape[1] > 1 and not large.is_contiguous()


def _sizes(small: Tensor, large: Tensor) -> tuple[int, ...]:
    """n, c, h, w of the small image, dtype, layout."""
    return *small.shape, DTYPE[small.dtype], NHWC if channels_last(large) else NCHW


def _constant(v: Tensor | None, x: Tensor) -> Tensor | None:
    return None if v is None else vector(v, torch.promote_types(x.dtype, torch.float32))


def fwd(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    """y [N, C, 2H, 2W] in the layout of x."""
    y, x = doubled(x), dense(x)
    _native.launch("upsample_act_fwd", (x, _constant(scale, x), _constant(bias, x), y), *_sizes(x, y), _ACT[act], work=y)
    return y


def bwd(gy: Tensor, y: Tensor, scale: Tensor | None, act: str) -> Tensor:
    """dx [N, C, H, W] in the layout of y."""
    dx, y = halved(y), dense(y)
    _native.launch("upsample_act_bwd", (dense(gy.to(y.dtype), y), y, _constant(scale, y), dx), *_sizes(dx, y), _ACT[act], work=y)
    return dx
