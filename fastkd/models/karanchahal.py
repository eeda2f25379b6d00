"""The small ResNets of karanchahal/distiller: unusual on purpose, a test of code that assumes a plain head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import ConfigError


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut; no ReLU after the sum."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(y)) + self.shortcut(x)


class KaranchahalResNet(nn.Module):
    """Stem 64, stages 16/32/64 with one ReLU after each, average pooling 4.

    Keys: conv1 bn1 layer{1,2,3}.{j}.{conv1,bn1,conv2,bn2,shortcut.0,shortcut.1} linear. Feature 256 at 32x32 (2 x 2 x 64).
    """

    def __init__(self, depth: int, classes: int, channels: int, size: tuple[int, int]):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.pool = nn.AvgPool2d(4)
        high, wide = (-(-s // 4) // 4 for s in size)  # two strides of 2 round up, the pooling rounds down
        self.linear = nn.Linear(64 * high * wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] of the size it was made for → logits [N, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.layer1(x))
        x = F.relu(self.layer2(x))
        x = F.relu(self.layer3(x))
        return self.linear(torch.flatten(self.pool(x), 1))


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


def karanchahal_resnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> KaranchahalResNet:
    """Depth 6n + 2; PyTorch's default initialisation.

    Raises:
      ConfigError: images that the pooling would shrink to nothing.
    """
    if min(input_size) < 13:
        raise ConfigError(f"karanchahal_resnet{depth} needs images of at least 13 x 13 pixels, found {input_size[0]} x {input_size[1]}.")
    return KaranchahalResNet(depth, classes, channels, input_size)
