"""BatchNorm of a frozen network: one affine per channel, which yields statistics of its input on the way when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd import ops
from fastkd.errors import InputError

from .globalise import TAILS
from .trace import sample_means


class Collector:
    """What the frozen BatchNorms of one network hand over during one forward; a slot per layer, in call order."""

    def __init__(self) -> None:
        self.sums: list[Tensor | None] | None = None
        self.counts: list[int] = []
        self.moments: list[Tensor | None] | None = None
        self.order: list[FrozenBN] | None = None

    def start(self, layers: int, bn: bool, moments: bool) -> None:
        self.sums = [None] * layers if bn else None
        self.counts = [0] * layers
        self.moments = [None] * layers if moments else None

    def stop(self) -> None:
        self.sums = self.moments = self.order = None


class FrozenBN(nn.Module):
    """`act(scale x + bias + residual)` with the running statistics folded in; hands over statistics of x when the collector asks.

    Args:
      bn: the layer it stands for. name: its name in the network, for messages.
      collector: shared by all layers of the network.

    A subclass of BatchNorm2d with a forward of its own is kept whole (`inner`) and its input read beside it.
    """

    fx_leaf = True
    scale: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    unit: Tensor

    def __init__(self, bn: _BatchNorm, name: str, collector: Collector):
        super().__init__()
        if bn.running_mean is None or bn.running_var is None:
            raise InputError(
                f"BatchNorm layer '{name}' of the teacher keeps no running statistics (track_running_stats=False); "
                "expected a network that does"
            )
        mean, var = bn.running_mean.detach().double(), bn.running_var.detach().double()
        gamma = torch.ones_like(mean) if bn.weight is None else bn.weight.detach().double()
        beta = torch.zeros_like(mean) if bn.bias is None else bn.bias.detach().double()
        scale = gamma * torch.rsqrt(var + bn.eps)
        dtype = bn.running_mean.dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("bias", (beta - mean * scale).to(dtype))
        self.register_buffer("mean", mean.to(wide))
        self.register_buffer("var", var.to(wide))
        self.register_buffer("unit", torch.stack([torch.zeros_like(mean), torch.ones_like(mean)]).to(dtype))
        self.inner = None if tails(bn) is not None else bn
        self.name, self.collector, self.index = name, collector, -1
        self.act, self.slope = "none", 0.01

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        c = self.collector
        if c.order is not None:
            c.order.append(self)
        if c.moments is not None:
            self._fill(c.moments, sample_means(x))
        if c.sums is None:
            return self._affine(x, residual)
        c.counts[self.index] = x.numel() // x.shape[1]
        if self.inner is not None:
            self._fill(c.sums, ops.bn_sums(x, self.mean))
            return self._affine(x, residual)
        if residual is not None and residual.shape != x.shape:  # a sum that broadcasts
            y, sums = ops.frozen_bn_act_stats(x, self.scale, self.bias, self.mean)
            self._fill(c.sums, sums)
            return self._activate(y + residual)
        residual = residual if residual is None else residual.to(x.dtype)
        y, sums = ops.frozen_bn_act_stats(x, self.scale, self.bias, self.mean, residual=residual, act=self.act, slope=self.slope)
        self._fill(c.sums, sums)
        return y

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrozenBN:
        """Moves and casts; mean and variance stay at least fp32, and what the sums are taken about stays what the target says."""
        kept = self.mean, self.var
        super()._apply(fn, recurse)
        if self.mean.dtype not in (torch.float32, torch.float64):
            self.mean, self.var = (v.to(self.mean.device) for v in kept)
        return self

    def _fill(self, slots: list[Tensor | None], value: Tensor) -> None:
        if slots[self.index] is not None:
            raise InputError(
                f"BatchNorm layer '{self.name}' of the teacher is called twice in one forward; expected one where torch.fx cannot trace"
            )
        slots[self.index] = value

    def _affine(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.inner is not None:
            y = self.inner(x)
        elif x.dtype == self.scale.dtype:
            shape = (1, -1, *([1] * (x.dim() - 2)))
            y = torch.addcmul(self.bias.view(shape), x, self.scale.view(shape))  # saves nothing: scale needs no gradient
        else:  # bf16 activations, fp32 constants: computed in fp32, stored in bf16, in one pass
            # torch.batch_norm: F.batch_norm of torch 2.11 wants eps > 0 outside of training too
            y = torch.batch_norm(x, self.scale, self.bias, self.unit[0], self.unit[1], False, 0.0, 0.0, torch.backends.cudnn.enabled)
        if residual is not None:
            y = y + residual if residual.shape != y.shape else y.add_(residual)
        return self._activate(y)

    def _activate(self, y: Tensor) -> Tensor:
        if self.act == "relu":
            return y.relu_()
        if self.act == "relu6":
            return F.relu6(y)
        return F.leaky_relu(y, self.slope) if self.act == "leaky_relu" else y

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, act={self.act}, index={self.index}"


_PLAIN = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, _BatchNorm.forward)


def tails(bn: _BatchNorm) -> tuple[str, ...] | None:
    """Modules that a BatchNorm applies after normalising: () for torch's own; None where its forward is not known."""
    if getattr(type(bn), "_alone", type(bn).forward) in _PLAIN:
        return ()
    return next((TAILS[k.__name__] for k in type(bn).__mro__ if k.__name__ in TAILS), None)


def is_norm(m: nn.Module) -> bool:
    """A BatchNorm2d (of any subclass) or SyncBatchNorm: what DeepInversion's statistics are about."""
    return isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBN)


def freeze_norms(net: nn.Module, collector: Collector) -> list[FrozenBN]:
    """Replace every BatchNorm2d and SyncBatchNorm of `net`, in place; a shared one by one module. Returns them in module order."""
    made: dict[int, tuple[FrozenBN, nn.Module]] = {}
    for prefix, parent in list(net.named_modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a module's second name
            if isinstance(child, _BatchNorm) and is_norm(child):
                path = f"{prefix}.{name}" if prefix else name
                if id(child) not in made:
                    layer = FrozenBN(child, path, collector)
                    rest = [getattr(child, part) for part in tails(child) or ()]
                    made[id(child)] = layer, nn.Sequential(layer, *rest) if rest else layer
                setattr(parent, name, made[id(child)][1])
    return [layer for layer, _ in made.values()]
