"""Triton kernels of prioritised sampling: the path without a compiler on GPUs, and interpreted on CPU tensors for the tests.

A sample is one launch, a few draws a program. An update is three: entries settle which of those with the same row writes (each looks
at all entries), a program recomputes each touched block of leaves, and one program adds up the ends. No float atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .reference import BLOCK, PIECE, size

REFUSES_ALL = False
"""As in native.py: here what is refused is left out, and the rest is written."""
_DUPLICATES = {"last": 0, "max": 1, "mean": 2}


@triton.jit
def _philox_uniform(seed, at):
    mask = 0xFFFFFFFF
    key, counter = seed.to(tl.uint64), at.to(tl.uint64)
    a, b = counter & mask, counter >> 32
    c, d = a ^ a, a ^ a
    k, m = key & mask, key >> 32
    for _ in tl.static_range(10):
        low, high = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (high >> 32) ^ b ^ k, high & mask, (low >> 32) ^ d ^ m, low & mask
        k, m = (k + 0x9E3779B9) & mask, (m + 0xBB67AE85) & mask
    return ((a << 21) | (b >> 11)).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _uniform_kernel(key_ptr, out_ptr, n, BLOCK_N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    u = _philox_uniform(tl.load(key_ptr), tl.load(key_ptr + 1) + i)
    tl.store(out_ptr + i, u, mask=i < n)


@triton.jit
def _is_priority(v):
    return (v >= 0.0) & (v < float("inf"))


@triton.jit
def _block_kernel(leaves_ptr, sums_ptr, index_ptr, n, blocks, HAS_INDEX: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    inside = b < blocks
    if HAS_INDEX:
        row = tl.load(index_ptr + b)
        inside = (row >= 0) & (row < n)
        b = tl.where(inside, row // (PIECES * WIDTH), 0)
    pieces = b * PIECES + tl.arange(0, PIECES)
    at = pieces[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    q = tl.load(leaves_ptr + at, mask=at < n, other=0.0).to(tl.float64)
    v = tl.where(_is_priority(q), q, float("nan"))
    sums, lows = tl.sum(v, 1), tl.min(tl.where(v > 0.0, v, float("inf")), 1)
    low_ptr = sums_ptr + blocks * (PIECES + 2)
    m = inside & (pieces >= 0)
    tl.store(sums_ptr + pieces, sums, mask=m)
    tl.store(low_ptr + pieces, lows, mask=m)
    tl.store(sums_ptr + blocks * PIECES + b, tl.sum(sums, 0), mask=inside)
    tl.store(low_ptr + blocks * PIECES + b, tl.min(lows, 0), mask=inside)


@triton.jit
def _less(a, b):
    return tl.where(b < a, b, a)


@triton.jit
def _ends_kernel(sums_ptr, blocks, PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    low_ptr = sums_ptr + blocks * (PIECES + 2)
    i = tl.arange(0, BLOCK_N)
    sum_ = tl.zeros([1], tl.float64)
    low = tl.full([1], float("inf"), tl.float64)
    for start in range(0, blocks, BLOCK_N):
        b = start + i.to(tl.int64)
        m = b < blocks
        ends = sum_ + tl.cumsum(tl.load(sums_ptr + blocks * PIECES + b, mask=m, other=0.0), 0)
        lows = tl.associative_scan(tl.load(low_ptr + blocks * PIECES + b, mask=m, other=float("inf")), 0, _less)
        lows = _less(lows, low)
        tl.store(sums_ptr + blocks * (PIECES + 1) + b, ends, mask=m)
        tl.store(low_ptr + blocks * (PIECES + 1) + b, lows, mask=m)
        last = i == BLOCK_N - 1
        sum_ = tl.sum(tl.where(last, ends, 0.0), 0, keep_dims=True)
        low = tl.min(tl.where(last, lows, float("inf")), 0, keep_dims=True)


@triton.jit
def _down(part, t, base, WIDTH: tl.constexpr):
    # The first column whose prefix sum exceeds t among those with a positive part; where rounding leaves none, the last of these.
    column = tl.arange(0, WIDTH)[None, :]
    ends = base[:, None] + tl.cumsum(part, 1)
    first = tl.min(tl.where((part > 0.0) & (ends > t[:, None]), column, WIDTH), 1)
    at = tl.minimum(first, tl.max(tl.where(part > 0.0, column, 0), 1))
    before = tl.sum(tl.where(column == at[:, None] - 1, ends, 0.0), 1)
    return at, tl.where(at > 0, before, base)


@triton.jit
def _sample_kernel(
    leaves_ptr, sums_ptr, u_ptr, key_ptr, index_ptr, probability_ptr, least_ptr, n, blocks, draws, steps,
    HAS_U: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    m = i < draws
    end_ptr = sums_ptr + blocks * (PIECES + 1)
    total = tl.load(end_ptr + blocks - 1)
    if tl.program_id(0) == 0:
        tl.store(least_ptr, tl.load(end_ptr + blocks * (PIECES + 2) + blocks - 1).to(least_ptr.dtype.element_ty))
    if HAS_U:
        t = tl.load(u_ptr + i, mask=m, other=0.0) * total
    else:
        t = _philox_uniform(tl.load(key_ptr), tl.load(key_ptr + 1) + i) * total
    b = i * 0  # the first block whose end exceeds t, or for t >= total the last that is not zero
    left = b + blocks
    for _ in range(steps):
        half = left // 2
        end = tl.load(end_ptr + tl.minimum(b + half, blocks - 1))
        right = (left > 0) & (end <= t) & (end < total)
        b = tl.where(right, b + half + 1, b)
        left = tl.where(right, left - half - 1, half)
    b = tl.minimum(b, blocks - 1)
    base = tl.load(end_ptr + b - 1, mask=b > 0, other=0.0)
    piece, base = _down(tl.load(sums_ptr + b[:, None] * PIECES + tl.arange(0, PIECES)[None, :]), t, base, PIECES)
    first = (b * PIECES + piece) * WIDTH
    at = first[:, None] + tl.arange(0, WIDTH)[None, :]
    leaf, base = _down(tl.load(leaves_ptr + at, mask=at < n, other=0.0).to(tl.float64), t, base, WIDTH)
    row = tl.minimum(first + leaf, n - 1)
    probability = tl.load(leaves_ptr + row).to(tl.float64) / total
    tl.store(index_ptr + i, row, mask=m)
    tl.store(probability_ptr + i, probability.to(probability_ptr.dtype.element_ty), mask=m)


@triton.jit
def _settle_kernel(
    leaves_ptr, index_ptr, value_ptr, refused_ptr, n, entries, HOW: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index_ptr + i, mask=i < entries, other=-1)
    inside = (row >= 0) & (row < n)
    own = tl.load(value_ptr + i, mask=i < entries, other=0.0)
    bad = (i < entries) & ~(inside & _is_priority(own))
    tl.atomic_add(refused_ptr, tl.sum(bad.to(tl.int64), 0))
    last = tl.full([ROWS], -1, tl.int64)
    taken = tl.zeros([ROWS], tl.float64)
    count = tl.zeros([ROWS], tl.int64)
    for start in range(0, entries, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        m = j < entries
        v = tl.load(value_ptr + j, mask=m, other=-1.0).to(tl.float64)
        other = tl.load(index_ptr + j, mask=m, other=-1)
        same = (row[:, None] == other[None, :]) & _is_priority(v)[None, :]
        count += tl.sum(same.to(tl.int64), 1)
        if HOW == 0:
            last = tl.maximum(last, tl.max(tl.where(same, j[None, :], -1), 1))
        if HOW == 1:
            taken = tl.maximum(taken, tl.max(tl.where(same, v[None, :], 0.0), 1))
        if HOW == 2:
            taken += tl.sum(tl.where(same, v[None, :], 0.0), 1)
    found = inside & (count > 0)
    if HOW == 0:
        taken = tl.load(value_ptr + last, mask=found, other=0.0).to(tl.float64)
    if HOW == 2:
        taken = taken / tl.where(found, count, 1).to(tl.float64)
    tl.store(leaves_ptr + row, taken.to(leaves_ptr.dtype.element_ty), mask=found)


_WIDTHS = {"PIECES": BLOCK // PIECE, "WIDTH": PIECE}


def philox_uniform(key: Tensor, n: int) -> Tensor:
    """[n] fp64."""
    out = torch.empty(n, dtype=torch.float64, device=key.device)
    if n:
        with _native.on(key.device):
            _uniform_kernel[(triton.cdiv(n, 1024),)](key.contiguous(), out, n, BLOCK_N=1024)
    return out


def _add_up(sums: Tensor, blocks: int) -> None:
    _ends_kernel[(1,)](sums, blocks, PIECES=BLOCK // PIECE, BLOCK_N=1024)


def replay_sums(leaves: Tensor) -> Tensor:
    """[2, size] fp64."""
    n, blocks = len(leaves), triton.cdiv(len(leaves), BLOCK)
    sums = torch.empty((2, size(n)), dtype=torch.float64, device=leaves.device)
    with _native.on(leaves.device):
        _block_kernel[(blocks,)](leaves, sums, leaves, n, blocks, HAS_INDEX=False, **_WIDTHS)  # the unused one is stood in for
        _add_up(sums, blocks)
    return sums


def replay_sample(leaves: Tensor, sums: Tensor, u: Tensor | None, key: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(index [n], probability [n], least [])."""
    index = torch.empty(n, dtype=torch.int64, device=leaves.device)
    probability = torch.empty(n, dtype=leaves.dtype, device=leaves.device)
    least = torch.empty((), dtype=leaves.dtype, device=leaves.device)
    blocks, draws = triton.cdiv(len(leaves), BLOCK), 4
    chosen = (u.to(torch.float64).contiguous(), sums) if u is not None else (sums, key)
    with _native.on(leaves.device):
        _sample_kernel[(max(1, triton.cdiv(n, draws)),)](
            leaves, sums, *chosen, index, probability, least, len(leaves), blocks, n, blocks.bit_length(),
            HAS_U=u is not None, DRAWS=draws, **_WIDTHS,
        )  # fmt: skip
    return index, probability, least


def replay_update(leaves: Tensor, sums: Tensor, index: Tensor, value: Tensor, duplicates: str) -> Tensor:
    """Writes leaves and sums; [] how many entries were refused."""
    refused = torch.zeros((), dtype=torch.int64, device=leaves.device)
    n, entries, blocks, rows = len(leaves), len(index), triton.cdiv(len(leaves), BLOCK), 16
    if entries:
        index, value = index.contiguous(), value.contiguous()
        with _native.on(leaves.device):
            _settle_kernel[(triton.cdiv(entries, rows),)](
                leaves, index, value, refused, n, entries, HOW=_DUPLICATES[duplicates], ROWS=rows, BLOCK_N=128
            )  # fmt: skip
            _block_kernel[(entries,)](leaves, sums, index, n, blocks, HAS_INDEX=True, **_WIDTHS)
            _add_up(sums, blocks)
    return refused
