"""ClassActivationMap against pytorch-grad-cam on torchvision's networks, and on small ones of every form against autograd."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import models
from fastkd.errors import InputError
from fastkd.nn import ClassActivationMap, instrument
from fastkd.nn.recorder import Recorder
from tests import torchvision_stub


class Target:
    """pytorch-grad-cam's target of a logit, as far as a class activation map looks."""

    def __init__(self, category):
        self.category = category


ClassifierOutputTarget = type("ClassifierOutputTarget", (Target,), {})
ClassifierOutputSoftmaxTarget = type("ClassifierOutputSoftmaxTarget", (Target,), {})


def _peer(name: str):
    """A module of another library; the test is skipped where that is not installed or does not load."""
    try:
        torchvision_stub.define()
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} does not load: {error}")


def _by_autograd(net, x, labels):
    """Grad-CAM as its paper has it: a backward from the logit to the map before the pooling; then scaled, resized, scaled."""
    net = copy.deepcopy(net).eval()
    maps = []
    pool = F.adaptive_avg_pool2d
    logits = None

    def watching(v, size):
        v.retain_grad()
        maps.append(v)
        return pool(v, size)

    try:
        F.adaptive_avg_pool2d = watching
        logits = net(x)
    finally:
        F.adaptive_avg_pool2d = pool
    logits.gather(1, labels[:, None]).sum().backward()
    (m,) = maps
    m = F.relu((m.grad.mean((2, 3), keepdim=True) * m).sum(1)).detach()
    out = []
    for one in m:
        one = (one - one.min()) / (one.max() - one.min()).clamp_min(1e-30)
        one = F.interpolate(one[None, None], size=x.shape[2:], mode="bilinear")[0, 0]
        out.append((one - one.min()) / (one.max() - one.min()).clamp_min(1e-30))
    return torch.stack(out)


@pytest.mark.parametrize("name", ["resnet", "chain", "mobile", "branchy", "functional"])
@pytest.mark.parametrize("through", ["network", "teacher"])
def test_maps_are_those_of_autograd(small, images, name, through):
    net, x = small(name).eval(), images()
    labels = torch.tensor([4, 0, 2, 2])
    cam = ClassActivationMap(net if through == "network" else instrument(net, shape=x.shape[1:]))
    torch.testing.assert_close(cam(x, labels), _by_autograd(net, x, labels), rtol=1e-6, atol=1e-6)


def test_targets_may_be_given_in_every_way(small, images):
    net, x = small("resnet"), images()
    with ClassActivationMap(model=net, target_layers=None) as cam:
        expected = cam(input_tensor=x, targets=torch.tensor([4, 0, 2, 2]))
        same = ([4, 0, 2, 2], [np.int64(4), torch.tensor(0), 2, 2], [ClassifierOutputTarget(c) for c in (4, 0, 2, 2)])
        for targets in same:
            assert torch.equal(cam(input_tensor=x, targets=targets), expected)
        best = net.eval()(x).argmax(1)
        assert torch.equal(cam(x), cam(x, best))
    array = np.asarray(cam(x))
    assert array.shape == (4, 16, 16) and array.min() == 0 and 0.999 < array.max() <= 1


def test_the_network_is_left_as_it_was(small, images):
    net, x = small("resnet").train(), images()
    net.bn1.eval()
    net.fc.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    cam = ClassActivationMap(net)
    found = cam(x.requires_grad_())
    assert not found.requires_grad
    assert net.training and not net.bn1.training and not net.fc.weight.requires_grad and net.fc.bias.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    with torch.no_grad():
        net.fc.weight.neg_()
    assert not torch.equal(cam(x), found)  # the network as it is now


@pytest.mark.parametrize("layer", ["layers", "layers.3"])
def test_the_layer_before_the_pooling(small, images, layer):
    net, x = small("resnet"), images()
    named = ClassActivationMap(model=net, target_layers=[net.get_submodule(layer)])
    assert torch.equal(named(x), ClassActivationMap(net)(x))
    with torch.inference_mode():
        assert torch.equal(ClassActivationMap(model=net, target_layers=[net.get_submodule(layer)])(x), named(x))


@pytest.mark.parametrize("layer", ["layers.2", "layers.3.b2", "pool", "conv1"])
def test_another_layer_is_refused(small, images, layer):
    net = small("resnet")
    with pytest.raises(InputError, match=f"target layer '{layer}' does not enter the global pooling"):
        ClassActivationMap(model=net, target_layers=[net.get_submodule(layer)])(images())
    assert not any(m._forward_hooks for m in net.modules())


def test_layers_that_cannot_be_meant(small):
    net = small("resnet")
    with pytest.raises(InputError, match="2 target layers"):
        ClassActivationMap(net, [net.layers[2], net.layers[3]])
    with pytest.raises(InputError, match="not part of the model"):
        ClassActivationMap(net, [nn.ReLU()])
    teacher = instrument(net)
    with pytest.raises(InputError, match="a Teacher has no layers"):
        ClassActivationMap(teacher, [next(teacher.children())])


@pytest.mark.parametrize("name", ["window", "squeeze", "plain"])
@pytest.mark.parametrize("through", ["network", "teacher"])
def test_other_heads_are_refused(small, images, name, through):
    net, x = small(name), images()
    cam = ClassActivationMap(net if through == "network" else instrument(net, shape=x.shape[1:]))
    with pytest.raises(InputError, match="need a head of global average pooling and a linear layer"):
        cam(x)


def test_targets_that_are_refused(small, images):
    cam, x = ClassActivationMap(small("resnet")), images()
    for targets, said in (
        ([0, 1], "2 targets for 4 images"),
        ([0, 1, 2, 5], r"targets\[3\] is class 5; expected 0 to 4 \(nearest: 4\)"),
        ([0, 1, 2, -1], r"nearest: 0"),
        ([0, 1, 2, 0.5], "is a float"),
        ([ClassifierOutputSoftmaxTarget(0)] * 4, "is a ClassifierOutputSoftmaxTarget; expected a class number or a ClassifierOutputTarget"),
        (torch.zeros(4), "int64"),
    ):
        with pytest.raises(InputError, match=said):
            cam(x, targets)
    with pytest.raises(IndexError):
        cam(x, torch.tensor([0, 1, 2, 5]))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_pytorch_grad_cam(name):
    """The library's own example: a torchvision ResNet, the last block as target layer, ClassifierOutputTarget."""
    library, targets = _peer("pytorch_grad_cam"), _peer("pytorch_grad_cam.utils.model_targets")
    torch.manual_seed(0)
    net = _peer("torchvision").models.get_model(name, weights=None)
    for m in net.modules():  # statistics of a network that has seen data: with fresh ones the maps of ResNet-50 grow without bound
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 128, 96)
    with library.GradCAM(model=net, target_layers=[net.layer4[-1]]) as theirs:
        for wanted in ([targets.ClassifierOutputTarget(281), targets.ClassifierOutputTarget(3)], None):
            expected = theirs(input_tensor=x, targets=wanted)
            with ClassActivationMap(model=net, target_layers=[net.layer4[-1]]) as ours:
                found = np.asarray(ours(input_tensor=x, targets=wanted))
            assert found.shape == expected.shape == (2, 128, 96) and found.dtype == expected.dtype
            assert expected.max() > 0.99
            np.testing.assert_allclose(found, expected, atol=2e-4)


def test_equals_torchcam():
    """torchcam's Grad-CAM at the size of the map, scaled once."""
    from fastkd.ops import class_activation_map

    methods = _peer("torchcam.methods")
    torch.manual_seed(0)
    net = _peer("torchvision").models.resnet18(weights=None).eval()
    x, labels = torch.randn(2, 3, 96, 96), [7, 3]
    with methods.GradCAM(net, net.layer4) as theirs:
        (expected,) = theirs(labels, net(x))
    with torch.no_grad():
        features = nn.Sequential(*list(net.children())[:-2])(x)
        found = class_activation_map(features, net.fc.weight, torch.tensor(labels), relu=True, norm="minmax")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_maps_of_the_stages_are_not_kept_alive():
    net, x = models.build("resnet8", classes=10).eval(), torch.randn(2, 3, 16, 16)
    kept = []
    for stages in (True, False):
        with torch.no_grad(), Recorder(x, stages=stages) as seen:
            net(x)
        kept.append(seen)
    assert len(kept[0].groups) == 3 and len(kept[1].groups) == 1 and kept[1].groups[0] is kept[1].map
    torch.testing.assert_close(kept[0].map, kept[1].map)
