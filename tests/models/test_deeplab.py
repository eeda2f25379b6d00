"""DeepLabV3: shapes, published parts, and equality with torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkd import models
from fastkd.models.mobilenet_v2 import InvertedResidual
from fastkd.nn import Student, instrument
from tests import torchvision_stub

NAMES = [n for n in models.names() if n.startswith("deeplabv3")]


@pytest.fixture(scope="module")
def theirs():
    """torchvision's networks."""
    torchvision_stub.define()
    return pytest.importorskip("torchvision.models.segmentation", reason="torchvision is not installed", exc_type=ImportError)


def test_the_residual_form_has_torchvisions_keys_and_outputs(theirs):
    torch.manual_seed(0)
    other = theirs.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=13, aux_loss=None)
    for m in other.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.1, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    net = models.build("deeplabv3_resnet50", classes=13)
    assert list(net.state_dict()) == list(other.state_dict())
    net.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 40, 52)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), other.eval()(x)["out"])


@pytest.mark.parametrize("name", NAMES)
def test_a_logit_for_each_class_and_pixel_whatever_the_size(name):
    net = models.build(name, classes=5, channels=1).eval()
    with torch.no_grad():
        for h, w in ((32, 32), (33, 47)):
            y = net(torch.rand(1, 1, h, w))
            assert y.shape == (1, 5, h, w) and torch.isfinite(y).all()
        trunk = net.backbone(torch.rand(1, 1, 64, 40))
    assert trunk.shape[2:] == (8, 5)  # output stride 8
    assert net.classifier[0].project[3].p == 0.5


@pytest.mark.parametrize(("name", "parameters"), [("deeplabv3_resnet50", 39_636_813), ("deeplabv3_mobilenet_v2", 5_111_821)])
def test_both_forms_have_the_same_weights_and_other_rates(name, parameters):
    with torch.device("meta"):
        plain, dfad = models.build(name, classes=13), models.build(f"{name}_dfad", classes=13)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in dfad.parameters()) == parameters
    rates = [[c[0].dilation[0] for c in net.classifier[0].convs[1:4]] for net in (plain, dfad)]
    assert rates == [[12, 24, 36], [12, 24, 32]]
    assert plain.state_dict().keys() == dfad.state_dict().keys()


def test_dilations_stand_in_for_the_strides_that_are_left_out():
    with torch.device("meta"):
        residual, mobile = (models.build(n, classes=5).backbone for n in ("deeplabv3_resnet50", "deeplabv3_mobilenet_v2"))
    stages = [[b.conv2.dilation[0] for b in getattr(residual, f"layer{i}")] for i in range(1, 5)]
    assert stages == [[1] * 3, [1] * 4, [1] + [2] * 5, [2] + [4] * 2]  # as torchvision: the first block has the dilation before it
    depthwise = [m for m in mobile.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.dilation[0] for m in depthwise] == [1] * 10 + [2] * 3 + [2] * 3 + [4]
    assert [m.stride[0] for m in depthwise] == [1, 2, 1, 2] + [1] * 13


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1)])
def test_dfads_padding_passes_the_expansion(stride, dilation):
    torch.manual_seed(0)
    plain, padded = (InvertedResidual(4, 4, stride, 6, dilation, pad).eval() for pad in (False, True))
    padded.load_state_dict(plain.state_dict())
    for bias in (0.0, 1.0):
        for block in (plain, padded):
            nn.init.constant_(block.conv[0][1].bias, bias)
        x = torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            a, b = plain(x), padded(x)
        assert a.shape == b.shape
        inner = slice(dilation, -dilation) if stride == 1 else slice(1, None)
        torch.testing.assert_close(a[..., inner, inner], b[..., inner, inner])
        assert torch.allclose(a, b) == (bias == 0)  # with a bias the border of zeros becomes one of ones


@pytest.mark.parametrize("name", NAMES)
def test_teacher_and_student_read_all_of_it(name):
    torch.manual_seed(0)
    net = models.build(name, classes=5).eval()
    teacher, student = instrument(net, shape=(3, 32, 32)), Student(net, shape=(3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, t, s = net(x), teacher(x, "bn"), student.trace(x)
    torch.testing.assert_close(t.logits, logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(s.logits, logits) and s.feature.shape == (2, 256)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert len(teacher.split) - 1 == norms and t.bn.shape == (2, teacher.split[-1])
    assert teacher.report[0] == student.report[0] == "torch.fx traced the network"
