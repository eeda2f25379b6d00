"""DeepLabV3 (Chen et al., arXiv 1706.05587): a dilated trunk at 1/8, atrous spatial pyramid pooling, class maps enlarged to the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mobilenet_v2 import blocks
from .resnet import Trunk

WIDTH = 256


def _unit(inputs: int, kernel: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution to 256 channels that keeps the size of the map, BN, ReLU."""
    conv = nn.Conv2d(inputs, WIDTH, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(WIDTH), nn.ReLU()]


class Pooled(nn.Sequential):
    """The mean over the map through a 1x1 convolution, spread over the map again."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        return F.interpolate(super().forward(x), size=size, mode="bilinear", align_corners=False)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 convolution, three dilated 3x3 ones and the pooled map side by side, then 1x1 and dropout."""

    def __init__(self, inputs: int, rates: tuple[int, ...]):
        super().__init__()
        dilated = [nn.Sequential(*_unit(inputs, 3, rate)) for rate in rates]
        pooled = Pooled(nn.AdaptiveAvgPool2d(1), *_unit(inputs))
        self.convs = nn.ModuleList([nn.Sequential(*_unit(inputs)), *dilated, pooled])
        self.project = nn.Sequential(*_unit(len(self.convs) * WIDTH), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, h, w] → [N, 256, h, w]."""
        return self.project(torch.cat([conv(x) for conv in self.convs], 1))  # type: ignore[no-any-return]


class DeepLabV3(nn.Module):
    """Keys: backbone.… classifier.{0,1,2,4}.…, as torchvision's. The feature is what enters the last 1x1 convolution, 256 wide."""

    def __init__(self, trunk: nn.Module, width: int, classes: int, rates: tuple[int, ...]):
        super().__init__()
        self.backbone = trunk
        self.classifier = nn.Sequential(Aspp(width, rates), *_unit(WIDTH, 3), nn.Conv2d(WIDTH, classes, 1))
        for name, m in self.named_modules():
            if isinstance(m, nn.Conv2d):  # the head by fan in, so that the first logits are small
                nn.init.kaiming_normal_(m.weight, mode="fan_out" if name.startswith("backbone.") else "fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes, H, W]."""
        size = x.shape[-2:]
        return F.interpolate(self.classifier(self.backbone(x)), size=size, mode="bilinear", align_corners=False)


class Features(nn.Module):
    """MobileNetV2 up to its map of 320 channels, under the keys of torchvision."""

    def __init__(self, channels: int, pad_input: bool):
        super().__init__()
        self.features = nn.Sequential(*blocks(channels, 2, output_stride=8, pad_input=pad_input))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → map [N, 320, H/8, W/8]."""
        return self.features(x)  # type: ignore[no-any-return]


def deeplabv3(
    *,
    trunk: str,
    classes: int,
    channels: int,
    input_size: tuple[int, int],
    rates: tuple[int, ...] = (12, 24, 36),
    pad_input: bool = False,
) -> DeepLabV3:
    """DeepLabV3 on `resnet50` or `mobilenet_v2`, without an auxiliary head; images of any size.

    Args:
      rates: dilations of the pyramid; torchvision and FastDFKD 12/24/36, DFAD 12/24/32.
      pad_input: of MobileNetV2's blocks, see `mobilenet_v2.InvertedResidual`.
    """
    if trunk == "resnet50":
        net = Trunk(50, channels, dilated=True)
        return DeepLabV3(net, net.width, classes, rates)
    return DeepLabV3(Features(channels, pad_input), 320, classes, rates)
