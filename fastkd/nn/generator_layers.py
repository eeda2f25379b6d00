"""Layers of generators on top of `ops`; `fuse_generator` makes them of plain ones. State-dict keys are those of the plain layers."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import ops

from .globalise import _NORMS, GlobalBatchNorm2d, _Global


class UpConv(nn.Conv2d):
    """Nearest-neighbour doubling and a 3x3 convolution in one: `fastkd.ops.upsample_conv2d` as a module.

    Weight and bias are those of the convolution ([Cout, Cin, 3, 3], [Cout]), and so is the default initialisation.
    """

    fx_leaf = True

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] → [N, Cout, 2H, 2W]."""
        return ops.upsample_conv2d(x, self.weight, self.bias)


class ActivatedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d and the activation behind it: `fastkd.ops.batch_norm_act` as a module, in training; plain torch in eval mode.

    Parameters, buffers and their updates are those of BatchNorm2d.

    Args:
      act: "none", "relu", "relu6" or "leaky_relu" with negative slope `slope`. kw: of BatchNorm2d.
    """

    over_ranks = False

    def __init__(self, features: int, act: str = "none", slope: float = 0.01, **kw: Any):
        super().__init__(features, **kw)
        self.act, self.slope = act, slope

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H, W]."""
        self._check_input_dim(x)
        if not (self.training or self.running_mean is None):
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return self._activate(y)
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        momentum: float | Tensor = self.momentum or 0.0
        if self.num_batches_tracked is not None and mean is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average, counted on the device
                momentum = self.num_batches_tracked.to(mean.dtype).reciprocal()
        return ops.batch_norm_act(
            *(x, mean, var, self.weight, self.bias),
            momentum=momentum, eps=self.eps, act=self.act, slope=self.slope, over_ranks=self.over_ranks,
        )  # fmt: skip

    def _activate(self, y: Tensor) -> Tensor:
        if self.act == "relu":
            return F.relu(y)
        if self.act == "relu6":
            return F.relu6(y)
        return F.leaky_relu(y, self.slope) if self.act == "leaky_relu" else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


class GlobalActivatedBatchNorm2d(_Global, ActivatedBatchNorm2d):
    """The same over the batch of all ranks."""

    over_ranks = True


_NORMS[ActivatedBatchNorm2d] = GlobalActivatedBatchNorm2d  # what `globalise` makes of it
ACTIVATED: dict[type, type[ActivatedBatchNorm2d]] = {
    nn.BatchNorm2d: ActivatedBatchNorm2d,
    GlobalBatchNorm2d: GlobalActivatedBatchNorm2d,
}
"""The activated form of each kind of BatchNorm2d that has one."""


class UpsampleAct(nn.Module):
    """tanh or sigmoid, and nearest doubling of its result: `fastkd.ops.upsample_affine_tanh` or `_sigmoid` as a module."""

    fx_leaf = True

    def __init__(self, act: str):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, 2H, 2W]."""
        return ops.upsample_affine_tanh(x) if self.act == "tanh" else ops.upsample_affine_sigmoid(x)

    def extra_repr(self) -> str:
        return self.act
