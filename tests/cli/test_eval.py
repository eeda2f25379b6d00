"""`fastkd eval`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import one_sentence


@pytest.mark.parametrize(
    ("spec", "name", "top1"), [("resnet20", "akamaster_resnet20", 0.9173), ("karanchahal_resnet8", "karanchahal_resnet8", 0.8959)]
)
def test_known_accuracy_of_a_known_file(cli, shared_data: Path, spec: str, name: str, top1: float) -> None:
    file = shared_data / "checkpoints" / "cifar10" / f"{name}.safetensors"
    done = cli("eval", file, "--model", spec, "--data", f"cifar10:{shared_data / 'cifar10'}", "--limit", 500, "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] == 500 and abs(result["top1"] - top1) < 0.04 and result["top5"] > 0.98


def test_embedded_teacher_for_people(cli) -> None:
    from fastkd import config

    weights = config.resolve(None, {}).teacher.weights
    done = cli("eval", "--model-weights", weights, "--data", "digits")
    assert done.exit_code == 0, done.stderr
    assert "top-1" in done.stdout and "top-5" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "no network"),
        (["a", "--model-weights", "b"], 2, "two networks"),
        (["gone.safetensors"], 4, "there is no 'gone.safetensors'"),
        (["embedded:digits-resnet20"], 2, "--data"),
        (["gone.safetensors", "--data", "digits"], 4, "gone.safetensors"),
        (["gone.safetensors", "--data", "digits", "--device", "tpu"], 2, "tpu"),
        (["gone.safetensors", "--data", "digits", "--input-size", "0"], 2, "input_size is 0"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("eval", *words)
    assert done.exit_code == code and said in one_sentence(done.stderr), done.stderr


def test_data_that_do_not_fit_the_network(cli, shared_data: Path) -> None:
    file = shared_data / "checkpoints" / "cifar100" / "karanchahal_resnet8.safetensors"
    done = cli("eval", file, "--model", "karanchahal_resnet8", "--data", f"cifar10:{shared_data / 'cifar10'}")
    assert done.exit_code == 4, done.stderr
    sentence = one_sentence(done.stderr)
    assert "has 100 classes" in sentence and "has 10;" in sentence


def test_data_that_are_not_there(cli) -> None:
    from fastkd import config

    done = cli("eval", config.resolve(None, {}).teacher.weights, "--data", "digts")
    assert done.exit_code in (2, 4) and "digits" in one_sentence(done.stderr), done.stderr
