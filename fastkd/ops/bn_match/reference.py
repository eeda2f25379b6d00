"""Definitions of the BN-statistic ops in plain torch, differentiable to any order: the specification of every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def bn_match_loss_ref(stats: Tensor, target: Tensor, offsets: tuple[int, ...], first: float, kind: str) -> Tensor:
    """Distance of batch statistics from running statistics; see the public function for the formulas."""
    loss = stats.new_zeros(())
    target = target.to(stats.dtype)
    for layer in range(len(offsets) - 1):
        lo, hi = offsets[layer], offsets[layer + 1]
        if kind == "l2":
            d, v = (stats - target)[:, lo:hi]
            term = d.norm() + v.norm()
        else:
            (mean, var), (run_mean, run_var) = stats[:, lo:hi], target[:, lo:hi]
            var, run_var = var.clamp_min(1e-8), run_var.clamp_min(1e-8)  # a constant channel stays finite
            term = (((mean - run_mean).square() + var) / (2 * run_var) - 0.5 * (var / run_var).log() - 0.5).sum()
        loss = loss + term * (first if layer == 0 else 1.0)
    return loss
