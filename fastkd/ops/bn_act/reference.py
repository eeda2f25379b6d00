"""Definitions in plain torch: BatchNorm in training with its activation, differentiable to any order, and the passes of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd import ranks

from ..bn_match.reference import activate, per_channel, wide


def batch_norm_act_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float, over_ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, unbiased variance): the specification. The variance is that of the deviations from the mean, in two passes."""
    total = ranks.total if over_ranks else _same
    w = x.to(wide(x.dtype))
    dims = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // x.shape[1] * (ranks.world() if over_ranks else 1)
    mean = total(w.sum(dims)) / count
    d = w - per_channel(mean, x)
    var = total((d * d).sum(dims)) / count
    pre = d * per_channel(torch.rsqrt(var + eps), x)
    if weight is not None:
        pre = pre * per_channel(weight, x)
    if bias is not None:
        pre = pre + per_channel(bias, x)
    return activate(pre, act, slope).to(x.dtype), mean.detach(), var.detach() * (count / (count - 1))


def _same(x: Tensor) -> Tensor:
    return x


# The three passes, for machines where no kernel runs -----------------------------------------------------------------------------


def bn_act_fwd_ref(
    x: Tensor, sums: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    """y, and stats [4, C]: mean, unbiased variance, r = 1 / sqrt(variance + eps), scale = weight r."""
    d = sums / count
    var = (d[1] - d[0] * d[0]).clamp_min(0)
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    stats = torch.stack([shift.to(rstd.dtype) + d[0], var * (count / (count - 1)), rstd, scale])
    return activate(_pre(x, stats, bias), act, slope).to(x.dtype), stats


def _pre(x: Tensor, stats: Tensor, bias: Tensor | None) -> Tensor:
    pre = (x.to(stats.dtype) - per_channel(stats[0], x)) * per_channel(stats[3], x)
    return pre if bias is None else pre + per_channel(bias, x)


def _masked(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, act: str, slope: float) -> Tensor:
    """The gradient of the preactivation."""
    pre, g = _pre(x, stats, bias), gy.to(stats.dtype)
    if act == "relu":
        return torch.where(pre <= 0, 0.0, g)
    if act == "relu6":
        return torch.where((pre <= 0) | (pre >= 6), 0.0, g)
    return torch.where(pre > 0, g, g * slope) if act == "leaky_relu" else g


def _normalised(x: Tensor, stats: Tensor) -> Tensor:
    return (x.to(stats.dtype) - per_channel(stats[0], x)) * per_channel(stats[2], x)


def bn_act_bwd_sums_ref(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, act: str, slope: float) -> Tensor:
    """[2, C]: sum of g and of g r (x - mean); the gradients of bias and weight."""
    g = _masked(gy, x, stats, bias, act, slope)
    dims = [d for d in range(x.dim()) if d != 1]
    return torch.stack([g.sum(dims), (g * _normalised(x, stats)).sum(dims)])


def bn_act_bwd_ref(
    gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, gsums: Tensor, count: int, act: str, slope: float
) -> Tensor:
    """dx = scale (g - t1 / count - r (x - mean) t2 / count)."""
    g = _masked(gy, x, stats, bias, act, slope)
    g = g - (per_channel(gsums[0], x) + _normalised(x, stats) * per_channel(gsums[1], x)) / count
    return (per_channel(stats[3], x) * g).to(x.dtype)
