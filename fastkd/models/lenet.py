"""LeNet-5 in the form of DAFL and PRE-DFKD: no padding, 32x32 images (MNIST resized)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import ConfigError


class LeNet5(nn.Module):
    """Keys: conv1 conv2 conv3 fc1 fc2. The published penultimate feature is what enters `fc1` (120, or 60)."""

    def __init__(self, classes: int, channels: int, widths: tuple[int, int, int, int]):
        super().__init__()
        a, b, c, hidden = widths
        self.conv1 = nn.Conv2d(channels, a, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(a, b, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(b, c, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)  # on 32x32 images the map is 1x1 already
        self.fc1 = nn.Linear(c, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W], H and W at least 32 → logits [N, classes]."""
        x = self.pool1(F.relu(self.conv1(x)))
        x = self.pool2(F.relu(self.conv2(x)))
        x = torch.flatten(self.pool(F.relu(self.conv3(x))), 1)
        return self.fc2(F.relu(self.fc1(x)))


def lenet5(*, classes: int, channels: int, input_size: tuple[int, int], half: bool = False) -> LeNet5:
    """LeNet-5, or LeNet-5-Half; PyTorch's default initialisation.

    Raises:
      ConfigError: images smaller than 32x32.
    """
    if min(input_size) < 32:
        raise ConfigError(f"LeNet-5 needs images of at least 32 x 32 pixels, found {input_size[0]} x {input_size[1]}; resize them to 32.")
    return LeNet5(classes, channels, (3, 8, 60, 42) if half else (6, 16, 120, 84))
