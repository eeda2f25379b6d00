"""Networks of other packages and of the user's files; the packages themselves are stood in for."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from fastkd import models
from fastkd.errors import ConfigError


class Net(nn.Module):
    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 4, 3), nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(("spec", "extra"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "vision")])
def test_a_missing_package_is_one_sentence(spec, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, spec.partition(":")[0], None)  # what `import` finds is: nothing
    with pytest.raises(ConfigError, match=rf"install fastkd\[{extra}\]") as e:
        models.build(spec, classes=10)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text", ["raise RuntimeError('operator torchvision::nms does not exist')", "raise OSError('libcudart.so.13: cannot open')"]
)
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_a_broken_package_is_one_sentence(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match="installed but cannot be imported beside this torch") as e:
        models.build(f"{name}:resnet18", classes=10)
    assert "\n" not in str(e.value)


def test_timm(monkeypatch):
    calls = []
    fake = types.ModuleType("timm")
    fake.list_models = lambda: ["resnet18", "vit_tiny_patch16_224"]
    fake.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=name.startswith("vit"))
    fake.create_model = lambda name, **kw: calls.append((name, kw)) or Net(kw["num_classes"], kw["in_chans"])
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert models.build("timm:resnet18.a1_in1k", classes=7, channels=1)(torch.rand(2, 1, 8, 8)).shape == (2, 7)
    models.build("timm:vit_tiny_patch16_224", classes=7, input_size=32)
    models.build("timm:resnet18", classes=7, input_size=32)
    plain = {"pretrained": False, "num_classes": 7, "in_chans": 1}
    assert calls[0] == ("resnet18", plain)
    assert calls[1] == ("vit_tiny_patch16_224", {**plain, "in_chans": 3, "img_size": (32, 32)})  # it has a position for each patch
    assert calls[2] == ("resnet18", {**plain, "in_chans": 3})
    with pytest.raises(ConfigError, match="did you mean 'timm:resnet18'"):
        models.build("timm:resnet19", classes=7)
    with pytest.raises(ConfigError, match="would fetch something"):
        models.build("timm:hf-hub:someone/net", classes=7)


def test_torchvision(monkeypatch):
    zoo = types.ModuleType("torchvision.models")
    zoo.list_models = lambda module=None: ["resnet18"]
    zoo.get_model = lambda name, weights, num_classes: Net(num_classes, 3)
    fake = types.ModuleType("torchvision")
    fake.models = zoo
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    assert models.build("torchvision:resnet18", classes=7)(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        models.build("torchvision:resnet19", classes=7)
    with pytest.raises(ConfigError, match="take 3 channels, found 1"):
        models.build("torchvision:resnet18", classes=7, channels=1)


def write(tmp_path, text: str) -> str:
    head = "import torch\nfrom torch import nn\n"
    (tmp_path / "mine.py").write_text(head + text)
    return str(tmp_path / "mine.py")


def test_py_gives_only_what_the_function_takes(tmp_path):
    file = write(
        tmp_path,
        "def both(classes, channels=3): return nn.Sequential(nn.Flatten(), nn.Linear(channels * 4, classes))\n"
        "def bare(): return nn.Linear(1, 2)\n"
        "def size(classes, *, input_size): return nn.Linear(input_size[0], classes)\n"
        "def any_(**kw): return nn.Linear(len(kw), kw['classes'])\n",
    )
    assert models.build(f"py:{file}:both", classes=5, channels=1)(torch.rand(2, 1, 2, 2)).shape == (2, 5)
    assert models.build(f"py:{file}:bare", classes=5).out_features == 2
    assert models.build(f"py:{file}:size", classes=5, input_size=12).in_features == 12
    assert models.build(f"py:{file}:any_", classes=5).in_features == 3


def test_py_may_import_its_neighbours(tmp_path):
    (tmp_path / "beside_it.py").write_text("WIDTH = 6")
    file = write(tmp_path, "def make(classes):\n    import beside_it\n    return nn.Linear(beside_it.WIDTH, classes)\n")
    before = list(sys.path)
    assert models.build(f"py:{file}:make", classes=5).in_features == 6
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "function", "sentence"),
    [
        ("def make(): return nn.Linear(1, 2)", "mak", "did you mean 'make'"),
        ("x = 1", "make", "has no function 'make'"),
        ("def make(): raise ValueError('no\\nluck')", "make", r"'make' of .* failed \(ValueError: no\)"),
        ("def make(width): return nn.Linear(1, width)", "make", "failed .TypeError: .*width"),
        ("def make(): return 3", "make", "returned a int, expected a torch.nn.Module"),
        ("def make(:", "make", "cannot be imported .SyntaxError"),
        ("import no_such_package", "make", "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_py_errors_are_one_sentence(tmp_path, text, function, sentence):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=sentence) as e:
        models.build(f"py:{file}:{function}", classes=5)
    assert "\n" not in str(e.value)


def test_py_without_file_or_function(tmp_path):
    with pytest.raises(ConfigError, match="names no function"):
        models.build("py:mine.py", classes=5)
    with pytest.raises(ConfigError, match="there is no file"):
        models.build(f"py:{tmp_path}/none.py:make", classes=5)
