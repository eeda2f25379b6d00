"""Thin CIFAR ResNets of He et al. 2015 (section 4.2): stages 16/32/64 and parameter-free shortcuts (option A)."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn


@torch.fx.wrap
def every_second(x: Tensor, before: int, after: int) -> Tensor:
    """Every second row and column, with zero channels before and after; one node of a traced graph.

    [N, C, H, W] → [N, before + C + after, ceil(H / 2), ceil(W / 2)]. The gradient of a slice has the order of the sliced dimensions in
    memory: a channels_last map is sliced with its channels last, or its gradient would be rewritten where it meets the convolution's.
    """
    if x.stride(1) == 1 != x.shape[1]:
        return F.pad(x.permute(0, 2, 3, 1)[:, ::2, ::2], (before, after)).permute(0, 3, 1, 2)
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, after))


class ShortcutA(nn.Module):
    """Every second pixel, and zeros for the channels that are new, half of them on either side. No parameters."""

    def __init__(self, extra: int):
        super().__init__()
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C + extra, ceil(H / 2), ceil(W / 2)]."""
        return every_second(x, self.before, self.after)


class Block(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, ReLU."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = ShortcutA(width - inputs) if stride != 1 or inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ThinResNet(nn.Module):
    """Keys: conv1 bn1 layer{1,2,3}.{j}.{conv1,bn1,conv2,bn2} linear. Feature 64."""

    def __init__(self, depth: int, classes: int, channels: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


def thin_resnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> ThinResNet:
    """ResNet of depth 6n + 2; convolutions and head Kaiming-normal (fan in), as in the paper."""
    return ThinResNet(depth, classes, channels)
