"""MobileNetV2 (Sandler et al. 2018), with torchvision's keys and either stem stride."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, width, blocks, stride of the first block."""


def _unit(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1, pad: bool = True
) -> nn.Sequential:
    padding = dilation * (kernel // 2) if pad else 0
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; the sum with the input where the shape stays.

    Args:
      pad_input: zeros are put around the input of the block, not of its depthwise convolution, so that they pass the expansion with its
        BatchNorm (as DFAD's segmentation networks have it).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, dilation: int = 1, pad_input: bool = False):
        super().__init__()
        hidden = inputs * expand
        self.residual, self.pad = stride == 1 and inputs == outputs, dilation if pad_input else 0
        layers: list[nn.Module] = [_unit(inputs, hidden, 1)] if expand != 1 else []
        layers += [
            _unit(hidden, hidden, 3, stride, hidden, dilation, not pad_input),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x, [self.pad] * 4) if self.pad else x)
        return x + y if self.residual else y


def blocks(channels: int, stem_stride: int, output_stride: int = 32, pad_input: bool = False) -> list[nn.Module]:
    """The stem and the 17 blocks, up to a map of 320 channels.

    Args:
      output_stride: beyond it no row shrinks the map; a stride that is left out dilates the rows behind it.
      pad_input: see `InvertedResidual`.
    """
    layers: list[nn.Module] = [_unit(channels, 32, 3, stem_stride)]
    inputs, at, dilation = 32, stem_stride, 1
    for expand, width, count, stride in ROWS:
        kept = at * stride > output_stride
        for i in range(count):
            step = stride if i == 0 and not kept else 1
            layers.append(InvertedResidual(inputs, width, step, expand, dilation, pad_input))
            inputs = width
        at, dilation = (at, dilation * stride) if kept else (at * stride, dilation)
    return layers


class MobileNetV2(nn.Module):
    """Keys: features.{0..18}.… classifier.1, as torchvision's. Feature 1280."""

    def __init__(self, classes: int, channels: int, stem_stride: int):
        super().__init__()
        self.features = nn.Sequential(*blocks(channels, stem_stride), _unit(320, 1280, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def mobilenet_v2(*, classes: int, channels: int, input_size: tuple[int, int], stem_stride: int = 2) -> MobileNetV2:
    """MobileNetV2, width 1, dropout 0.2. With stem stride 2 a 32x32 image reaches 1x1 before the pooling."""
    return MobileNetV2(classes, channels, stem_stride)
