"""`fastkd::upsample_act_*`: backends of the doubled activation behind one name, shapes, and first-order gradients."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from .. import _native
from .._library import choose, define
from . import native
from . import reference as ref
from .native import doubled, halved


def _kernels(x: Tensor, act: str) -> ModuleType | None:
    """The module that holds fwd and bwd for x; None: the reference."""
    name = choose(f"upsample_affine_{act}", x)
    if name == "reference":
        return None
    if name == "triton":
        from . import triton

        return triton
    return native


def _fwd(x: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> Tensor:
    kernels = _kernels(x, act)
    if kernels is None:
        return _native.dense(ref.upsample_affine_act_ref(x, scale, bias, act), x)
    y: Tensor = kernels.fwd(x, scale, bias, act)
    return y


def _bwd(gy: Tensor, y: Tensor, scale: Tensor | None, act: str) -> Tensor:
    kernels = _kernels(y, act)
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
