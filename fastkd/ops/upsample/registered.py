"""`fastkd::upsample_act_*`: backends of the doubled activation behind one name, shapes, and first-order gradients."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .. import _native
from .._library import define, kernels_for
from . import reference as ref
from .native import doubled, halved

_kernels = functools.partial(kernels_for, str(__package__))


def _fwd(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    kernels = _kernels(f"upsample_affine_{act}", x)
    if kernels is None:
        return _native.dense(ref.upsample_affine_act_ref(x, scale, bias, act), x)
    y: Tensor = kernels.fwd(x, scale, bias, act)
    return y


def _bwd(gy: Tensor, y: Tensor, scale: Tensor | None, act: str) -> Tensor:
    kernels = _kernels(f"upsample_affine_{act}", y)
    if kernels is None:
        return _native.dense(ref.upsample_affine_act_bwd_ref(gy, y, scale, act), y)
    dx: Tensor = kernels.bwd(gy, y, scale, act)
    return dx


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, scale, _, ctx.act = inputs
    ctx.save_for_backward(output, scale)


def _backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, None, None, None]:
    y, scale = ctx.saved_tensors
    return (backward(gy, y, scale, ctx.act) if ctx.needs_input_grad[0] else None), None, None, None


forward = define(
    "upsample_act_fwd(Tensor x, Tensor? scale, Tensor? bias, str act) -> Tensor",
    _fwd,
    lambda x, scale, bias, act: doubled(x),
    backward=_backward,
    save=_save,
)
backward = define("upsample_act_bwd(Tensor gy, Tensor y, Tensor? scale, str act) -> Tensor", _bwd, lambda gy, y, scale, act: halved(y))
