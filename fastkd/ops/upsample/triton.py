"""Triton kernels of the doubled activation; interpreted on CPU tensors for the tests.

A program takes a block of the small image's elements in memory order and writes each four times; backward reads four and writes one.
Kernels load, cast to fp32, compute, cast on store. All address products are int64; grids use x only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .native import channels_last, doubled, halved

_BLOCK = 1024


@triton.jit
def _place(at, c, h, w, LAST: tl.constexpr):
    """Channel of an element of the small image, the first of its four places in the large one, and the steps to the right and down."""
    if LAST:
        ch = at % c
        pixel = at // c
        top = ((pixel // w * 2) * (2 * w) + pixel % w * 2) * c + ch
        right = c
    else:
        ch = at // (h * w) % c
        top = at // w * 2 * (2 * w) + at % w * 2
        right = 1
    return ch, top, right, 2 * w * right


@triton.jit
def _fwd_kernel(
    x_ptr, scale_ptr, bias_ptr, y_ptr, total, c, h, w,
    TANH: tl.constexpr, HAS_S: tl.constexpr, HAS_B: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < total
    ch, top, right, down = _place(at, c, h, w, LAST)
    v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
    if HAS_S:
        v *= tl.load(scale_ptr + ch, mask=m, other=0.0)
    if HAS_B:
        v += tl.load(bias_ptr + ch, mask=m, other=0.0)
    if TANH:
        # Near 0 the sigmoid form cancels; there the series is exact to fp32.
        s = v * v
        near = v * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))))
        v = tl.where((v < 0.25) & (v > -0.25), near, 2.0 * tl.sigmoid(2.0 * v) - 1.0)
    else:
        v = tl.sigmoid(v)
    out = v.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + top, out, mask=m)
    tl.store(y_ptr + top + right, out, mask=m)
    tl.store(y_ptr + top + down, out, mask=m)
    tl.store(y_ptr + top + down + right, out, mask=m)


@triton.jit
def _bwd_kernel(
    gy_ptr, y_ptr, scale_ptr, dx_ptr, total, c, h, w,
    TANH: tl.constexpr, HAS_S: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < total
    ch, top, right, down = _place(at, c, h, w, LAST)
    g = tl.load(gy_ptr + top, mask=m, other=0.0).to(tl.float32)
    g += tl.load(gy_ptr + top + right, mask=m, other=0.0).to(tl.float32)
    g += tl.load(gy_ptr + top + down, mask=m, other=0.0).to(tl.float32)
    g += tl.load(gy_ptr + top + down + right, mask=m, other=0.0).to(tl.float32)
    v = tl.load(y_ptr + top, mask=m, other=0.0).to(tl.float32)
    if TANH:
        g *= 1.0 - v * v
    else:
        g *= v * (1.0 - v)
    if HAS_S:
        g *= tl.load(scale_ptr + ch, mask=m, other=0.0)
    tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=m)


def fwd(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    """y [N, C, 2H, 2W] in the layout of x."""
    y, x = doubled(x), _native.dense(x)
    if x.numel() == 0:
        return y
    _n, c, h, w = x.shape
    constants = [x if v is None else v.float().contiguous() for v in (scale, bias)]  # an unused one stands in
    with _native.on(x.device):
        _fwd_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, *constants, y, x.numel(), c, h, w,
            TANH=act == "tanh", HAS_S=scale is not None, HAS_B=bias is not None, LAST=channels_last(y), BLOCK=_BLOCK,
        )  # fmt: skip
    return y


def bwd(gy: Tensor, y: Tensor, scale: Tensor | None, act: str) -> Tensor:
    """dx [N, C, H, W] in the layout of y."""
    dx, y = halved(y), _native.dense(y)
    if dx.numel() == 0:
        return dx
    _n, c, h, w = dx.shape
    gy = _native.dense(gy.to(y.dtype), y)
    with _native.on(y.device):
        _bwd_kernel[(triton.cdiv(dx.numel(), _BLOCK),)](
            gy, y, y if scale is None else scale.float().contiguous(), dx, dx.numel(), c, h, w,
            TANH=act == "tanh", HAS_S=scale is not None, LAST=channels_last(y), BLOCK=_BLOCK,
        )  # fmt: skip
    return dx
