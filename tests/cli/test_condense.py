"""`fastkd condense`: a condensed set for `fastkd run --method cde`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import STUDENT, one_sentence, sets

SMALL = ("--data", "digits", "--ipc", "1", "--epochs", "1", "--iterations", "2", "--batch", "8", "--set", "eval_steps=4")


def test_a_set_that_run_takes(cli, tmp_path: Path) -> None:
    done = cli("condense", *SMALL, "--out", tmp_path / "c", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["condensed_images"] == 10 and result["student"]["spec"] == "convnet3"
    assert json.loads((tmp_path / "c" / "config.json").read_text())["lr"] == 1.0  # what was left open is recorded
    measured = cli("eval", tmp_path / "c", "--json")
    assert measured.exit_code == 0 and json.loads(measured.stdout)["top1"] == pytest.approx(result["student"]["top1"], abs=1e-9)
    words = ("--method", "cde", "--condensed", tmp_path / "c", *sets(*STUDENT, "method.g_steps=2"))
    distilled = cli("run", *words, "--out", tmp_path / "s", "--json")
    assert distilled.exit_code == 0, distilled.stderr
    summary = json.loads(distilled.stdout)
    assert summary["condensed_images"] == 10 and any("10 condensed (dm) images, 1 a class" in n for n in summary["notes"])


def test_deterministic_kernels_alone(cli, tmp_path: Path) -> None:
    done = cli("condense", *SMALL, "--deterministic", "--out", tmp_path / "c")
    assert done.exit_code == 0, done.stderr
    assert all(json.loads((tmp_path / "c" / f"{name}.json").read_text())["deterministic"] for name in ("config", "environment"))


def test_summary_names_the_next_command_and_resume_continues(cli, tmp_path: Path) -> None:
    done = cli("condense", *SMALL, "--out", tmp_path / "c")
    assert done.exit_code == 0, done.stderr
    assert f"fastkd run --method cde --condensed {tmp_path / 'c'}" in done.stdout
    (tmp_path / "c" / "condensed.safetensors").unlink()
    again = cli("condense", "--resume", "--out", tmp_path / "c")
    assert again.exit_code == 0, again.stderr
    assert (tmp_path / "c" / "condensed.safetensors").is_file()
    other = cli("condense", "--resume", "--out", tmp_path / "c", "--lr", "0.5")
    assert other.exit_code == 2 and "another lr" in one_sentence(other.stderr)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data", "digts"], 2, "digits"),
        (["--data", "none"], 2, "none"),
        (["--ipc", "0"], 2, "ipc is 0"),
        (["--ipc", "1000"], 2, "smallest class"),
        (["--set", "iteration=3"], 2, "iterations"),
        (["--resume"], 2, "--out"),
        (["--resume", "--out", "gone"], 5, "no run to continue"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("condense", *words)
    assert done.exit_code == code and said in one_sentence(done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "condensed=none"], 2, "needs a condensed set, and none is given; expected --condensed FILE"),
        (["--condensed", "gone.safetensors"], 4, "'gone.safetensors' is no file"),
        (["--condensed", "set.pt"], 4, "pickles are not opened"),
        (["--set", "method.host=muse"], 2, "'fast', 'cmi' or 'pre'"),
        (["--set", "condensed=none", "--set", "real=digits", "--set", "method.spc=900"], 2, "126 images of its smallest class"),
        (["--set", "method.spc=11"], 4, "10 images of its smallest class, 11 are wanted"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_mistakes_of_a_run_with_a_set(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.pt").write_bytes(b"anything")
    done = cli("run", "--method", "cde", *words)
    assert done.exit_code == code and said in one_sentence(done.stderr), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["set.pt"]
