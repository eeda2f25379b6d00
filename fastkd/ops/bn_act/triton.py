"""Triton kernels of BatchNorm with batch statistics and activation; interpreted on CPU tensors for the tests.

The sums of backward are cut as those of `bn_match` are: a program writes the partial of a fixed piece, torch adds the partials.
Kernels load, cast to fp32, compute, cast on store. All address products are int64; grids use x only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from ..bn_match.native import pieces
from ..bn_match.triton import _activate, _masked
from .native import ACT

_BLOCK = 1024


@triton.jit
def _stats_kernel(
    sums_ptr, shift_ptr, weight_ptr, stats_ptr, c, count, eps,
    HAS_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ch = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = ch < c
    d = tl.load(sums_ptr + ch, mask=m, other=0.0) / count
    var = tl.load(sums_ptr + c + ch, mask=m, other=0.0) / count - d * d
    var = tl.where(var < 0.0, 0.0, var)  # below 0 is rounding; NaN stays
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = rstd
    if HAS_W:
        scale = rstd * tl.load(weight_ptr + ch, mask=m, other=0.0)
    tl.store(stats_ptr + ch, tl.load(shift_ptr + ch, mask=m, other=0.0) + d, mask=m)
    tl.store(stats_ptr + c + ch, var * (count / (count - 1.0)), mask=m)
    tl.store(stats_ptr + 2 * c + ch, rstd, mask=m)
    tl.store(stats_ptr + 3 * c + ch, scale, mask=m)


@triton.jit
def _fwd_kernel(
    x_ptr, stats_ptr, bias_ptr, y_ptr, total, c, hw, slope,
    ACT: tl.constexpr, HAS_B: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < total
    if LAST:
        ch = at % c
    else:
        ch = at // hw % c
    d = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32) - tl.load(stats_ptr + ch, mask=m, other=0.0)
    pre = d * tl.load(stats_ptr + 3 * c + ch, mask=m, other=0.0)
    if HAS_B:
        pre += tl.load(bias_ptr + ch, mask=m, other=0.0)
    tl.store(y_ptr + at, _activate(pre, ACT, slope).to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _bwd_kernel(
    gy_ptr, x_ptr, stats_ptr, bias_ptr, gsums_ptr, dx_ptr, total, c, hw, count, slope,
    ACT: tl.constexpr, HAS_B: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < total
    if LAST:
        ch = at % c
    else:
        ch = at // hw % c
    d = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32) - tl.load(stats_ptr + ch, mask=m, other=0.0)
    rstd = tl.load(stats_ptr + 2 * c + ch, mask=m, other=0.0)
    scale = tl.load(stats_ptr + 3 * c + ch, mask=m, other=0.0)
    pre = d * scale
    if HAS_B:
        pre += tl.load(bias_ptr + ch, mask=m, other=0.0)
    g = _masked(pre, tl.load(gy_ptr + at, mask=m, other=0.0).to(tl.float32), ACT, slope)
    back = tl.load(gsums_ptr + ch, mask=m, other=0.0) + rstd * d * tl.load(gsums_ptr + c + ch, mask=m, other=0.0)
    tl.store(dx_ptr + at, (scale * (g - back / count)).to(dx_ptr.dtype.element_ty), mask=m)


@triton.jit
def _bwd_sums_nchw_kernel(
    gy_ptr, x_ptr, stats_ptr, bias_ptr, partial_ptr, n, c, hw, per, slope,
    ACT: tl.constexpr, HAS_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    g, ch = program // c, program % c
    first = g * per
    count = tl.minimum(n - first, per) * hw  # elements of this piece
    mean, scale = tl.load(stats_ptr + ch), tl.load(stats_ptr + 3 * c + ch)
    t1 = tl.zeros([BLOCK], tl.float32)
    t2 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        e = start + tl.arange(0, BLOCK).to(tl.int64)
        m = e < count
        at = ((first + e // hw) * c + ch) * hw + e % hw
        d = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32) - mean
        pre = d * scale
        if HAS_B:
            pre += tl.load(bias_ptr + ch)
        grad = _masked(pre, tl.load(gy_ptr + at, mask=m, other=0.0).to(tl.float32), ACT, slope)  # 0 behind the end
        t1 += grad
        t2 += tl.where(m, grad * d, 0.0)
    tl.store(partial_ptr + 2 * g * c + ch, tl.sum(t1))
    tl.store(partial_ptr + (2 * g + 1) * c + ch, tl.sum(t2))


@triton.jit
def _bwd_sums_nhwc_kernel(
    gy_ptr, x_ptr, stats_ptr, bias_ptr, partial_ptr, rows, c, per, slope,
    ACT: tl.constexpr, HAS_B: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(c, COLS)
    g = program // blocks
    ch = program % blocks * COLS + tl.arange(0, COLS)
    m_c = ch < c
    mean = tl.load(stats_ptr + ch, mask=m_c, other=0.0)[None, :]
    scale = tl.load(stats_ptr + 3 * c + ch, mask=m_c, other=0.0)[None, :]
    if HAS_B:
        bias = tl.load(bias_ptr + ch, mask=m_c, other=0.0)[None, :]
    t1 = tl.zeros([ROWS, COLS], tl.float32)
    t2 = tl.zeros([ROWS, COLS], tl.float32)
    end = tl.minimum((g + 1) * per, rows)
    for start in range(g * per, end, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        m = (row < end)[:, None] & m_c[None, :]
        at = row[:, None] * c + ch[None, :]
        d = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32) - mean
        pre = d * scale
        if HAS_B:
            pre += bias
        grad = _masked(pre, tl.load(gy_ptr + at, mask=m, other=0.0).to(tl.float32), ACT, slope)  # 0 behind the end
        t1 += grad
        t2 += tl.where(m, grad * d, 0.0)
    tl.store(partial_ptr + 2 * g * c + ch, tl.sum(t1, 0), mask=m_c)
    tl.store(partial_ptr + (2 * g + 1) * c + ch, tl.sum(t2, 0), mask=m_c)


def _view(x: Tensor) -> tuple[int, int, int, bool]:
    """n, c, hw of a dense tensor, and whether channels come last in memory."""
    n, c = x.shape[:2]
    hw = x.numel() // (n * c)
    return n, c, hw, hw == 1 or not x.is_contiguous()


def fwd(
    x: Tensor, sums: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    """y, and stats [4, C]."""
    x = _native.dense(x)
    _n, c, hw, last = _view(x)
    y, stats = _native.blank(x), torch.empty((4, c), dtype=torch.float32, device=x.device)
    vectors = [stats if v is None else v.float().contiguous() for v in (sums, shift, weight, bias)]  # an unused one stands in
    with _native.on(x.device):
        _stats_kernel[(triton.cdiv(c, 128),)](*vectors[:3], stats, c, float(count), eps, HAS_W=weight is not None, BLOCK=128)
        _fwd_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x, stats, vectors[3], y, x.numel(), c, hw, slope, ACT=ACT[act], HAS_B=bias is not None, LAST=last, BLOCK=_BLOCK
        )
    return y, stats


def bwd_sums(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, act: str, slope: float) -> Tensor:
    """[2, C]: gradients of bias and weight."""
    x = _native.dense(x)
    n, c, hw, last = _view(x)
    gy = _native.dense(gy.to(x.dtype), x)
    groups, per = pieces(n, c, hw, int(last), True)
    partial = torch.empty((groups, 2, c), dtype=torch.float32, device=x.device)
    tensors = (gy, x, stats, stats if bias is None else bias.float().contiguous(), partial)  # an unused one stands in
    flags = {"ACT": ACT[act], "HAS_B": bias is not None}
    with _native.on(x.device):
        if last:
            cols = min(64, triton.next_power_of_2(c))
            grid = (groups * triton.cdiv(c, cols),)
            _bwd_sums_nhwc_kernel[grid](*tensors, n * hw, c, per, slope, ROWS=4096 // cols, COLS=cols, **flags)
        else:
            _bwd_sums_nchw_kernel[(groups * c,)](*tensors, n, c, hw, per, slope, BLOCK=_BLOCK, **flags)
    t1, t2 = partial.sum(0, dtype=torch.float64)
    return torch.stack([t1, t2 * stats[2]]).float()


def bwd(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, gsums: Tensor, count: int, act: str, slope: float) -> Tensor:
    """dx in the layout of x."""
    x = _native.dense(x)
    _n, c, hw, last = _view(x)
    gy, dx = _native.dense(gy.to(x.dtype), x), _native.blank(x)
    tensors = (gy, x, stats, stats if bias is None else bias.float().contiguous(), gsums.contiguous(), dx)
    with _native.on(x.device):
        _bwd_kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            *tensors, x.numel(), c, hw, float(count), slope, ACT=ACT[act], HAS_B=bias is not None, LAST=last, BLOCK=_BLOCK
        )
    return dx
