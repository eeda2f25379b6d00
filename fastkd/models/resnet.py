"""ResNets with stages 64/128/256/512: the ImageNet form with torchvision's keys, and the CIFAR form of the DFKD literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Basic(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, plus the shortcut, ReLU."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, side: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.side = side
        self.add_module(side, _shortcut(inputs, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + getattr(self, self.side)(x))


class Bottleneck(nn.Module):
    """conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN, plus the shortcut, ReLU."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, side: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.side = side
        self.add_module(side, _shortcut(inputs, 4 * width, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + getattr(self, self.side)(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """1x1 convolution and BatchNorm where the shape changes, else nothing (and no keys)."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _stages(net: nn.Module, depth: int, side: str) -> int:
    """Adds layer1 … layer4 to `net`; returns the width of the last map."""
    block = Basic if depth < 50 else Bottleneck
    inputs = 64
    for i, (width, count) in enumerate(zip((64, 128, 256, 512), LAYERS[depth], strict=True)):
        blocks: list[nn.Module] = []
        for j in range(count):
            blocks.append(block(inputs, width, 2 if i > 0 and j == 0 else 1, side))
            inputs = width * block.expansion
        net.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
    return inputs


class CifarResNet(nn.Module):
    """3x3 stem with stride 1, no max-pooling. Keys: conv1 bn1 layer{1..4}.{j}.{conv*,bn*,shortcut.*} linear. Feature 512 (2048)."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, depth: int, classes: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = _stages(self, depth, "shortcut")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(self.pool(x), 1))


class ResNet(nn.Module):
    """7x7 stem with stride 2 and max-pooling. Keys: conv1 bn1 layer{1..4}.{j}.{conv*,bn*,downsample.*} fc, as torchvision's."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, depth: int, classes: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width = _stages(self, depth, "downsample")
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> CifarResNet:
    """ResNet-18/34/50 for small images, PyTorch's default initialisation."""
    return CifarResNet(depth, classes, channels)


def resnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> ResNet:
    """ResNet-18/34/50 for ImageNet; convolutions Kaiming-normal (fan out)."""
    return ResNet(depth, classes, channels)
