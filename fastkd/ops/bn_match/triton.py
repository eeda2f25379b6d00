"""Triton kernels of the BN-statistic ops: the path without a compiler on GPUs, and interpreted on CPU tensors for the tests.

Forward: a program sums a fixed piece of one channel (NCHW) or of a block of channels (NHWC) and writes its partial; torch adds
the partials. Kernels load, cast to fp32, compute, cast on store. All address products are int64; grids use x only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .native import pieces

_ACT = {"none": 0, "relu": 1, "relu6": 2, "leaky_relu": 3}


@triton.jit
def _activate(v, ACT: tl.constexpr, slope):
    # Comparisons with NaN are false, so that it passes, as in torch.
    if ACT == 1:
        v = tl.where(v <= 0.0, 0.0, v)
    if ACT == 2:
        v = tl.where(v <= 0.0, 0.0, tl.where(v >= 6.0, 6.0, v))
    if ACT == 3:
        v = tl.where(v > 0.0, v, v * slope)
    return v


@triton.jit
def _masked(v, g, ACT: tl.constexpr, slope):
    if ACT == 1:
        g = tl.where(v <= 0.0, 0.0, g)
    if ACT == 2:
        g = tl.where((v <= 0.0) | (v >= 6.0), 0.0, g)
    if ACT == 3:
        g = tl.where(v > 0.0, g, g * slope)
    return g


@triton.jit
def _bn_fwd_nchw_kernel(
    x_ptr, r_ptr, scale_ptr, bias_ptr, shift_ptr, y_ptr, partial_ptr, n, c, hw, per, slope,
    ACT: tl.constexpr, HAS_Y: tl.constexpr, HAS_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    g, ch = program // c, program % c
    first = g * per
    count = tl.minimum(n - first, per) * hw  # elements of this piece
    shift = tl.load(shift_ptr + ch)
    if HAS_Y:
        scale, bias = tl.load(scale_ptr + ch), tl.load(bias_ptr + ch)
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        e = start + tl.arange(0, BLOCK).to(tl.int64)
        m = e < count
        at = ((first + e // hw) * c + ch) * hw + e % hw
        v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
        d = tl.where(m, v - shift, 0.0)
        s1 += d
        s2 += d * d
        if HAS_Y:
            pre = v * scale + bias
            if HAS_R:
                pre += tl.load(r_ptr + at, mask=m, other=0.0).to(tl.float32)
            tl.store(y_ptr + at, _activate(pre, ACT, slope).to(y_ptr.dtype.element_ty), mask=m)
    tl.store(partial_ptr + 2 * g * c + ch, tl.sum(s1))
    tl.store(partial_ptr + (2 * g + 1) * c + ch, tl.sum(s2))


@triton.jit
def _bn_fwd_nhwc_kernel(
    x_ptr, r_ptr, scale_ptr, bias_ptr, shift_ptr, y_ptr, partial_ptr, rows, c, per, slope,
    ACT: tl.constexpr, HAS_Y: tl.constexpr, HAS_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(c, COLS)
    g = program // blocks
    ch = program % blocks * COLS + tl.arange(0, COLS)
    m_c = ch < c
    shift = tl.load(shift_ptr + ch, mask=m_c, other=0.0)[None, :]
    if HAS_Y:
        scale = tl.load(scale_ptr + ch, mask=m_c, other=0.0)[None, :]
        bias = tl.load(bias_ptr + ch, mask=m_c, other=0.0)[None, :]
    s1 = tl.zeros([ROWS, COLS], tl.float32)
    s2 = tl.zeros([ROWS, COLS], tl.float32)
    end = tl.minimum((g + 1) * per, rows)
    for start in range(g * per, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        m = (row < end)[:, None] & m_c[None, :]
        at = row[:, None] * c + ch[None, :]
        v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
        d = tl.where(m, v - shift, 0.0)
        s1 += d
        s2 += d * d
        if HAS_Y:
            pre = v * scale + bias
            if HAS_R:
                pre += tl.load(r_ptr + at, mask=m, other=0.0).to(tl.float32)
            tl.store(y_ptr + at, _activate(pre, ACT, slope).to(y_ptr.dtype.element_ty), mask=m)
    tl.store(partial_ptr + 2 * g * c + ch, tl.sum(s1, 0), mask=m_c)
    tl.store(partial_ptr + (2 * g + 1) * c + ch, tl.sum(s2, 0), mask=m_c)


@triton.jit
def _bn_bwd_kernel(
    gy_ptr, gsums_ptr, x_ptr, r_ptr, scale_ptr, bias_ptr, shift_ptr, dx_ptr, dr_ptr, total, c, hw, slope,
    ACT: tl.constexpr, HAS_G: tl.constexpr, HAS_S: tl.constexpr, HAS_R: tl.constexpr, HAS_DR: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < total
    if LAST:
        ch = at % c
    else:
        ch = at // hw % c
    v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
    dx = tl.zeros([BLOCK], tl.float32)
    if HAS_S:
        g1 = tl.load(gsums_ptr + ch, mask=m, other=0.0)
        g2 = tl.load(gsums_ptr + c + ch, mask=m, other=0.0)
        dx += g1 + 2.0 * g2 * (v - tl.load(shift_ptr + ch, mask=m, other=0.0))
    if HAS_G:
        scale = tl.load(scale_ptr + ch, mask=m, other=0.0)
        pre = v * scale + tl.load(bias_ptr + ch, mask=m, other=0.0)
        if HAS_R:
            pre += tl.load(r_ptr + at, mask=m, other=0.0).to(tl.float32)
        g = _masked(pre, tl.load(gy_ptr + at, mask=m, other=0.0).to(tl.float32), ACT, slope)
        dx += g * scale
        if HAS_DR:
            tl.store(dr_ptr + at, g.to(dr_ptr.dtype.element_ty), mask=m)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=m)


def _view(x: Tensor) -> tuple[int, int, int, bool]:
    """n, c, hw of a dense tensor, and whether channels come last in memory."""
    n, c = x.shape[:2]
    hw = x.numel() // (n * c)
    return n, c, hw, hw == 1 or not x.is_contiguous()


def bn_fwd(
    x: Tensor, shift: Tensor, frozen: tuple[Tensor, Tensor] | None, residual: Tensor | None, act: str, slope: float
) -> tuple[Tensor | None, Tensor]:
    """(y or None, sums [2, C]); `frozen` is (scale, bias) where y is wanted."""
    x = _native.dense(x)
    y = _native.blank(x) if frozen else None
    if x.numel() == 0:
        return y, torch.zeros((2, x.shape[1]), dtype=torch.float32, device=x.device)
    n, c, hw, last = _view(x)
    shift = shift.float().contiguous()
    scale, bias = (v.float().contiguous() for v in frozen) if frozen else (shift, shift)
    residual = None if residual is None else _native.dense(residual, x)
    groups, per = pieces(n, c, hw, int(last), True)
    partial = torch.empty((groups, 2, c), dtype=torch.float32, device=x.device)
    tensors = (x, x if residual is None else residual, scale, bias, shift, x if y is None else y, partial)  # unused ones stand in
    flags = {"ACT": _ACT[act], "HAS_Y": y is not None, "HAS_R": residual is not None}
    with _native.on(x.device):
        if last:
            cols = min(64, triton.next_power_of_2(c))
            _bn_fwd_nhwc_kernel[(groups * triton.cdiv(c, cols),)](*tensors, n * hw, c, per, slope, ROWS=4096 // cols, COLS=cols, **flags)
        else:
            _bn_fwd_nchw_kernel[(groups * c,)](*tensors, n, c, hw, per, slope, BLOCK=1024, **flags)
    return y, partial.sum(0, dtype=torch.float64).float()


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
    x = _native.dense(x)
    dx = _native.blank(x)
    dresidual = torch.zeros_like(dx) if want_residual else None
    if x.numel() == 0:
        return dx, dresidual
    _n, c, hw, last = _view(x)
    gsums = None if gsums is None else gsums.float().contiguous()
    shift = shift.float().contiguous()
    scale, bias = (v.float().contiguous() for v in frozen) if frozen else (shift, shift)
    gy = None if gy is None or frozen is None else _native.dense(gy.to(x.dtype), x)
    residual = None if residual is None else _native.dense(residual, x)
    block = 1024
    with _native.on(x.device):
        _bn_bwd_kernel[(triton.cdiv(x.numel(), block),)](
            x if gy is None else gy, shift if gsums is None else gsums, x, x if residual is None else residual, scale, bias, shift, dx,
            dx if dresidual is None else dresidual, x.numel(), c, hw, slope,
            ACT=_ACT[act], HAS_G=gy is not None, HAS_S=gsums is not None, HAS_R=residual is not None, HAS_DR=dresidual is not None,
            LAST=last, BLOCK=block,
        )  # fmt: skip
    return dx, dresidual
