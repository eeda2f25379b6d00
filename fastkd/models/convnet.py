"""ConvNet-3 of dataset condensation: the network that condensed sets are made with and tested by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.errors import ConfigError

WIDTH = 128


class ConvNet(nn.Module):
    """depth x [conv3x3, instance norm, ReLU, average pooling 2x2], flatten, linear. Keys: features.{i} classifier.

    Instance norm is a GroupNorm with one channel per group, so it keeps no statistics.
    """

    def __init__(self, depth: int, classes: int, channels: int, size: tuple[int, int]):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, *(WIDTH,) * (depth - 1)):
            layers += [nn.Conv2d(inputs, WIDTH, 3, padding=1), nn.GroupNorm(WIDTH, WIDTH), nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(WIDTH * (size[0] >> depth) * (size[1] >> depth), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] of the size it was made for → logits [N, classes]."""
        return self.classifier(torch.flatten(self.features(x), 1))


def convnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> ConvNet:
    """ConvNet-depth, width 128; PyTorch's default initialisation.

    Raises:
      ConfigError: images that the poolings would shrink to nothing.
    """
    least = 1 << depth
    if min(input_size) < least:
        raise ConfigError(f"ConvNet-{depth} needs images of at least {least} x {least} pixels, found {input_size[0]} x {input_size[1]}.")
    return ConvNet(depth, classes, channels, input_size)
