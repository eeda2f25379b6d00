"""Networks of other packages: a teacher made of them computes and reports what plain hooks see."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastkd.nn import instrument
from fastkd.ops import bn_match_loss
from tests import torchvision_stub

TORCHVISION = ("resnet18", "resnet50", "wide_resnet50_2", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "densenet121")
TORCHVISION += ("efficientnet_b0", "shufflenet_v2_x0_5", "regnet_y_400mf", "googlenet")
TIMM = ("resnet18", "resnet26d", "seresnet18", "vgg11_bn", "mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_lite0", "densenet121")
TIMM += ("regnety_002", "repvgg_a0", "dla34", "ese_vovnet19b_dw", "skresnet18", "xception41p")

UNTRACEABLE = {("timm", "vgg11_bn")}  # it asks for the size of its map: its BatchNorms report one by one


def _made(package, name):
    torchvision_stub.define()
    pytest.importorskip(package, reason=f"{package} is not installed")
    if package == "timm":
        return importlib.import_module("timm").create_model(name, num_classes=10)
    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return importlib.import_module("torchvision.models").get_model(name, weights=None, num_classes=10, **extra)


@pytest.mark.parametrize(("package", "name"), [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM])
def test_equals_plain_hooks(package, name, settled, hooked, images):
    torch.manual_seed(0)
    net = settled(_made(package, name)).double()
    teacher, plain = instrument(net, (3, 64, 64)), hooked(net)
    assert (teacher.report[0] == "torch.fx traced the network") == ((package, name) not in UNTRACEABLE), teacher.report
    xs = [images(2, 3, torch.float64, 64).requires_grad_() for _ in range(2)]
    out = teacher(xs[0], "bn", "moments")
    logits, bn = plain(xs[1])

    def same(a, b, slack=1e-9):
        assert a.shape == b.shape and (a - b).abs().max() <= slack * b.abs().max()

    same(out.logits, logits)
    same(teacher(xs[0]).logits, logits)
    same(out.bn, bn)
    same(teacher.target, plain.target())
    same(out.moments, torch.cat([v.mean((2, 3)) for v in plain.inputs], 1))
    weight = torch.randn(2, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(y, b):
        return (y * weight).sum() / y.detach().abs().max() + bn_match_loss(b, teacher.target, teacher.split, first=10.0)

    mine, theirs = torch.autograd.grad(loss(out.logits, out.bn), xs[0])[0], torch.autograd.grad(loss(logits, bn), xs[1])[0]
    assert (mine - theirs).norm() <= 1e-8 * theirs.norm()
