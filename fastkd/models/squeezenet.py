"""SqueezeNet 1.1 (Iandola et al. 2016), with torchvision's keys: no BatchNorm, and a classifier on the map instead of a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.errors import ConfigError

POOLED = ((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256))
"""Squeezed width and that of each of the two expansions, of the Fire modules behind each pooling."""


SMALLEST = 17


class Fire(nn.Module):
    """1x1 to few channels, then 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.squeeze(x))
        return torch.cat((self.act(self.expand1x1(x)), self.act(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """Keys: features.{0,3,4,6,7,9..12}.… classifier.1, as torchvision's. Feature 512 channels."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, 2), nn.ReLU()]
        width = 64
        for fires in POOLED:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for squeezed, expanded in fires:
                layers.append(Fire(width, squeezed, expanded))
                width = 2 * expanded
        self.features = nn.Sequential(*layers)
        last = nn.Conv2d(width, classes, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.5), last, nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                if m is last:
                    nn.init.normal_(m.weight, 0, 0.01)
                else:
                    nn.init.kaiming_uniform_(m.weight)
                nn.init.zeros_(m.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W], at least 17 x 17 → logits [N, classes], none of them negative."""
        return torch.flatten(self.avgpool(self.classifier(self.features(x))), 1)


def squeezenet1_1(*, classes: int, channels: int, input_size: tuple[int, int]) -> SqueezeNet:
    """SqueezeNet 1.1, dropout 0.5. A 32x32 image is 1x1 before the classifier.

    Raises:
      ConfigError: images smaller than 17x17, which its poolings leave nothing of.
    """
    if min(input_size) < SMALLEST:
        h, w = input_size
        raise ConfigError(f"SqueezeNet needs images of at least {SMALLEST} x {SMALLEST} pixels, found {h} x {w}; resize to {SMALLEST}.")
    return SqueezeNet(classes, channels)
