"""EfficientNet-Lite0 (Google 2020): EfficientNet-B0 without squeeze-and-excitation, with ReLU6 and a fixed stem and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import same_conv

ROWS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
"""Blocks, kernel, stride of the first block, expansion, width."""
EPS = 1e-3


class Block(nn.Module):
    """1x1 expansion, depthwise, linear 1x1; the sum with the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        self.expand, self.residual = expand != 1, stride == 1 and inputs == outputs
        if self.expand:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, EPS)
        self._depthwise_conv = same_conv(hidden, hidden, kernel, stride, hidden)
        self._bn1 = nn.BatchNorm2d(hidden, EPS)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expand else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Feature 1280.

    Keys: _conv_stem _bn0 _blocks.{0..15}.{_expand_conv,_bn0,_depthwise_conv,_bn1,_project_conv,_bn2} _conv_head _bn1 _fc.
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self._conv_stem = same_conv(channels, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, EPS)
        blocks: list[nn.Module] = []
        inputs = 32
        for count, kernel, stride, expand, width in ROWS:
            for i in range(count):
                blocks.append(Block(inputs, width, kernel, stride if i == 0 else 1, expand))
                inputs = width
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, EPS)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(1280, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.zeros_(self._fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        x = F.relu6(self._bn1(self._conv_head(self._blocks(x))))
        return self._fc(self.dropout(torch.flatten(self.pool(x), 1)))


def efficientnet_lite0(*, classes: int, channels: int, input_size: tuple[int, int]) -> EfficientNetLite0:
    """EfficientNet-Lite0, dropout 0.2, no stochastic depth; convolutions Kaiming-normal (fan out)."""
    return EfficientNetLite0(classes, channels)
