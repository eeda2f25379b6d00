"""Triton kernels of the BN-statistic ops: the path without a compiler on GPUs, and interpreted on CPU tensors for the tests.

A program works on tiles of rows and columns, so that no element needs a division to find its channel. Forward: it sums a fixed piece
of one channel (NCHW) or of a block of channels (NHWC) and writes its partial; a second kernel adds the partials in fp64, in a fixed
order. Kernels load, cast to fp32, compute, cast on store. All address products are int64; grids use x only.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .native import layer_offsets, pieces

_ACT = {"none": 0, "relu": 1, "relu6": 2, "leaky_relu": 3}
_TILE, _SUMS_TILE = 2048, 4096
"""Elements of a tile. Swept on an H200: where nothing is written, programs of channels_last tensors take twice as many at once."""
_LARGE, _PLANE, _LARGE_PLANE = 1 << 24, 4096, 12544
"""In NCHW a program sums so many elements of a channel, about; in a tensor of _LARGE elements, which fills a GPU anyway, more of them."""


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
    ACT: tl.constexpr, HAS_Y: tl.constexpr, HAS_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Rows are images, columns positions.
    program = tl.program_id(0).to(tl.int64)
    g, ch = program // c, program % c
    shift = tl.load(shift_ptr + ch)
    if HAS_Y:
        scale, bias = tl.load(scale_ptr + ch), tl.load(bias_ptr + ch)
    s1 = tl.zeros([ROWS, COLS], tl.float32)
    s2 = tl.zeros([ROWS, COLS], tl.float32)
    end = tl.minimum((g + 1) * per, n)
    for first in range(g * per, end, ROWS):
        image = first + tl.arange(0, ROWS).to(tl.int64)
        base = (image * c + ch) * hw
        for start in range(0, hw, COLS):
            col = start + tl.arange(0, COLS)
            m = (image < end)[:, None] & (col < hw)[None, :]
            at = base[:, None] + col[None, :]
            v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
            d = tl.where(m, v - shift, 0.0)
            s1 += d
            s2 += d * d
            if HAS_Y:
                pre = v * scale + bias
                if HAS_R:
                    pre += tl.load(r_ptr + at, mask=m, other=0.0).to(tl.float32)
                tl.store(y_ptr + at, _activate(pre, ACT, slope).to(y_ptr.dtype.element_ty), mask=m)
    tl.store(partial_ptr + 2 * g * c + ch, tl.sum(tl.sum(s1, 1), 0))
    tl.store(partial_ptr + (2 * g + 1) * c + ch, tl.sum(tl.sum(s2, 1), 0))


@triton.jit
def _bn_fwd_nhwc_kernel(
    x_ptr, r_ptr, scale_ptr, bias_ptr, shift_ptr, y_ptr, partial_ptr, rows, c, per, slope,
    ACT: tl.constexpr, HAS_Y: tl.constexpr, HAS_R: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Rows are positions of all images, columns channels.
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
def _bn_finish_kernel(partial_ptr, sums_ptr, groups, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float64)
    for start in range(0, groups, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        m = (row < groups)[:, None] & (col < columns)[None, :]
        total += tl.load(partial_ptr + row[:, None] * columns + col[None, :], mask=m, other=0.0).to(tl.float64)
    tl.store(sums_ptr + col, tl.sum(total, 0).to(tl.float32), mask=col < columns)


@triton.jit
def _bn_bwd_kernel(
    gy_ptr, gsums_ptr, x_ptr, r_ptr, scale_ptr, bias_ptr, shift_ptr, dx_ptr, dr_ptr, rows, cols, c, slope,
    ACT: tl.constexpr, HAS_G: tl.constexpr, HAS_S: tl.constexpr, HAS_R: tl.constexpr, HAS_DR: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # LAST: rows are positions, columns channels. Otherwise rows are the planes of all images, columns positions.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(cols, COLS)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    col = program % blocks * COLS + tl.arange(0, COLS)
    m_row, m_col = (row < rows)[:, None], (col < cols)[None, :]
    m = m_row & m_col
    at = row[:, None] * cols + col[None, :]
    if LAST:
        ch, m_ch = col[None, :], m_col
    else:
        ch, m_ch = (row % c)[:, None], m_row
    v = tl.load(x_ptr + at, mask=m, other=0.0).to(tl.float32)
    dx = tl.zeros([ROWS, COLS], tl.float32)
    if HAS_S:
        g1 = tl.load(gsums_ptr + ch, mask=m_ch, other=0.0)
        g2 = tl.load(gsums_ptr + c + ch, mask=m_ch, other=0.0)
        dx += g1 + 2.0 * g2 * (v - tl.load(shift_ptr + ch, mask=m_ch, other=0.0))
    if HAS_G:
        scale = tl.load(scale_ptr + ch, mask=m_ch, other=0.0)
        pre = v * scale + tl.load(bias_ptr + ch, mask=m_ch, other=0.0)
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


def _tile(cols: int, most: int, size: int = _TILE) -> dict[str, int]:
    """Rows and columns of a tile of a matrix with `cols` columns, at most `most` of them together."""
    width = min(most, triton.next_power_of_2(cols))
    return {"ROWS": size // width, "COLS": width}


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
    groups, per = pieces(n, c, hw, int(last), True, _LARGE_PLANE if x.numel() >= _LARGE else _PLANE)
    partial = torch.empty((groups, 2, c), dtype=torch.float32, device=x.device)
    sums = torch.empty((2, c), dtype=torch.float32, device=x.device)
    tensors = (x, x if residual is None else residual, scale, bias, shift, x if y is None else y, partial)  # unused ones stand in
    flags = {"ACT": _ACT[act], "HAS_Y": y is not None, "HAS_R": residual is not None}
    with _native.on(x.device):
        if last:
            tile = _tile(c, 64, _TILE if y is not None else _SUMS_TILE)
            _bn_fwd_nhwc_kernel[(groups * triton.cdiv(c, tile["COLS"]),)](*tensors, n * hw, c, per, slope, **tile, **flags)
        else:
            _bn_fwd_nchw_kernel[(groups * c,)](*tensors, n, c, hw, per, slope, **_tile(hw, 1024), **flags)
        rows = min(256, triton.next_power_of_2(groups))
        cols = max(8, min(64, 2048 // rows))
        _bn_finish_kernel[(triton.cdiv(2 * c, cols),)](partial, sums, groups, 2 * c, ROWS=rows, COLS=cols)
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
    x = _native.dense(x)
    dx = _native.blank(x)
    gy = None if frozen is None else gy
    dresidual = None if not want_residual else torch.zeros_like(dx) if gy is None else _native.blank(x)
    if x.numel() == 0:
        return dx, dresidual
    n, c, hw, last = _view(x)
    rows, cols = (n * hw, c) if last else (n * c, hw)
    gsums = None if gsums is None else gsums.float().contiguous()
    shift = shift.float().contiguous()
    scale, bias = (v.float().contiguous() for v in frozen) if frozen else (shift, shift)
    gy = None if gy is None else _native.dense(gy.to(x.dtype), x)
    residual = None if residual is None else _native.dense(residual, x)
    tile = _tile(cols, 64 if last else 1024)
    grid = (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(cols, tile["COLS"]),)
    with _native.on(x.device):
        _bn_bwd_kernel[grid](
            x if gy is None else gy, shift if gsums is None else gsums, x, x if residual is None else residual, scale, bias, shift, dx,
            dx if dresidual is None else dresidual, rows, cols, c, slope,
            ACT=_ACT[act], HAS_G=gy is not None, HAS_S=gsums is not None, HAS_R=residual is not None,
            HAS_DR=dresidual is not None, LAST=last, **tile,
        )  # fmt: skip
    return dx, dresidual


# Every layer of a teacher in one program: a tile is a few layers by some of their channels. ----------------------------------


@triton.jit
def _blended(stats_ptr, average_ptr, calls_ptr, at, m, momentum, BLEND: tl.constexpr, CALLS: tl.constexpr):
    v = tl.load(stats_ptr + at, mask=m, other=0.0)
    if BLEND:
        mixed = v * (1.0 - momentum) + tl.load(average_ptr + at, mask=m, other=0.0) * momentum
        if CALLS:
            v = tl.where(tl.load(calls_ptr) > 0, mixed, v)
        else:
            v = mixed
    return v


@triton.jit
def _bn_loss_fwd_kernel(
    stats_ptr, target_ptr, average_ptr, calls_ptr, offsets_ptr, out_ptr, c, layers, width, momentum, first,
    KL: tl.constexpr, BLEND: tl.constexpr, CALLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, layers, ROWS):
        layer = start + tl.arange(0, ROWS)
        begin = tl.load(offsets_ptr + layer, mask=layer < layers, other=0)
        end = tl.load(offsets_ptr + layer + 1, mask=layer < layers, other=0)
        a = tl.zeros([ROWS, COLS], tl.float32)
        b = tl.zeros([ROWS, COLS], tl.float32)
        for column in range(0, width, COLS):
            at = begin[:, None] + column + tl.arange(0, COLS)[None, :]
            m = at < end[:, None]
            run = tl.load(target_ptr + c + at, mask=m, other=0.0)
            d = _blended(stats_ptr, average_ptr, calls_ptr, at, m, momentum, BLEND, CALLS) - tl.load(target_ptr + at, mask=m, other=0.0)
            var = _blended(stats_ptr, average_ptr, calls_ptr, c + at, m, momentum, BLEND, CALLS)
            if KL:
                var, run = tl.where(var < 1e-8, 1e-8, var), tl.where(run < 1e-8, 1e-8, run)
                a += tl.where(m, (d * d + var) / (2.0 * run) - 0.5 * tl.log(var / run) - 0.5, 0.0)
            else:
                a += d * d
                b += (var - run) * (var - run)
        weight = tl.where(layer == 0, first, 1.0)
        if KL:
            total += weight * tl.sum(a, 1)
        else:
            total += weight * (tl.sqrt_rn(tl.sum(a, 1)) + tl.sqrt_rn(tl.sum(b, 1)))
    tl.store(out_ptr, tl.sum(total, 0))


@triton.jit
def _bn_loss_bwd_kernel(
    grad_ptr, stats_ptr, target_ptr, average_ptr, calls_ptr, offsets_ptr, out_ptr, c, momentum, first,
    KL: tl.constexpr, BLEND: tl.constexpr, CALLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    begin, end = tl.load(offsets_ptr + layer), tl.load(offsets_ptr + layer + 1)
    by = tl.load(grad_ptr) * tl.where(layer == 0, first, 1.0)
    if BLEND:
        if CALLS:
            by *= tl.where(tl.load(calls_ptr) > 0, 1.0 - momentum, 1.0)
        else:
            by *= 1.0 - momentum
    mean_by, var_by = by, by
    if not KL:  # d |v| = v / |v|; a zero norm has gradient zero
        a = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            m = at < end
            d = _blended(stats_ptr, average_ptr, calls_ptr, at, m, momentum, BLEND, CALLS) - tl.load(target_ptr + at, mask=m, other=0.0)
            e = _blended(stats_ptr, average_ptr, calls_ptr, c + at, m, momentum, BLEND, CALLS)
            e -= tl.load(target_ptr + c + at, mask=m, other=0.0)
            a += d * d
            b += e * e
        mean_norm, var_norm = tl.sqrt_rn(tl.sum(a, 0)), tl.sqrt_rn(tl.sum(b, 0))
        mean_by = tl.where(mean_norm == 0.0, 0.0, by / tl.where(mean_norm == 0.0, 1.0, mean_norm))
        var_by = tl.where(var_norm == 0.0, 0.0, by / tl.where(var_norm == 0.0, 1.0, var_norm))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        m = at < end
        d = _blended(stats_ptr, average_ptr, calls_ptr, at, m, momentum, BLEND, CALLS) - tl.load(target_ptr + at, mask=m, other=0.0)
        var = _blended(stats_ptr, average_ptr, calls_ptr, c + at, m, momentum, BLEND, CALLS)
        run = tl.load(target_ptr + c + at, mask=m, other=1.0)
        if KL:
            run = tl.where(run < 1e-8, 1e-8, run)
            tl.store(out_ptr + at, by * d / run, mask=m)
            slope = 0.5 / run - 0.5 / tl.where(var < 1e-8, 1.0, var)
            tl.store(out_ptr + c + at, tl.where(var >= 1e-8, by * slope, 0.0), mask=m)
        else:
            tl.store(out_ptr + at, d * mean_by, mask=m)
            tl.store(out_ptr + c + at, (var - run) * var_by, mask=m)


def _loss_arguments(
    stats: Tensor, target: Tensor, average: Tensor | None, calls: Tensor | None, offsets: list[int], kind: str
) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """Pointers of both kernels, and what is compiled into them; unused pointers stand in."""
    at = layer_offsets(tuple(offsets), stats.device)
    stats, target = stats.contiguous(), target.float().contiguous()
    flags = {"KL": kind != "l2", "BLEND": average is not None, "CALLS": calls is not None}
    return (stats, target, stats if average is None else average.float().contiguous(), at if calls is None else calls, at), flags


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
    tensors, flags = _loss_arguments(stats, target, average, calls, offsets, kind)
    out = torch.empty((), dtype=stats.dtype, device=stats.device)
    layers = len(offsets) - 1
    width = max((b - a for a, b in itertools.pairwise(offsets)), default=0)
    with _native.on(stats.device):
        _bn_loss_fwd_kernel[(1,)](
            *tensors, out, stats.shape[1], layers, width, momentum, first, **flags, ROWS=32, COLS=128, num_warps=16
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
    tensors, flags = _loss_arguments(stats, target, average, calls, offsets, kind)
    out = torch.empty(stats.shape, dtype=stats.dtype, device=stats.device)
    if out.numel():
        with _native.on(stats.device):
            _bn_loss_bwd_kernel[(len(offsets) - 1,)](
                grad.to(stats.dtype), *tensors, out, stats.shape[1], momentum, first, **flags, BLOCK=256
            )
    return out
