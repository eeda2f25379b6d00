"""The table of names, and what `build` refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from fastkd import models
from fastkd.errors import ConfigError

SMALL = [n for n, e in models.MODELS.items() if e.input_size <= 64]
DENSE = [n for n, e in models.MODELS.items() if e.family == "segmentation"]
IMAGENET = [n for n, e in models.MODELS.items() if e.input_size == 224]


class Tracer(fx.Tracer):
    """As the instrument's: modules whose forward depends on shapes are leaves."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return getattr(m, "fx_leaf", False) or super().is_leaf_module(m, name)


def test_the_table_needs_no_torch():
    code = "import sys, fastkd.models as m; assert len(m.names()) > 30 and m.GENERATORS and m.PREFIXES; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks_give_logits_in_the_default_dtype(name, channels, fp64):
    entry = models.MODELS[name]
    net = models.build(name, classes=7, channels=channels).eval()
    x = torch.rand(2, channels, entry.input_size, entry.input_size)
    y = net(x)
    assert y.shape == (2, 7) and y.dtype == torch.float64 and torch.isfinite(y).all()
    traced = fx.GraphModule(net, Tracer().trace(net))
    assert torch.equal(traced(x), y)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_give_logits_and_trace(name):
    net = models.build(name, classes=5, channels=1).eval()
    x = torch.rand(1, 1, 96, 64)
    with torch.no_grad():
        y = net(x)
        assert y.shape == (1, 5) and torch.isfinite(y).all()
        assert torch.equal(fx.GraphModule(net, Tracer().trace(net))(x), y)


@pytest.mark.parametrize("name", [n for n in models.names() if "karanchahal_resnet" not in n and "convnet" not in n and n not in DENSE])
def test_the_pooling_is_a_module_that_can_be_found(name):
    with torch.device("meta"):
        net = models.build(name, classes=5)
    pools = [n for n, m in net.named_modules() if isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size == 1]
    assert pools in (["pool"], ["avgpool"])


@pytest.mark.parametrize("name", ["resnet20", "cifar_resnet18", "wrn16_1", "vgg11_bn", "mobilenetv2_s1", "convnet3"])
def test_digits_of_8x8_pass(name):
    net = models.build(name, classes=10, channels=1, input_size=8)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("resnt20", "did you mean 'resnet20'"),
        ("google/vit-base", "needs a prefix.*did you mean 'timm:vit-base'"),
        ("someone/resnet20", "did you mean 'resnet20'"),
        ("pytorch/vision", "did you mean 'torchvision:vision'"),
        ("nets/mine.py:make", "did you mean 'py:nets/mine.py:make'"),
        ("nets/mine.py", "did you mean 'py:nets/mine.py:FUNCTION'"),
        ("runs/teacher.pth", "is a file of weights"),
        ("tim:resnet18", "unknown model prefix 'tim'; did you mean 'timm'"),
        ("timm:", "nothing stands behind"),
        ("ckpt:runs/a", "only the commands of a run"),
    ],
)
def test_other_names_are_refused_with_the_nearest(spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        models.build(spec, classes=10)


def test_a_folder_is_taken_for_a_run(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'ckpt:"):
        models.build(str(tmp_path), classes=10)


def test_values_are_checked():
    for kw, sentence in (
        ({"classes": 1}, "at least 2 classes, found 1"),
        ({"classes": 10, "channels": 0}, "at least 1 channel"),
        ({"classes": 10, "input_size": 0}, "must be positive"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            models.build("resnet20", **kw)
    for name, size in (("lenet5", 28), ("convnet3", 7), ("karanchahal_resnet8", 8), ("squeezenet1_1", 16)):
        with pytest.raises(ConfigError, match=f"found {size} x {size}"):
            models.build(name, classes=10, input_size=size)


def test_the_page_names_every_network():
    page = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    for name in (*models.MODELS, *models.GENERATORS, *models.ENCODERS):
        assert f"| `{name}` |" in page, name
    for name in models.PREFIXES:
        assert f"| `{name}:" in page, name
