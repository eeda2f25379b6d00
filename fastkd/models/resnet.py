"""ResNets with stages 64/128/256/512: the ImageNet form with torchvision's keys, and the CIFAR form of the DFKD literature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Basic(nn.Module):
    """conv3x3(stride)-BN-ReLU-conv3x3-BN, plus the shortcut, ReLU."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, side: str, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.side = side
        self.add_module(side, _shortcut(inputs, width, stride))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + getattr(self, self.side)(x))


class Bottleneck(nn.Module):
    """conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN, plus the shortcut, ReLU."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, side: str, dilation: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
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


def _stages(net: nn.Module, depth: int, side: str, dilated: bool = False) -> int:
    """Adds layer1 … layer4 to `net`; returns the width of the last map.

    Args:
      dilated: layer3 and layer4 keep their resolution; what follows a stride that is left out is dilated in its place.
    """
    block = Basic if depth < 50 else Bottleneck
    inputs, dilation = 64, 1
    for i, (width, count) in enumerate(zip((64, 128, 256, 512), LAYERS[depth], strict=True)):
        blocks: list[nn.Module] = []
        for j in range(count):
            stride = 2 if i > 0 and j == 0 and not (dilated and i > 1) else 1
            blocks.append(block(inputs, width, stride, side, dilation))
            if dilated and i > 1 and j == 0:
                dilation *= 2
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


class Trunk(nn.Module):
    """An ImageNet ResNet up to its last map, of `width` channels at 1/32 (dilated: 1/8). 7x7 stem at stride 2, max-pooling, four stages."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, depth: int, channels: int, dilated: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.width = _stages(self, depth, "downsample", dilated)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → map [N, width, h, w]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


class ResNet(Trunk):
    """Keys: conv1 bn1 layer{1..4}.{j}.{conv*,bn*,downsample.*} fc, as torchvision's."""

    def __init__(self, depth: int, classes: int, channels: int):
        super().__init__(depth, channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.width, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        return self.fc(torch.flatten(self.avgpool(super().forward(x)), 1))  # type: ignore[no-any-return]


def cifar_resnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> CifarResNet:
    """ResNet-18/34/50 for small images, PyTorch's default initialisation."""
    return CifarResNet(depth, classes, channels)


def resnet(*, depth: int, classes: int, channels: int, input_size: tuple[int, int]) -> ResNet:
    """ResNet-18/34/50 for ImageNet; convolutions Kaiming-normal (fan out)."""
    return ResNet(depth, classes, channels)
