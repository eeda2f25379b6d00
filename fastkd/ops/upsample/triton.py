"""Triton kernels of the doubled activation; interpreted on CPU tensors for the tests.

A program takes a block of one plane of the small image in memory order (NCHW: a channel of an image; channels_last: an image) and
writes each element four times; backward reads four and writes one. Places within a plane of less than 2^31 elements are 32 bits wide,
and the sizes are constants of the program, so that no number of 64 bits is divided and none by an unknown one. In NCHW both copies of
a row leave in one wide store. Kernels load, cast to fp32, compute, cast on store. The address of a plane is int64; grids use x only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .native import channels_last, doubled, halved

_PLANE = {"BLOCK": 1024, "TIMES": 1, "num_warps": 4}
_IMAGE = {"BLOCK": 128, "TIMES": 4, "num_warps": 4}
"""How much a program takes of a plane in NCHW, and of an image in channels_last: there a block is an element a thread, since
neighbouring threads must write neighbouring pixels, and a program takes several. With a multiple of four channels a thread's own
elements lie side by side, as in a plane."""


@triton.jit
def _activated(v, TANH: tl.constexpr):
    if TANH:
        # Near 0 the sigmoid form cancels; there the series is exact to fp32.
        s = v * v
        near = v * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488))))
        v = tl.where((v < 0.25) & (v > -0.25), near, 2.0 * tl.sigmoid(2.0 * v) - 1.0)
    else:
        v = tl.sigmoid(v)
    return v


@triton.jit
def _fwd_kernel(
    x_ptr, scale_ptr, bias_ptr, y_ptr, blocks, channels,
    TANH: tl.constexpr, HAS_S: tl.constexpr, HAS_B: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if WIDE:
        block = block.to(tl.int64)
    x_ptr += plane.to(tl.int64) * (H * W * C)
    y_ptr += plane.to(tl.int64) * (4 * H * W * C)
    for time in tl.static_range(TIMES):
        at = (block * TIMES + time) * BLOCK + tl.arange(0, BLOCK)
        m = at < H * W * C
        v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
        ch = at % C if C > 1 else plane % channels
        if HAS_S:
            v *= tl.load(scale_ptr + ch)
        if HAS_B:
            v += tl.load(bias_ptr + ch)
        out = _activated(v, TANH).to(y_ptr.dtype.element_ty)
        if C > 1:
            top = at // (W * C) * (4 * W * C) + at // C % W * (2 * C) + ch
            tl.store(y_ptr + top, out, mask=m)
            tl.store(y_ptr + top + C, out, mask=m)
            tl.store(y_ptr + top + 2 * W * C, out, mask=m)
            tl.store(y_ptr + top + 2 * W * C + C, out, mask=m)
        else:
            wide = (block * TIMES + time) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
            top = wide // (2 * W) * (4 * W) + wide % (2 * W)
            pairs = tl.interleave(out, out)
            tl.store(y_ptr + top, pairs, mask=wide < 2 * H * W)
            tl.store(y_ptr + top + 2 * W, pairs, mask=wide < 2 * H * W)


@triton.jit
def _bwd_kernel(
    gy_ptr, y_ptr, scale_ptr, dx_ptr, blocks, channels,
    TANH: tl.constexpr, HAS_S: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    plane, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if WIDE:
        block = block.to(tl.int64)
    y_ptr += plane.to(tl.int64) * (4 * H * W * C)
    gy_ptr += plane.to(tl.int64) * (4 * H * W * C)
    dx_ptr += plane.to(tl.int64) * (H * W * C)
    for time in tl.static_range(TIMES):
        at = (block * TIMES + time) * BLOCK + tl.arange(0, BLOCK)
        m = at < H * W * C
        ch = at % C if C > 1 else plane % channels
        if C > 1:
            top = at // (W * C) * (4 * W * C) + at // C % W * (2 * C) + ch
            g = tl.load(gy_ptr + top, mask=m, other=0.0).to(tl.float32)
            g += tl.load(gy_ptr + top + C, mask=m, other=0.0).to(tl.float32)
            low = tl.load(gy_ptr + top + 2 * W * C, mask=m, other=0.0).to(tl.float32)
            g += low + tl.load(gy_ptr + top + 2 * W * C + C, mask=m, other=0.0).to(tl.float32)
            v = tl.load(y_ptr + top, mask=m, other=0.0).to(tl.float32)
        else:
            wide = (block * TIMES + time) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
            top, inside = wide // (2 * W) * (4 * W) + wide % (2 * W), wide < 2 * H * W
            left, right = tl.split(tl.reshape(tl.load(gy_ptr + top, mask=inside, other=0.0).to(tl.float32), [BLOCK, 2]))
            below, last = tl.split(tl.reshape(tl.load(gy_ptr + top + 2 * W, mask=inside, other=0.0).to(tl.float32), [BLOCK, 2]))
            g = left + right + (below + last)
            v, _ = tl.split(tl.reshape(tl.load(y_ptr + top, mask=inside, other=0.0).to(tl.float32), [BLOCK, 2]))
        if TANH:
            g *= 1.0 - v * v
        else:
            g *= v * (1.0 - v)
        if HAS_S:
            g *= tl.load(scale_ptr + ch)
        tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=m)


def _plan(small: Tensor, large: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and what the kernels are told of the sizes: each size of an image is compiled once."""
    n, c, h, w = small.shape
    inner = c if channels_last(large) else 1
    planes, elements, part = (n, c * h * w, _IMAGE if c % 4 else _PLANE) if inner > 1 else (n * c, h * w, _PLANE)
    block = min(part["BLOCK"], triton.next_power_of_2(elements))
    blocks = triton.cdiv(elements, block * part["TIMES"])
    wide = 4 * (elements + block * part["TIMES"]) >= 2**31
    own = {"blocks": blocks, "channels": c, "C": inner, "H": h, "W": w, "BLOCK": block, "WIDE": wide}
    return (planes * blocks,), {**part, **own, "num_warps": max(1, min(part["num_warps"], block // 32))}


def fwd(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    """y [N, C, 2H, 2W] in the layout of x."""
    y, x = doubled(x), _native.dense(x)
    if x.numel() == 0:
        return y
    constants = [x if v is None else v.float().contiguous() for v in (scale, bias)]  # an unused one stands in
    grid, sizes = _plan(x, y)
    with _native.on(x.device):
        _fwd_kernel[grid](x, *constants, y, TANH=act == "tanh", HAS_S=scale is not None, HAS_B=bias is not None, **sizes)
    return y


def bwd(gy: Tensor, y: Tensor, scale: Tensor | None, act: str) -> Tensor:
    """dx [N, C, H, W] in the layout of y."""
    dx, y = halved(y), _native.dense(y)
    if dx.numel() == 0:
        return dx
    gy = _native.dense(gy.to(y.dtype), y)
    factor = y if scale is None else scale.float().contiguous()
    grid, sizes = _plan(dx, y)
    with _native.on(y.device):
        _bwd_kernel[grid](gy, y, factor, dx, TANH=act == "tanh", HAS_S=scale is not None, **sizes)
    return dx
