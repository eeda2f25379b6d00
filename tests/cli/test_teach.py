"""`fastkd teach`: a teacher for `fastkd run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastkd import models
from tests.cli.conftest import STUDENT, one_sentence, sets

SMALL = ("--model", "resnet8", "--data", "digits", "--epochs", "2", "--batch", "64")


def test_a_teacher_that_run_takes(cli, tmp_path: Path) -> None:
    done = cli("teach", *SMALL, "--out", tmp_path / "t", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["student"]["top1"] > 0.2
    metadata = models.load_weights(tmp_path / "t" / "teacher.safetensors").metadata
    assert metadata["architecture"] == "resnet8" and metadata["classes"] == "10"
    measured = cli("eval", tmp_path / "t", "--json")
    assert measured.exit_code == 0 and json.loads(measured.stdout)["top1"] == pytest.approx(result["student"]["top1"], abs=1e-9)
    words = (
        "--method",
        "noise",
        "--teacher-weights",
        tmp_path / "t",
        "--student",
        "resnet8",
        "--data",
        "digits",
        "--set",
        "method.n_images=64",
    )
    distilled = cli("run", *words, *sets(*STUDENT), "--out", tmp_path / "s", "--json")
    assert distilled.exit_code == 0, distilled.stderr
    assert json.loads(distilled.stdout)["teacher"]["top1"] == pytest.approx(result["student"]["top1"], abs=1e-9)


def test_summary_names_the_next_command(cli, tmp_path: Path) -> None:
    done = cli("teach", *SMALL, "--epochs", 1, "--out", tmp_path / "t")
    assert done.exit_code == 0, done.stderr
    assert f"fastkd run --teacher-weights {tmp_path / 't'}" in done.stdout


def test_deterministic_kernels_alone(cli, tmp_path: Path) -> None:
    done = cli("teach", *SMALL, "--epochs", 1, "--deterministic", "--out", tmp_path / "t")
    assert done.exit_code == 0, done.stderr
    assert all(json.loads((tmp_path / "t" / f"{name}.json").read_text())["deterministic"] for name in ("config", "environment"))
    other = cli("teach", "--resume", "--out", tmp_path / "t", "--set", "deterministic=false")
    assert other.exit_code == 2 and "another deterministic" in one_sentence(other.stderr)


def test_next_command_of_a_teacher_that_is_code(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "from torch import nn\n\n\ndef make(classes, **_):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    done = cli("teach", "--model", "py:net.py:make", "--epochs", 1, "--batch", 64, "--out", "t")
    assert done.exit_code == 0, done.stderr
    assert "fastkd run --teacher py:net.py:make --teacher-weights t" in done.stdout
    untyped = cli("run", "--method", "noise", "--teacher-weights", "t", "--student", "resnet8")
    assert untyped.exit_code == 2 and "add --teacher py:FILE:FUNCTION" in one_sentence(untyped.stderr)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model", "resnt20"], 2, "resnet20"),
        (["--data", "digts"], 2, "digits"),
        (["--data", "none"], 2, "none"),
        (["--lr", "0"], 2, "lr is 0"),
        (["--set", "epoch=3"], 2, "epochs"),
        (["--batch", "100000"], 2, "batch is 100000"),
        (["--resume"], 2, "--out"),
        (["--resume", "--out", "gone"], 5, "no run to continue"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("teach", *words)
    assert done.exit_code == code and said in one_sentence(done.stderr), done.stderr
    assert not list(tmp_path.iterdir())
