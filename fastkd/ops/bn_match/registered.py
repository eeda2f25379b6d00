"""`fastkd::bn_sums_*`, `fastkd::frozen_bn_act_stats_*`, `fastkd::bn_match_loss_*`: backends behind one name, shapes, gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._library import define, kernels_for
from . import reference as ref

_kernels = functools.partial(kernels_for, str(__package__))


def _sums_like(x: Tensor) -> Tensor:
    return torch.empty((2, x.shape[1]), dtype=ref.wide(x.dtype), device=x.device)


# --- bn_sums -----------------------------------------------------------------------------------------------------------------


def _sums_fwd(x: Tensor, shift: Tensor) -> Tensor:
    kernels = _kernels("bn_sums", x)
    return ref.bn_sums_ref(x, shift) if kernels is None else kernels.bn_fwd(x, shift, None, None, "none", 0.0)[1]


def _sums_bwd(grad: Tensor, x: Tensor, shift: Tensor) -> Tensor:
    kernels = _kernels("bn_sums", x)
    if kernels is None:
        return _native.dense(ref.bn_sums_bwd_ref(grad, x, shift), x)
    dx: Tensor = kernels.bn_bwd(None, grad, x, shift, None, None, "none", 0.0, False)[0]
    return dx


def _sums_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    x, shift = ctx.saved_tensors
    return (sums_bwd(grad, x, shift) if ctx.needs_input_grad[0] else None), None


sums_fwd = define(
    "bn_sums_fwd(Tensor x, Tensor shift) -> Tensor",
    _sums_fwd,
    lambda x, shift: _sums_like(x),
    backward=_sums_backward,
    save=_sums_save,
)
sums_bwd = define(
    "bn_sums_bwd(Tensor grad, Tensor x, Tensor shift) -> Tensor", _sums_bwd, lambda grad, x, shift: _native.blank(x)
)


# --- frozen_bn_act_stats -----------------------------------------------------------------------------------------------------


def _frozen_fwd(
    x: Tensor, scale: Tensor, bias: Tensor, shift: Tensor, residual: Tensor | None, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    kernels = _kernels("frozen_bn_act_stats", x)
    if kernels is None:
        y, sums = ref.frozen_bn_act_stats_ref(x, scale, bias, shift, residual, act, slope)
        return _native.dense(y, x), sums
    result: tuple[Tensor, Tensor] = kernels.bn_fwd(x, shift, (scale, bias), residual, act, slope)
    return result


def _frozen_bwd(
    gy: Tensor | None,
    gsums: Tensor | None,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor]:
    kernels = _kernels("frozen_bn_act_stats", x)
    dresidual: Tensor | None
    if kernels is None:
        dx, dresidual = ref.frozen_bn_act_stats_bwd_ref(gy, gsums, x, scale, bias, shift, residual, act, slope)
        dx, dresidual = _native.dense(dx, x), _native.dense(dresidual, x)
    else:
        dx, dresidual = kernels.bn_bwd(gy, gsums, x, shift, (scale, bias), residual, act, slope, want_residual)
    return dx, dresidual if want_residual and dresidual is not None else x.new_empty(0)


def _frozen_bwd_fake(
    gy: Any, gsums: Any, x: Tensor, scale: Any, bias: Any, shift: Any, residual: Any, act: str, slope: float, want_residual: bool
) -> tuple[Tensor, Tensor]:
    return _native.blank(x), _native.blank(x) if want_residual else x.new_empty(0)


def _frozen_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, bias, shift, residual, ctx.act, ctx.slope = inputs
    ctx.set_materialize_grads(False)  # a result that nobody uses costs no tensor of zeros
    ctx.save_for_backward(x, scale, bias, shift, residual)


def _frozen_backward(ctx: Any, gy: Tensor | None, gsums: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    want_x, want_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    if gy is None and gsums is None:
        return (None,) * 7
    dx, dresidual = frozen_bwd(gy, gsums, *saved, ctx.act, ctx.slope, want_residual)
    return dx if want_x else None, None, None, None, dresidual if want_residual else None, None, None


frozen_fwd = define(
    "frozen_bn_act_stats_fwd(Tensor x, Tensor scale, Tensor bias, Tensor shift, Tensor? residual, str act, float slope)"
    " -> (Tensor, Tensor)",
    _frozen_fwd,
    lambda x, scale, bias, shift, residual, act, slope: (_native.blank(x), _sums_like(x)),
    backward=_frozen_backward,
    save=_frozen_save,
)
frozen_bwd = define(
    "frozen_bn_act_stats_bwd(Tensor? gy, Tensor? gsums, Tensor x, Tensor scale, Tensor bias, Tensor shift, Tensor? residual,"
    " str act, float slope, bool want_residual) -> (Tensor, Tensor)",
    _frozen_bwd,
    _frozen_bwd_fake,
)


# --- bn_match_loss -----------------------------------------------------------------------------------------------------------


def _loss_fwd(
    stats: Tensor,
    target: Tensor,
    average: Tensor | None,
    calls: Tensor | None,
    offsets: list[int],
    momentum: float,
    first: float,
    kind: str,
) -> Tensor:
    kernels = _kernels("bn_match_loss", stats)
    if kernels is None:
        return ref.bn_match_loss_ref(stats, target, offsets, first, kind, average, calls, momentum)
    loss: Tensor = kernels.loss_fwd(stats, target, average, calls, offsets, momentum, first, kind)
    return loss


def _loss_bwd(
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
    kernels = _kernels("bn_match_loss", stats)
    if kernels is None:
        return ref.bn_match_loss_bwd_ref(grad, stats, target, offsets, first, kind, average, calls, momentum)
    out: Tensor = kernels.loss_bwd(grad, stats, target, average, calls, offsets, momentum, first, kind)
    return out


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.plain = inputs[4:]


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[0]
    return (loss_bwd(grad, *ctx.saved_tensors, *ctx.plain) if wanted else None, *[None] * 7)


def _loss_bwd_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.plain = inputs[5:]


def _loss_bwd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Higher orders, in plain torch: few channels, and nobody needs them fast."""
    (g, stats, target, average, calls), (offsets, momentum, first, kind) = ctx.saved_tensors, ctx.plain
    with torch.enable_grad():
        g, stats = g.view_as(g), stats.view_as(stats)  # g may depend on stats: partial derivatives, or that path counts twice
        out = ref.bn_match_loss_bwd_ref(g, stats, target, offsets, first, kind, average, calls, momentum)
    wanted = [t for t, want in zip((g, stats), ctx.needs_input_grad) if want]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=torch.is_grad_enabled()))
    return (*[next(found) if want else None for want in ctx.needs_input_grad[:2]], *[None] * 7)


loss_fwd = define(
    "bn_match_loss_fwd(Tensor stats, Tensor target, Tensor? average, Tensor? calls, int[] offsets, float momentum, float first,"
    " str kind) -> Tensor",
    _loss_fwd,
    lambda stats, *rest: stats.new_empty(()),
    backward=_loss_backward,
    save=_loss_save,
)
loss_bwd = define(
    "bn_match_loss_bwd(Tensor grad, Tensor stats, Tensor target, Tensor? average, Tensor? calls, int[] offsets, float momentum,"
    " float first, str kind) -> Tensor",
    _loss_bwd,
    lambda grad, stats, *rest: stats.new_empty(stats.shape),
    backward=_loss_bwd_backward,
    save=_loss_bwd_save,
)
