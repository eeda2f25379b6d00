"""Every classifier against its published form: parameters, keys, shapes, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import models

EXACT = [  # name, classes, parameters
    ("resnet20", 10, 269_722),
    ("resnet32", 10, 464_154),
    ("resnet44", 10, 658_586),
    ("resnet56", 10, 853_018),
    ("wrn16_1", 10, 175_066),
    ("wrn16_2", 10, 691_674),
    ("wrn40_1", 10, 563_930),
    ("wrn10_1", 10, 77_850),
    ("karanchahal_resnet8", 10, 89_322),
    ("karanchahal_resnet14", 10, 186_538),
    ("karanchahal_resnet20", 10, 283_754),
    ("karanchahal_resnet26", 10, 380_970),
    ("karanchahal_resnet32", 10, 478_186),
    ("karanchahal_resnet8", 100, 112_452),
    ("karanchahal_resnet14", 100, 209_668),
    ("karanchahal_resnet20", 100, 306_884),
    ("karanchahal_resnet26", 100, 404_100),
    ("karanchahal_resnet32", 100, 501_316),
    ("karanchahal_wrn10_1", 10, 77_850),
    ("karanchahal_wrn16_1", 10, 175_066),
    ("karanchahal_wrn28_1", 10, 369_498),
    ("convnet3", 10, 320_010),
    ("convnet3", 100, 504_420),
    ("resnet18", 1000, 11_689_512),
    ("resnet34", 1000, 21_797_672),
    ("resnet50", 1000, 25_557_032),
    ("mobilenet_v2", 1000, 3_504_872),
    ("squeezenet1_1", 1000, 1_235_496),
]
ROUNDED = [  # name, parameters in M at 100 classes, BN layers, sum of BN channels, feature
    ("cifar_resnet34", 21.33, 36, 8512, 512),
    ("cifar_resnet18", 11.22, 20, 4800, 512),
    ("vgg11_bn", 9.28, 8, 2752, 512),
    ("wrn40_2", 2.26, 37, 2704, 128),
    ("wrn40_1", 0.57, 37, 1360, 64),
    ("wrn16_2", 0.70, 13, 912, 128),
    ("wrn16_1", 0.18, 13, 464, 64),
]


def make(name: str, classes: int = 10, channels: int = 3) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, classes=classes, channels=channels)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("name", "classes", "parameters"), EXACT)
def test_parameters(name, classes, parameters):
    assert count(make(name, classes)) == parameters


@pytest.mark.parametrize(("name", "millions", "layers", "channels", "feature"), ROUNDED)
def test_table_of_sizes(name, millions, layers, channels, feature):
    net = make(name, 100)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert round(count(net) / 1e6, 2) == millions
    assert (len(norms), sum(m.num_features for m in norms)) == (layers, channels)
    assert [m for m in net.modules() if isinstance(m, nn.Linear)][-1].in_features == feature


@pytest.mark.parametrize(
    ("name", "millions"), [("efficientnet_lite0", 4.65), ("mobilenet_v1_x075", 2.59), ("mobilenet_v1_x025", 0.47), ("wrn40_2", 2.26)]
)
def test_rounded_parameters(name, millions):
    assert round(count(make(name, 100 if name == "wrn40_2" else 1000)) / 1e6, 2) == millions


def test_squeezed_widths_follow_alpha():
    assert make("mobilenet_v1_x050").conv_preds.in_channels == 512
    assert make("mobilenet_v1_x100", 1000).conv_dw_1.in_channels == 32
    assert count(make("mobilenet_v1_x100", 1000)) == 4_231_976  # 4.2 M in the paper


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet20", {"conv1.weight", "bn1.weight", "layer3.2.conv2.weight", "layer1.0.bn1.running_var", "linear.bias"}),
        ("cifar_resnet18", {"layer2.0.shortcut.0.weight", "layer4.1.bn2.bias", "linear.weight"}),
        ("resnet50", {"layer1.0.downsample.0.weight", "layer4.2.conv3.weight", "layer2.0.downsample.1.running_mean", "fc.weight"}),
        ("mobilenet_v2", {"features.0.0.weight", "features.1.conv.0.0.weight", "features.2.conv.1.1.bias", "classifier.1.bias"}),
        ("mobilenet_v2", {"features.1.conv.1.weight", "features.17.conv.3.running_var", "features.18.1.weight"}),
        ("squeezenet1_1", {"features.0.weight", "features.3.squeeze.bias", "features.12.expand3x3.weight", "classifier.1.bias"}),
        ("wrn40_2", {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.weight", "bn1.weight", "fc.bias"}),
        ("karanchahal_wrn16_1", {"layer2.layer.0.convShortcut.weight", "linear.bias"}),
        ("vgg11_bn", {"block0.0.bias", "block4.4.running_mean", "classifier.weight"}),
        ("lenet5", {"conv3.weight", "fc1.weight", "fc2.bias"}),
    ],
)
def test_keys(name, keys):
    assert keys <= make(name).state_dict().keys()


def test_option_a_has_no_parameters_and_pads_both_sides():
    net = models.build("resnet20", classes=10)
    assert not any("shortcut" in k for k in net.state_dict())
    x = torch.rand(2, 16, 8, 8)
    y = net.layer2[0].shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and y[:, :8].abs().sum() == 0 and y[:, 24:].abs().sum() == 0


def test_wide_block_shortcuts():
    net = models.build("wrn16_1", classes=10).eval()
    first, wider = net.block1.layer[0], net.block2.layer[0]
    assert first.convShortcut is None
    for block in (first, wider):
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(first(x), x)  # the raw input, not the activated one
    u = F.relu(wider.bn1(x))
    torch.testing.assert_close(wider(x), F.conv2d(u, wider.convShortcut.weight, stride=2))


def test_no_relu_between_the_blocks_of_a_karanchahal_stage():
    net = models.build("karanchahal_resnet14", classes=10).eval()
    maps: list[torch.Tensor] = []
    net.layer1[0].register_forward_hook(lambda m, a, y: maps.append(y))
    net.layer2[0].register_forward_pre_hook(lambda m, a: maps.append(a[0]))
    net(torch.randn(2, 3, 32, 32))
    assert maps[0].min() < 0 <= maps[1].min()


@pytest.mark.parametrize(("size", "expected"), [(32, 4), (64, 4), (96, 12)])
def test_vgg_pools_once_more_only_at_height_64(size, expected):
    net = models.build("vgg11_bn", classes=10).eval()
    seen = []
    net.block4.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape[2:])))
    with torch.no_grad():
        net(torch.rand(1, 3, size, size))
    assert seen == [(expected, expected)]


@pytest.mark.parametrize(
    ("name", "expected"), [("mobilenetv2_s1", 2), ("mobilenetv2_s2", 1), ("mobilenet_v2", 1), ("cifar_resnet18", 4), ("wrn16_1", 8)]
)
def test_map_before_the_pooling_at_32(name, expected):
    net = models.build(name, classes=10).eval()
    seen = []
    pool = next(m for m in net.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[2:])))
    with torch.no_grad():
        net(torch.rand(1, 3, 32, 32))
    assert seen == [(expected, expected)]


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("squeezenet1_1", 0.5),
        ("mobilenet_v2", 0.2),
        ("mobilenetv2_s1", 0.2),
        ("efficientnet_lite0", 0.2),
        ("mobilenet_v1_x025", 1e-3),
        ("wrn40_2", None),
    ],
)
def test_dropout_as_published(name, rate):
    rates = [m.p for m in make(name).modules() if isinstance(m, nn.Dropout)]
    assert rates == ([rate] if rate else [])


@pytest.mark.parametrize("name", ["wrn16_2", "vgg11_bn"])
def test_normal_initialisation(name):
    torch.manual_seed(0)
    net = models.build(name, classes=10)
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000:
            expected = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
            assert abs(m.weight.std().item() / expected - 1) < 0.05
            assert m.bias is None or m.bias.abs().sum() == 0
        if isinstance(m, nn.Linear):
            assert m.bias.abs().sum() == 0
    if name == "vgg11_bn":
        assert abs(net.classifier.weight.std().item() / 0.01 - 1) < 0.05


def test_convnet_norm_is_per_instance_and_channel():
    norms = [m for m in make("convnet3").modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels, m.affine) for m in norms] == [(128, 128, True)] * 3
