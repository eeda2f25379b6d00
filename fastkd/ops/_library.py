"""Registration of the native ops with torch, and the choice of a backend from inside traced code.

An op is defined once and has one implementation for all devices, which asks the registry at every call; it also runs where no
native backend does (then through the reference), so that compiled graphs and `opcheck` never depend on what was built.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
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


MODULES = {"cpp": "native", "cuda": "native", "triton": "triton"}
"""The module of an op's package that launches a backend's kernels."""


def kernels_for(package: str, op: str, x: Tensor) -> ModuleType | None:
    """The module of `package` whose kernels run `op` on tensors like `x`; None: the reference does."""
    name = choose(op, x)
    return None if name == "reference" else _module(package, name)


@functools.cache
def _module(package: str, backend: str) -> ModuleType:
    if backend not in MODULES:
        raise NotImplementedError(f"no module launches kernels of the backend {backend!r}; name it in fastkd/ops/_library.py")
    return importlib.import_module(f"{package}.{MODULES[backend]}")


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register `fastkd::<schema>`.

    Args:
      schema:   name, arguments and results in torch's schema language; results are fresh tensors. An op that writes an argument
                ("Tensor(a!) x") cannot have a gradient formula in torch: its public function refuses what requires one.
      run:      the implementation, for CPU and CUDA tensors.
      fake:     the same for shapes and strides only.
      backward: (ctx, *gradients) -> gradient per argument; without it, asking for a gradient through the op raises.
      save:     (ctx, inputs, output), what backward needs.
    Returns:
      The op for positional arguments. In plain eager mode it leaves the dispatcher out, which costs more than a small kernel:
      some 65 us of 120 for the forward and backward of one BatchNorm of 8 x 8 pixels.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fastkd::{name}", fake, lib=_LIBRARY)
    registered = getattr(torch.ops.fastkd, name).default
    if "!" in schema:
        return _writing(registered, run, [i for i, a in enumerate(schema.partition("(")[2].split(",")) if "!" in a])
    refuse = _refuse(name.removesuffix("_bwd"))
    torch.library.register_autograd(f"fastkd::{name}", backward or refuse, setup_context=save, lib=_LIBRARY)
    differentiable = _function(name, run, backward, save) if backward and save else None

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _watched(args):
            return registered(*args)
        if not torch.is_grad_enabled() or not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return run(*args)
        return registered(*args) if differentiable is None else differentiable.apply(*args)

    return call


def _writing(registered: Callable[..., Any], run: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    """An op that writes into its arguments: never differentiated, and functionalised by the dispatcher. Without it in plain eager mode,
    where what it wrote must still count as changed for whoever saved it for a backward."""

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _watched(args):
            return registered(*args)
        out = run(*args)
        for i in written:
            if not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return out

    return call


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether somebody follows the call through the dispatcher: a mode, a transform, a trace, a subclass of Tensor, a negation that
    memory does not hold yet."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
        or any(isinstance(a, Tensor) and (type(a) is not Tensor or a.is_neg()) for a in args)
    )


def _function(name: str, run: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None]) -> Any:
    """What `register_autograd` does, as an autograd.Function."""

    def forward(ctx: Any, *args: Any) -> Any:
        out = run(*args)
        save(ctx, args, out)
        return out

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def _refuse(op: str) -> Callable[..., Any]:
    def second_order(ctx: Any, *grads: Any) -> NoReturn:
        raise ConfigError(
            f"{op}: gradients of gradients are not computed by the native backends; set ops.backend=reference for second order"
        )

    return second_order
