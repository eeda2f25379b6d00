"""Registration of the native ops with torch, and the choice of a backend from inside traced code.

An op is defined once and has one implementation for all devices, which asks the registry at every call; it also runs where no
native backend does (then through the reference), so that compiled graphs and `opcheck` never depend on what was built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from . import _registry

_LIBRARY = torch.library.Library("fastkd", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def _chosen(op: str, device: str, dtype: str) -> str:
    return _registry.choose(op, device, dtype)


# What torch.compiler.assume_constant_result does; calling it would import the whole compiler with this module.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: str, x: Tensor) -> str:
    """The backend that runs `op` on tensors like `x`; a constant under torch.compile."""
    return _chosen(op, x.device.type, str(x.dtype)[6:])


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> None:
    """Register `fastkd::<schema>`.

    Args:
      schema:   name, arguments and results in torch's schema language; results are fresh tensors. An op that writes an argument
                ("Tensor(a!) x") cannot have a gradient formula in torch: its public function refuses what requires one.
      run:      the implementation, for CPU and CUDA tensors.
      fake:     the same for shapes and strides only.
      backward: (ctx, *gradients) -> gradient per argument; without it, asking for a gradient through the op raises.
      save:     (ctx, inputs, output), what backward needs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fastkd::{name}", fake, lib=_LIBRARY)
    if "!" in schema:
        return
    torch.library.register_autograd(
        f"fastkd::{name}", backward or _refuse(name.removesuffix("_bwd")), setup_context=save, lib=_LIBRARY
    )


def _refuse(op: str) -> Callable[..., Any]:
    def second_order(ctx: Any, *grads: Any) -> NoReturn:
        raise ConfigError(
            f"{op}: gradients of gradients are not computed by the native backends; set ops.backend=reference for second order"
        )

    return second_order
