"""Wide ResNets (Zagoruyko and Komodakis 2016), pre-activation, in the form of the DFKD literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import kaiming


class Block(nn.Module):
    """u = ReLU(BN(x)); conv-BN-ReLU-conv on u; shortcut: x itself, or a bare 1x1 convolution of u where the width changes."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None if inputs == width else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(u))))
        return y + (x if self.convShortcut is None else self.convShortcut(u))


class Group(nn.Module):
    """The blocks of one resolution, under the key `layer`."""

    def __init__(self, inputs: int, width: int, blocks: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Keys: conv1 {block}{1,2,3}.layer.{j}.{bn1,conv1,bn2,conv2,convShortcut} bn1 {head}. Feature 64k.

    `block` and `head` are "block" and "fc", or "layer" and "linear" for the karanchahal files; nothing else differs.
    """

    def __init__(self, depth: int, width: int, classes: int, channels: int, block: str = "block", head: str = "fc"):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.names, self.head = tuple(f"{block}{i}" for i in (1, 2, 3)), head
        for name, inputs, factor, stride in zip(self.names, (16, 16 * width, 32 * width), (16, 32, 64), (1, 2, 2), strict=True):
            self.add_module(name, Group(inputs, factor * width, blocks, stride))
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.add_module(head, nn.Linear(64 * width, classes))
        kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        x = self.conv1(x)
        for name in self.names:
            x = getattr(self, name)(x)
        x = self.pool(F.relu(self.bn1(x)))
        return getattr(self, self.head)(torch.flatten(x, 1))


def wrn(*, depth: int, width: int, classes: int, channels: int, input_size: tuple[int, int]) -> WideResNet:
    """WRN-depth-width, dropout 0."""
    return WideResNet(depth, width, classes, channels)


def karanchahal_wrn(*, depth: int, width: int, classes: int, channels: int, input_size: tuple[int, int]) -> WideResNet:
    """The same network with the keys of karanchahal/distiller."""
    return WideResNet(depth, width, classes, channels, block="layer", head="linear")
