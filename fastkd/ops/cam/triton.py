"""Triton kernels of the class activation map: the path without a compiler on GPUs, and interpreted on CPU tensors for the tests.

Forward: a program takes an image from the features to the finished map; the small map waits in the memory of the slope. Backward:
a program a cell undoes the resize, then a program a block of channels writes weight (x) gradient. Kernels load, cast to fp32,
compute, cast on store. All address products are int64; grids use x only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .native import NORM, cells_first
from .reference import EPS


@triton.jit
def _row(label_ptr, b, classes, channels):
    """Offset of the head's row for image b; a label out of range is clamped."""
    return tl.minimum(tl.maximum(tl.load(label_ptr + b), 0), classes - 1).to(tl.int64) * channels


@triton.jit
def _tile(k, p, channels, cells, LAST: tl.constexpr):
    """Offsets inside an image of channels k (down) and cells p (across)."""
    if LAST:
        at = p.to(tl.int64)[None, :] * channels + k[:, None]
    else:
        at = k.to(tl.int64)[:, None] * cells + p[None, :]
    return at


@triton.jit
def _cut(v, RELU: tl.constexpr):
    # A comparison with NaN is false, so that it passes, as in torch.
    if RELU:
        v = tl.where(v <= 0.0, 0.0, v)
    return v


@triton.jit
def _extent(v, m, low, high, nan):
    """Smallest and largest value so far, and NaN where there was one, else 0: tl.min and tl.max may drop it."""
    low = tl.minimum(low, tl.min(tl.where(m, v, float("inf"))))
    high = tl.maximum(high, tl.max(tl.where(m, v, float("-inf"))))
    return low, high, nan + tl.sum(tl.where(m & (v != v), v, 0.0))


@triton.jit
def _range(low, high, nan, eps, NORM: tl.constexpr):
    """What `_scaled` subtracts and multiplies with, and whether a map has nothing to show."""
    low, high = low + nan, high + nan
    if NORM == 2:
        flat, rate = high <= 0.0, 1.0 / (high + eps)
    else:
        flat, rate = low == high, 1.0 / (high - low + eps)
    return low, rate, flat


@triton.jit
def _scaled(v, low, rate, flat, NORM: tl.constexpr):
    if NORM == 1:
        v = v - low
    if NORM != 0:
        v = tl.where(flat, 0.0, v * rate)
    return v


@triton.jit
def _tap(q, n, ratio):
    """Sources of value q along one axis of a bilinear resize: it is (1 - t) of the left and t of the right one."""
    at = tl.maximum(ratio * (q.to(tl.float32) + 0.5) - 0.5, 0.0)
    left = tl.minimum(at.to(tl.int32), n - 1)
    return left, tl.minimum(left + 1, n - 1), at - left.to(tl.float32)


@triton.jit
def _pixel(map_ptr, e, m, h, w, width, down, across, low, rate, flat, RELU: tl.constexpr, NORM: tl.constexpr):
    """Values e of the resized map."""
    top, bottom, t = _tap(e // width, h, down)
    left, right, u = _tap(e % width, w, across)
    a = _scaled(_cut(tl.load(map_ptr + top * w + left, mask=m, other=0.0), RELU), low, rate, flat, NORM)
    b = _scaled(_cut(tl.load(map_ptr + top * w + right, mask=m, other=0.0), RELU), low, rate, flat, NORM)
    c = _scaled(_cut(tl.load(map_ptr + bottom * w + left, mask=m, other=0.0), RELU), low, rate, flat, NORM)
    d = _scaled(_cut(tl.load(map_ptr + bottom * w + right, mask=m, other=0.0), RELU), low, rate, flat, NORM)
    return (1.0 - t) * ((1.0 - u) * a + u * b) + t * ((1.0 - u) * c + u * d)


@triton.jit
def _cam_fwd_kernel(
    x_ptr, w_ptr, label_ptr, out_ptr, slope_ptr, channels, cells, pixels, h, w, width, classes, down, across, eps,
    RELU: tl.constexpr, NORM: tl.constexpr, RESIZE: tl.constexpr, RENORM: tl.constexpr, LAST: tl.constexpr,
    CHANNELS: tl.constexpr, CELLS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    row = w_ptr + _row(label_ptr, image, classes, channels)
    x_ptr += image * channels * cells
    out_ptr += image * pixels
    slope_ptr += image * cells
    low, high, nan = float("inf"), float("-inf"), 0.0
    for start in range(0, cells, CELLS):
        p = start + tl.arange(0, CELLS)
        m = p < cells
        total = tl.zeros([CELLS], tl.float32)
        for first in range(0, channels, CHANNELS):
            k = first + tl.arange(0, CHANNELS)
            weight = tl.load(row + k, mask=k < channels, other=0.0).to(tl.float32)
            at = _tile(k, p, channels, cells, LAST)
            v = tl.load(x_ptr + at, mask=(k < channels)[:, None] & m[None, :], other=0.0).to(tl.float32)
            total += tl.sum(weight[:, None] * v, 0)
        tl.store(slope_ptr + p, total, mask=m)
        low, high, nan = _extent(_cut(total, RELU), m, low, high, nan)
    tl.debug_barrier()  # other threads read what was stored
    low, rate, flat = _range(low, high, nan, eps, NORM)
    slope = 1.0
    if NORM != 0:
        slope = tl.where(flat, 0.0, rate)
    if RESIZE:
        low2, high2, nan2 = float("inf"), float("-inf"), 0.0
        if RENORM:
            for start in range(0, pixels, PIXELS):
                e = start + tl.arange(0, PIXELS)
                m = e < pixels
                v = _pixel(slope_ptr, e, m, h, w, width, down, across, low, rate, flat, RELU, NORM)
                low2, high2, nan2 = _extent(v, m, low2, high2, nan2)
            low2, rate2, flat2 = _range(low2, high2, nan2, eps, NORM)
            slope = slope * tl.where(flat2, 0.0, rate2)
        for start in range(0, pixels, PIXELS):
            e = start + tl.arange(0, PIXELS)
            m = e < pixels
            v = _pixel(slope_ptr, e, m, h, w, width, down, across, low, rate, flat, RELU, NORM)
            if RENORM:
                v = _scaled(v, low2, rate2, flat2, NORM)
            tl.store(out_ptr + e, v, mask=m)
        tl.debug_barrier()  # the small map is not needed any more
    for start in range(0, cells, CELLS):
        p = start + tl.arange(0, CELLS)
        m = p < cells
        raw = tl.load(slope_ptr + p, mask=m, other=0.0)
        if not RESIZE:
            tl.store(out_ptr + p, _scaled(_cut(raw, RELU), low, rate, flat, NORM), mask=m)
        kept = raw == raw
        if RELU:
            kept = raw > 0.0
        tl.store(slope_ptr + p, tl.where(kept | (raw != raw), slope, 0.0), mask=m)


@triton.jit
def _share(q, i, n, ratio):
    """What value q of the resized axis takes from source i."""
    left, right, t = _tap(q, n, ratio)
    return tl.where(left == i, 1.0 - t, 0.0) + tl.where(right == i, t, 0.0)


@triton.jit
def _first(i, ratio):
    """The first value that may touch source i, or one before it."""
    return tl.maximum(((i.to(tl.float32) - 0.5) / ratio - 0.5).to(tl.int32) - 1, 0)


@triton.jit
def _cam_adjoint_kernel(
    g_ptr, slope_ptr, draw_ptr, cells, pixels, h, w, height, width, down, across, reach_h, reach_w,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cell = program % cells
    g_ptr += program // cells * pixels
    i, j = (cell // w).to(tl.int32), (cell % w).to(tl.int32)
    top, left = _first(i, down), _first(j, across)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, reach_h, ROWS):
        q = top + r + tl.arange(0, ROWS)
        for c in range(0, reach_w, COLS):
            p = left + c + tl.arange(0, COLS)
            share = _share(q, i, h, down)[:, None] * _share(p, j, w, across)[None, :]
            m = (q < height)[:, None] & (p < width)[None, :] & (share != 0.0)
            total += share * tl.load(g_ptr + q.to(tl.int64)[:, None] * width + p[None, :], mask=m, other=0.0)
    slope = tl.load(slope_ptr + program)
    tl.store(draw_ptr + program, tl.where(slope == 0.0, 0.0, slope * tl.sum(total)))


@triton.jit
def _cam_outer_kernel(
    draw_ptr, w_ptr, label_ptr, dx_ptr, channels, cells, classes, LAST: tl.constexpr, CHANNELS: tl.constexpr, CELLS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, CHANNELS)
    image = program // blocks
    k = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    m_k = k < channels
    weight = tl.load(w_ptr + _row(label_ptr, image, classes, channels) + k, mask=m_k, other=0.0).to(tl.float32)
    dx_ptr += image * channels * cells
    for start in range(0, cells, CELLS):
        p = start + tl.arange(0, CELLS)
        g = tl.load(draw_ptr + image * cells + p, mask=p < cells, other=0.0)
        v = weight[:, None] * g[None, :]
        tl.store(dx_ptr + _tile(k, p, channels, cells, LAST), v.to(dx_ptr.dtype.element_ty), mask=m_k[:, None] & (p < cells)[None, :])


def _blocks(channels: int, cells: int) -> dict[str, int]:
    """A tile of about 4096 elements."""
    across = min(64, triton.next_power_of_2(cells))
    return {"CHANNELS": min(4096 // across, triton.next_power_of_2(max(channels, 1))), "CELLS": across}


def cam_fwd(
    features: Tensor, weight: Tensor, labels: Tensor, relu: bool, norm: str, size: Sequence[int], renorm: bool
) -> tuple[Tensor, Tensor]:
    """(map [B, *size], slope [B, h, w])."""
    features, weight, labels = _native.dense(features), weight.contiguous(), labels.contiguous()
    batch, channels, h, w = features.shape
    height, width = size or (h, w)
    out = torch.empty((batch, height, width), dtype=torch.float32, device=features.device)
    slope = torch.empty((batch, h, w), dtype=torch.float32, device=features.device)
    if out.numel() * slope.numel() == 0:
        return out, slope
    with _native.on(features.device):
        _cam_fwd_kernel[(batch,)](
            features, weight, labels, out, slope, channels, h * w, height * width, h, w, width, weight.shape[0], h / height, w / width,
            EPS, RELU=relu, NORM=NORM[norm], RESIZE=bool(size), RENORM=renorm and norm != "none", LAST=not cells_first(features),
            PIXELS=1024, **_blocks(channels, h * w),
        )  # fmt: skip
    return out, slope


def cam_bwd(
    grad: Tensor, features: Tensor, weight: Tensor, labels: Tensor, slope: Tensor, resized: bool, want_features: bool
) -> tuple[Tensor, Tensor]:
    """(d features in their layout, or an empty tensor; d raw map [B, h, w])."""
    batch, channels, h, w = features.shape
    cells = h * w
    dfeatures = _native.blank(features) if want_features else features.new_empty(0)
    if slope.numel() * grad.numel() == 0:
        return dfeatures, torch.zeros_like(slope)
    grad, slope, weight, labels = grad.float().contiguous(), slope.contiguous(), weight.contiguous(), labels.contiguous()
    with _native.on(features.device):
        if resized:
            height, width = grad.shape[1:]
            reach = 2 * -(-height // h) + 4, 2 * -(-width // w) + 4  # values that a cell may touch along each axis
            draw = torch.empty_like(slope)
            _cam_adjoint_kernel[(batch * cells,)](
                grad, slope, draw, cells, height * width, h, w, height, width, h / height, w / width, *reach, ROWS=16, COLS=64
            )
        else:
            draw = torch.where(slope == 0, 0.0, slope * grad)
        if want_features and channels:
            blocks = _blocks(channels, cells)
            _cam_outer_kernel[(batch * triton.cdiv(channels, blocks["CHANNELS"]),)](
                draw, weight, labels, dfeatures, channels, cells, weight.shape[0], LAST=not cells_first(dfeatures), **blocks
            )
    return dfeatures, draw
