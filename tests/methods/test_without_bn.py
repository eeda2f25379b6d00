"""Teachers without BatchNorm (GroupNorm, a ConvNeXt block, a small ViT): what works runs, what does not says so before it starts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastkd import assemble, config, methods, models
from fastkd.errors import ConfigError, InputError
from fastkd.nn import instrument
from tests import small, torchvision_stub

NETS = """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(d), nn.MultiheadAttention(d, 2, batch_first=True), nn.Linear(d, d)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + nn.functional.gelu(self.mlp(x))


class ViT(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.patches, self.position = nn.Conv2d(channels, 16, 4, 4), nn.Parameter(0.02 * torch.randn(1, 17, 16))
        self.first, self.blocks = nn.Parameter(torch.zeros(1, 1, 16)), nn.Sequential(Attention(16), Attention(16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        assert x.shape[1] == 16, "made for 16 x 16 images"
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvNeXt(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(channels, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def vit(classes, channels):
    return ViT(classes, channels)


def convnext(classes, channels):
    return ConvNeXt(classes, channels)
"""
NEED_BN = [n for n in methods.names() if "bn" in methods.method_class(n).needs]
FREE = [n for n in methods.names() if "bn" not in methods.method_class(n).needs]


@pytest.fixture(scope="module", params=["convnet3", "vit", "convnext"])
def teacher(request, tmp_path_factory) -> dict[str, str]:
    """The options of a teacher with random weights, 16 px, 1 channel, 4 classes; `convnet3` is of GroupNorm."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "nets.py").write_text(NETS)
    spec = request.param if request.param in models.MODELS else f"py:{folder / 'nets.py'}:{request.param}"
    return saved(spec, folder / "teacher.safetensors", 1, 16)


def saved(spec: str, file, channels: int, size: int) -> dict[str, str]:
    torch.manual_seed(0)
    net = models.build(spec, classes=4, channels=channels, input_size=size)
    said = assemble.metadata(spec, 4, (channels, size, size), (0.4,) * channels, (0.3,) * channels, None)
    models.save_weights(file, net.state_dict(), said)
    return {"spec": spec, "weights": str(file)}


def job(name: str, teacher: dict[str, str], real=None, **over):
    """A small run of a method; ZSKT's attention transfer is off unless asked for: these teachers' stages are not those of the student."""
    known = {f.name for f in dataclasses.fields(methods.method_class(name))}
    fields = {k: v for k, v in {**small.FIELDS, "epochs": 2, **({"beta": 0.0} if name == "zskt" else {}), **over}.items() if k in known}
    table = {"name": name, **fields}
    return config.build({"method": table, "teacher": teacher, "student": {"spec": "wrn10_1"}, "real": real and str(real), "device": "cpu"})


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder of random grey images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("real")
    for i, pixels in enumerate(torch.randint(256, (8, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))):
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", NEED_BN)
def test_what_needs_batchnorm_says_so_and_names_what_works(name: str, teacher) -> None:
    with pytest.raises(ConfigError) as e:
        assemble.make_job(job(name, teacher))
    said = str(e.value)
    assert said.startswith(f"method '{name}' needs a teacher with BatchNorm, and this one has none; methods that work without: dafl, dfad")
    assert all(free in said for free in FREE) and "--set method.bn=0" in said and "\n" not in said


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_need_it_runs(name: str, teacher, real) -> None:
    outcome = assemble.distil(job(name, teacher, real if name == "vanilla_kd" else None), None)
    assert outcome.code == 0 and outcome.summary["student"]["spec"] == "wrn10_1"


@pytest.mark.parametrize("name", NEED_BN)
def test_without_the_batchnorm_term_the_others_run_too(name: str, teacher) -> None:
    """So do MUSE and CMI once the terms are off that these teachers cannot give, and CDE without a condensed set; until then one sentence
    names the setting."""
    off = {"muse": {"a_cam": 0.0}, "cmi": {"cr": 0.0}, "cde": {"lambda_fa": 0.0}}.get(name, {})
    if name == "muse" and teacher["spec"].endswith("convnext"):
        off = {}  # a map, global pooling and a linear head: CAM is exact
    if off:
        with pytest.raises(ConfigError, match=rf"--set method.{next(iter(off))}=0|or method.{next(iter(off))}=0"):
            assemble.distil(job(name, teacher, bn=0.0), None)
    assert assemble.distil(job(name, teacher, bn=0.0, **off), None).code == 0


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("classes, sentence", [(1, "teacher.classes is 1"), (4, "the teacher gives 1 answers an image, there are 4 cl")])
def test_a_single_class_is_refused_before_anything_is_built(name: str, classes: int, sentence: str, tmp_path) -> None:
    """Said, or found out: a network with one answer."""
    (tmp_path / "nets.py").write_text(NETS.replace("nn.Linear(8, classes)", "nn.Linear(8, 1)"))
    spec = f"py:{tmp_path / 'nets.py'}:convnext"
    models.save_weights(tmp_path / "one.safetensors", models.build(spec, classes=4, channels=1).state_dict())
    known = {"input_size": 16, "channels": 1, "mean": [0.4], "std": [0.3], "classes": classes}
    with pytest.raises(ConfigError, match=sentence):
        assemble.make_job(job(name, {"spec": spec, "weights": str(tmp_path / "one.safetensors"), **known}))


def test_images_that_the_teacher_cannot_take_are_one_sentence(tmp_path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    net = models.build(f"py:{tmp_path / 'nets.py'}:vit", classes=4, channels=1)
    with pytest.raises(InputError, match=r"does not take images of shape \(1, 32, 32\).*made for 16 x 16"):
        instrument(net, (1, 32, 32))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_networks_of_timm(name: str, tmp_path) -> None:
    torchvision_stub.define()
    pytest.importorskip("timm", reason="timm is not installed")
    teacher = saved(f"timm:{name}", tmp_path / "teacher.safetensors", 3, 32)
    for method in ("dfad", "pre"):
        assert assemble.distil(job(method, teacher, epochs=1), None).code == 0
    with pytest.raises(ConfigError, match="methods that work without"):
        assemble.make_job(job("muse", teacher))
