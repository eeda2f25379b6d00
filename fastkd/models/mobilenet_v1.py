"""MobileNet v1 (Howard et al. 2017) as TensorFlow's "slim" models have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import same_conv

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
EPS = 1e-3


class MobileNetV1(nn.Module):
    """Keys: conv1 conv1_bn conv_dw_{k} conv_dw_{k}_bn conv_pw_{k} conv_pw_{k}_bn conv_preds (a 1x1 convolution). Feature 1024 alpha."""

    def __init__(self, alpha: float, classes: int, channels: int):
        super().__init__()
        inputs = int(32 * alpha)
        self.conv1 = same_conv(channels, inputs, 3, 2)
        self.conv1_bn = nn.BatchNorm2d(inputs, EPS)
        for k, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True), 1):
            outputs = int(width * alpha)
            self.add_module(f"conv_dw_{k}", same_conv(inputs, inputs, 3, stride, inputs))
            self.add_module(f"conv_dw_{k}_bn", nn.BatchNorm2d(inputs, EPS))
            self.add_module(f"conv_pw_{k}", nn.Conv2d(inputs, outputs, 1, bias=False))
            self.add_module(f"conv_pw_{k}_bn", nn.BatchNorm2d(outputs, EPS))
            inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(1e-3)
        self.conv_preds = nn.Conv2d(inputs, classes, 1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
        nn.init.zeros_(self.conv_preds.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, c, H, W] → logits [N, classes]."""
        x = F.relu6(self.conv1_bn(self.conv1(x)))
        for k in range(1, len(WIDTHS) + 1):
            for kind in ("dw", "pw"):
                x = getattr(self, f"conv_{kind}_{k}")(x)
                x = F.relu6(getattr(self, f"conv_{kind}_{k}_bn")(x))
        return torch.flatten(self.conv_preds(self.dropout(self.pool(x))), 1)


def mobilenet_v1(*, alpha: float, classes: int, channels: int, input_size: tuple[int, int]) -> MobileNetV1:
    """MobileNet v1 of width `alpha`; dropout 0.001; convolutions Kaiming-normal (fan out)."""
    return MobileNetV1(alpha, classes, channels)
