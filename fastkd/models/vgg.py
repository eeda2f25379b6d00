"""VGG-11 with BatchNorm, as the data-free literature uses it on 32x32 and 64x64 images."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .layers import PoolIfHeight, kaiming


class Vgg(nn.Module):
    """Keys: block{0..4}.{i} classifier. Feature 512. Groups 3 and 4 work at 4x4 both for 32x32 and for 64x64 images."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.block0 = _group(channels, 64)
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _group(64, 128)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _group(128, 256, 256)
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _group(256, 512, 512)
        self.pool3 = PoolIfHeight(64)
        self.block4 = _group(512, 512, 512)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, classes)
        kaiming(self, linear_std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        """Images [N, c, H, W] with H, W >= 8 → logits [N, classes]."""
        x = self.pool0(self.block0(image))
        x = self.pool1(self.block1(x))
        x = self.pool2(self.block2(x))
        x = self.pool3(self.block3(x), image)
        return self.classifier(torch.flatten(self.pool(self.block4(x)), 1))


def _group(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def vgg11_bn(*, classes: int, channels: int, input_size: tuple[int, int]) -> Vgg:
    """VGG-11-BN; convolutions with bias."""
    return Vgg(classes, channels)
