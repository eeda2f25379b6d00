"""`fastkd models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastkd import models
from tests.cli.conftest import one_sentence

CONSTANTS = ("--mean", "0.4", "--std", "0.3", "--input-size", "16", "--channels", "1", "--classes", "4")


def test_lists_every_network_and_prefix(cli) -> None:
    listed = json.loads(cli("models", "--json").stdout)
    assert [row["name"] for row in listed] == models.names() and all(row["what"] for row in listed)
    said = cli("models").stdout
    assert all(f"{prefix}:" in said for prefix in models.PREFIXES)


@pytest.mark.parametrize("spec", ["resnet20", "wrn16_1", "mobilenet_v1_x025"])
def test_describes_a_network_without_weights(cli, spec: str) -> None:
    done = cli("models", spec, "--json")
    assert done.exit_code == 0, done.stderr
    described = json.loads(done.stdout)
    size = models.MODELS[spec].input_size
    net = models.build(spec, classes=described["classes"], channels=3, input_size=size)
    assert described["parameters"] == sum(p.numel() for p in net.parameters())
    assert described["bn_layers"] == sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())


def test_options_reach_the_network(cli) -> None:
    described = json.loads(cli("models", "resnet8", "--classes", 7, "--channels", 1, "--input-size", 16, "--json").stdout)
    assert described["classes"] == 7 and described["shape"] == [1, 16, 16]


def test_converts_once_and_then_needs_no_option(cli, tmp_path: Path) -> None:
    net = models.build("resnet8", classes=4, channels=1, input_size=16)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pth")
    done = cli("models", "resnet8", "--teacher-weights", tmp_path / "a.pth", *CONSTANTS, "--save", tmp_path / "a.safetensors", "--json")
    assert done.exit_code == 0, done.stderr
    again = cli("models", "--model-weights", tmp_path / "a.safetensors", "--json")
    assert again.exit_code == 0, again.stderr
    described = json.loads(again.stdout)
    assert (described["spec"], described["classes"], described["shape"]) == ("resnet8", 4, [1, 16, 16])
    assert described["mean"] == pytest.approx([0.4]) and described["std"] == pytest.approx([0.3])
    state = models.load_weights(tmp_path / "a.safetensors").state
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    before = (tmp_path / "a.safetensors").read_bytes()
    twice = cli("models", "resnet8", "--teacher-weights", tmp_path / "a.pth", *CONSTANTS, "--save", tmp_path / "a.safetensors")
    assert twice.exit_code == 2 and "not overwritten" in one_sentence(twice.stderr) and (tmp_path / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["resnt20"], 2, "resnet20"),
        (["--save", "a.safetensors"], 2, "--save is of one network"),
        (["--input-size", "32"], 2, "--input-size is of one network"),
        (["resnet20", "--save", "a.safetensors"], 2, "--model-weights"),
        (["resnet20", "--model-weights", "gone.pt", "--save", "a.pt"], 2, ".safetensors"),
        (["resnet20", "--model-weights", "gone.pt"], 4, "gone.pt"),
        (["resnet20", "--classes", "1"], 2, "classes is 1"),
        (["resnet20", "--classes", "1000000000"], 7, "memory"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("models", *words)
    assert done.exit_code == code and said in one_sentence(done.stderr), done.stderr
    assert not list(tmp_path.iterdir())
