"""`fastkd::bn_act_*`: the passes of BatchNorm with activation, each an op of its own, and the autograd function that strings them.

The sums leave one op and enter the next, so that between them they can be added over ranks, in both directions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastkd import ranks

from .. import _native
from .._library import define, kernels_for
from ..bn_match.reference import wide
from ..bn_match.registered import sums_fwd
from . import reference as ref

_kernels = functools.partial(kernels_for, str(__package__), "batch_norm_act")


def _fwd(
    x: Tensor, sums: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(x)
    if kernels is not None:
        result: tuple[Tensor, Tensor] = kernels.fwd(x, sums, shift, weight, bias, count, eps, act, slope)
        return result
    y, stats = ref.bn_act_fwd_ref(x, sums, shift, weight, bias, count, eps, act, slope)
    return _native.dense(y, x), stats


def _bwd_sums(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, act: str, slope: float) -> Tensor:
    passes = _kernels(x)
    found: Tensor = (
        ref.bn_act_bwd_sums_ref(gy, x, stats, bias, act, slope) if passes is None else passes.bwd_sums(gy, x, stats, bias, act, slope)
    )
    return found


def _bwd(gy: Tensor, x: Tensor, stats: Tensor, bias: Tensor | None, gsums: Tensor, count: int, act: str, slope: float) -> Tensor:
    kernels = _kernels(x)
    if kernels is None:
        return _native.dense(ref.bn_act_bwd_ref(gy, x, stats, bias, gsums, count, act, slope), x)
    dx: Tensor = kernels.bwd(gy, x, stats, bias, gsums, count, act, slope)
    return dx


def _vectors(x: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, x.shape[1]), dtype=wide(x.dtype), device=x.device)


forward = define(
    "bn_act_fwd(Tensor x, Tensor sums, Tensor shift, Tensor? weight, Tensor? bias, SymInt count, float eps, str act, float slope)"
    " -> (Tensor, Tensor)",
    _fwd,
    lambda x, *rest: (_native.blank(x), _vectors(x, 4)),
)
backward_sums = define(
    "bn_act_bwd_sums(Tensor gy, Tensor x, Tensor stats, Tensor? bias, str act, float slope) -> Tensor",
    _bwd_sums,
    lambda gy, x, *rest: _vectors(x, 2),
)
backward = define(
    "bn_act_bwd(Tensor gy, Tensor x, Tensor stats, Tensor? bias, Tensor gsums, SymInt count, str act, float slope) -> Tensor",
    _bwd,
    lambda gy, x, *rest: _native.blank(x),
)


def _over_ranks(sums: Tensor, shift: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums of the batch of all ranks, about its mean, from each rank's sums about its own shift; in fp64, where nothing cancels."""
    k, s = shift.double(), sums.double()
    first, second = ranks.total(torch.stack([s[0] + count * k, s[1] + k * (2 * s[0] + count * k)]))  # about zero
    count *= ranks.world()
    shift = (first / count).to(shift.dtype)
    k = shift.double()
    return torch.stack([first - count * k, second - k * (2 * first - count * k)]).to(sums.dtype), shift


def _first(x: Tensor) -> Tensor:
    """[C]: a value of each channel, which is near enough to its mean, wherever that is."""
    x = x[0]
    while x.dim() > 1:
        x = x.select(1, 0)
    return x


class BatchNormAct(torch.autograd.Function):
    """(y, stats) of x, weight, bias; stats [4, C] as in `bn_act_fwd`, without gradient. x is dense: a copy made here would be saved
    without its way back to the input, and a second order would pass by it unseen."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: str, slope: float, over_ranks: bool
    ) -> tuple[Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        shift = _first(x).to(wide(x.dtype))
        sums = sums_fwd(x, shift)
        if over_ranks:
            sums, shift = _over_ranks(sums, shift, count)
            count *= ranks.world()
        y, stats = forward(x, sums, shift, weight, bias, count, eps, act, slope)
        ctx.save_for_backward(x, weight, bias, stats)
        ctx.count, ctx.act, ctx.slope, ctx.over_ranks = count, act, slope, over_ranks
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return y, stats

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if gy is None:
            return (None,) * 7
        x, weight, bias, stats = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        gy = _native.dense(gy, x)
        own = backward_sums(gy, x, stats, bias, ctx.act, ctx.slope)
        dx = None
        if want_x:
            gsums = ranks.total(own) if ctx.over_ranks else own
            dx = backward(gy, x, stats, bias, gsums, ctx.count, ctx.act, ctx.slope)
        dweight = own[1].to(weight.dtype) if want_weight else None
        dbias = own[0].to(bias.dtype) if want_bias else None
        return dx, dweight, dbias, None, None, None, None
