"""Small modules whose control flow depends on shapes, kept as leaves for `torch.fx`, and shared initialisations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: output size ceil(input / stride), the odd pixel at the right and bottom.

    The padding follows from the shape of the input, so any image size gives what TensorFlow gives.
    """

    fx_leaf = True

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, H, W] → [N, Cout, ceil(H / stride), ceil(W / stride)]."""
        total = []
        for size, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            total.append(max((math.ceil(size / stride) - 1) * stride + kernel - size, 0))
        (high, wide), even = total, all(t % 2 == 0 for t in total)
        if even:  # symmetric: the convolution pads by itself, without a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, (high // 2, wide // 2), self.dilation, self.groups)
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def same_conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A bias-free convolution with TensorFlow padding; with stride 1 that is a plain symmetric one."""
    if stride == 1:
        return nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False)
    return SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)


class ToMap(nn.Unflatten):
    """Rows to maps, in the memory layout that the network was moved to: `net.to(memory_format=torch.channels_last)` reaches weights
    only, and a map in another layout is rewritten before each of the convolutions behind it.

    Args:
      size: (C, h, w) of the maps.
    """

    fx_leaf = True

    def __init__(self, size: tuple[int, ...]):
        super().__init__(1, size)
        self.layout = torch.zeros(1, 2, 2, 2)  # its strides tell; no buffer, for it is no state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ToMap:
        """What `net.to` does to a weight, it does to `layout`."""
        super()._apply(fn, recurse)
        self.layout = fn(self.layout)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[N, C·h·w] → [N, C, h, w]."""
        x = super().forward(x)
        if torch.compiler.is_compiling() or not self.layout.is_contiguous(memory_format=torch.channels_last):
            return x  # the compiler chooses layouts itself
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels_last, in words that vmap knows


class PoolIfHeight(nn.Module):
    """Max-pooling 2x2 that only acts where the image itself has one height."""

    fx_leaf = True

    def __init__(self, height: int):
        super().__init__()
        self.height = height

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        """x [N, C, h, w], image [N, c, H, W] → [N, C, h/2, w/2] if H is `height`, else x."""
        return F.max_pool2d(x, 2) if image.shape[2] == self.height else x


def kaiming(net: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions N(0, 2 / (kh kw out)) with zero bias, BatchNorm 1/0, linear bias 0 and, where given, N(0, linear_std²)."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Linear):
            if linear_std is not None:
                nn.init.normal_(m.weight, 0, linear_std)
            nn.init.zeros_(m.bias)
