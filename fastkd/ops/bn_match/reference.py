"""Definitions of the BN-statistic ops in plain torch, differentiable to any order: the specification of every backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1e-8
"""Least variance in the Gaussian divergence."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics for inputs of `dtype`: at least fp32, fp64 stays."""
    return torch.promote_types(dtype, torch.float32)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1, …], in the statistics dtype of `x`."""
    return v.to(wide(x.dtype)).view(1, -1, *([1] * (x.dim() - 2)))


def _reduced(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def bn_sums_ref(x: Tensor, shift: Tensor) -> Tensor:
    """[2, C]: sum of (x - shift) and of its square over all dimensions but 1."""
    d = x.to(wide(x.dtype)) - per_channel(shift, x)
    return torch.stack([d.sum(_reduced(x)), (d * d).sum(_reduced(x))])


def bn_sums_bwd_ref(grad: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    """dx = g1 + 2 g2 (x - shift): evaluated as written, because a + b x cancels when mean/std is large."""
    d = x.to(wide(x.dtype)) - per_channel(shift, x)
    return (per_channel(grad[0], x) + 2 * per_channel(grad[1], x) * d).to(x.dtype)


def activate(x: Tensor, act: str, slope: float) -> Tensor:
    if act == "none":
        return x
    if act == "relu":
        return F.relu(x)
    if act == "relu6":
        return F.relu6(x)
    return F.leaky_relu(x, slope)


def preactivation(x: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    pre = x.to(wide(x.dtype)) * per_channel(scale, x) + per_channel(bias, x)
    return pre if residual is None else pre + residual.to(pre.dtype)


def frozen_bn_act_stats_ref(
    x: Tensor, scale: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    """y = act(scale x + bias + residual) in the dtype of x, and the shifted sums of x."""
    w = x.to(wide(x.dtype))  # once, so that the gradient is rounded once too
    return activate(preactivation(w, scale, bias, residual), act, slope).to(x.dtype), bn_sums_ref(w, shift)


def frozen_bn_act_stats_bwd_ref(
    gy: Tensor | None,
    gsums: Tensor | None,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """dx = gy act'(pre) scale + g1 + 2 g2 (x - shift), dresidual = gy act'(pre)."""
    g = torch.zeros_like(x, dtype=wide(x.dtype))
    if gy is not None:
        g = gy.to(wide(x.dtype))
        pre = preactivation(x, scale, bias, residual)
        if act == "relu":
            g = torch.where(pre <= 0, 0.0, g)
        elif act == "relu6":
            g = torch.where((pre <= 0) | (pre >= 6), 0.0, g)
        elif act == "leaky_relu":
            g = torch.where(pre > 0, g, g * slope)
    dx = g * per_channel(scale, x)
    if gsums is not None:
        d = x.to(wide(x.dtype)) - per_channel(shift, x)
        dx = dx + per_channel(gsums[0], x) + 2 * per_channel(gsums[1], x) * d
    return dx.to(x.dtype), g.to(x.dtype)


def moments_ref(sums: Tensor, count: int | float | Tensor, shift: Tensor) -> Tensor:
    """[2, C]: mean and biased variance from shifted sums over `count` elements."""
    d = sums[0] / count
    variance = sums[1] / count - d * d
    return torch.stack([shift.to(sums.dtype) + d, variance.clamp_min(0)])


def blend(stats: Tensor, average: Tensor | None, calls: Tensor | None, momentum: float) -> Tensor:
    """(1 - momentum) stats + momentum average, from the second synthesis call on; without an average, `stats` itself."""
    if average is None:
        return stats
    mixed = (1 - momentum) * stats + momentum * average.to(stats.dtype)
    return mixed if calls is None else torch.where(calls > 0, mixed, stats)


def bn_match_loss_ref(
    stats: Tensor,
    target: Tensor,
    offsets: Sequence[int],
    first: float,
    kind: str,
    average: Tensor | None = None,
    calls: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """Distance of batch statistics from running statistics; see the public function for the formulas."""
    loss = stats[:, :0].sum()  # 0, and part of the graph also where there is no layer
    target = target.to(stats.dtype)
    stats = blend(stats, average, calls, momentum)
    for layer in range(len(offsets) - 1):
        lo, hi = offsets[layer], offsets[layer + 1]
        if kind == "l2":
            d, v = (stats - target)[:, lo:hi]
            term = d.norm() + v.norm()
        else:
            (mean, var), (run_mean, run_var) = stats[:, lo:hi], target[:, lo:hi]
            var, run_var = var.clamp_min(SMALL), run_var.clamp_min(SMALL)  # a constant channel stays finite
            term = (((mean - run_mean).square() + var) / (2 * run_var) - 0.5 * (var / run_var).log() - 0.5).sum()
        loss = loss + term * (first if layer == 0 else 1.0)
    return loss


def bn_match_loss_bwd_ref(
    grad: Tensor,
    stats: Tensor,
    target: Tensor,
    offsets: Sequence[int],
    first: float,
    kind: str,
    average: Tensor | None,
    calls: Tensor | None,
    momentum: float,
) -> Tensor:
    """Gradient of the loss with respect to `stats`, itself differentiable: v/|v| per norm, 0 where the norm is 0."""
    mixed = blend(stats, average, calls, momentum)
    d, parts = mixed - target.to(stats.dtype), [stats.new_zeros(2, 0)]
    for layer in range(len(offsets) - 1):
        lo, hi = offsets[layer], offsets[layer + 1]
        if kind == "l2":
            norm = torch.linalg.vector_norm(d[:, lo:hi], dim=1, keepdim=True)
            part = d[:, lo:hi] * torch.where(norm == 0, 0.0, 1 / torch.where(norm == 0, 1.0, norm))
        else:
            var, run_var = mixed[1, lo:hi], target[1, lo:hi].to(stats.dtype).clamp_min(SMALL)
            slope = 0.5 / run_var - 0.5 / var.clamp_min(SMALL)
            part = torch.stack([d[0, lo:hi] / run_var, torch.where(var >= SMALL, slope, 0.0)])
        parts.append(part * (first if layer == 0 else 1.0))
    out = grad * torch.cat(parts, 1)
    if average is None:
        return out
    scaled = (1 - momentum) * out
    return scaled if calls is None else torch.where(calls > 0, scaled, out)
