"""`fastkd run` end to end on the embedded digits teacher: a run, its folder, a stop and its continuation."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd import models
from fastkd.cli import terminal
from fastkd.cli.common import data_word, out_folder
from fastkd.cli.run import again
from fastkd.config import build
from fastkd.engine import events
from tests.cli.conftest import STUDENT, TINY, one_sentence, sets


def run(cli: Callable[..., Any], out: Path, *words: Any) -> Any:
    return cli("run", "--out", out, *sets(*(STUDENT if "noise" in words else TINY)), *words)


@pytest.fixture
def at_poll(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Call something once, when the run has done so many steps."""

    def arrange(step: int, act: Callable[[], None]) -> None:
        done: list[int] = []
        original = terminal.Lines.on_poll

        def on_poll(self: Any, event: dict[str, Any]) -> None:
            original(self, event)
            if event["step"] >= step and not done:
                done.append(1)
                act()

        monkeypatch.setattr(terminal.Lines, "on_poll", on_poll)

    return arrange


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_and_its_evaluation(cli, tmp_path: Path) -> None:
    done = run(cli, tmp_path / "a", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["method"] == "muse" and result["out"] == str(tmp_path / "a") and result["epochs"] == 3 and result["images"] > 0
    assert result["teacher"]["top1"] > 0.9 and 0 <= result["student"]["top1"] <= 1
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "config.json",
        "environment.json",
        "events.jsonl",
        "status.json",
        "student.safetensors",
        "checkpoints",
    }
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "done"
    measured = cli("eval", tmp_path / "a", "--json")
    assert measured.exit_code == 0, measured.stderr
    assert json.loads(measured.stdout)["top1"] == pytest.approx(result["student"]["top1"], abs=1e-9)


def test_what_people_read(cli, tmp_path: Path) -> None:
    done = run(cli, tmp_path / "a", "--method", "noise")
    assert done.exit_code == 0, done.stderr
    assert f"run folder: {tmp_path / 'a'}" in done.stderr and "epoch 3/3" in done.stderr
    assert "teacher" in done.stdout and "selected on test data" in done.stdout and f"fastkd eval {tmp_path / 'a'}" in done.stdout


def test_without_data_there_is_no_accuracy(cli, tmp_path: Path) -> None:
    done = run(cli, tmp_path / "a", "--data", "none", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["student"]["top1"] is None and result["teacher"]["top1"] is None and 0 <= result["agreement"] <= 1


def test_dry_run_writes_nothing(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("run", "--dry-run", *sets(*TINY), "--json")
    assert done.exit_code == 0, done.stderr
    planned = json.loads(done.stdout)
    assert sum(s["times"] for s in planned["steps"] if s["step"] == "learn") == 2 * 3
    assert planned["bytes"]["student"] > 0 and not list(tmp_path.iterdir())
    said = cli("run", "--dry-run", *sets(*TINY)).stdout
    assert "learn" in said and "nothing was written" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--out", "file"], 3, "is a file"),
        (["--out", "file/below"], 3, "cannot be written"),
        (["--out", "full"], 2, "not empty"),
        (["--out", "empty", "--resume=auto", "--launcher", "slurm"], 2, "SLURM_PROCID"),
        (["--device", "cuda:90"], 3, "cuda:90"),
        (["--device", "cuda:90", "--out", "empty"], 3, "cuda:90"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_a_dry_run_refuses_what_the_run_refuses(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    dry, real = (cli("run", *sets(*TINY), *words, *more) for more in (["--dry-run"], []))
    assert dry.exit_code == real.exit_code == code and said in one_sentence(dry.stderr) == one_sentence(real.stderr), dry.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_looks_at_rights(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # rights do not bind an administrator
    done = cli("run", *sets(*TINY), "--dry-run", "--out", tmp_path / "a" / "b")
    assert done.exit_code == 3 and "permission is denied" in one_sentence(done.stderr)
    assert cli("run", *sets(*TINY), "--dry-run", "--out", tmp_path.parent / "elsewhere").exit_code == 0


def test_a_dry_run_of_a_continued_run(cli, tmp_path: Path, at_poll) -> None:
    at_poll(6, stop)
    assert run(cli, tmp_path / "a", "--set", "poll=2").exit_code == 75
    before = sorted(tmp_path.rglob("*"))
    assert cli("run", "--resume", "--out", tmp_path / "a", "--dry-run").exit_code == 0
    done = cli("run", "--resume", "--out", tmp_path / "a", "--dry-run", "--seed", "9")
    assert done.exit_code == 2 and "another seed" in one_sentence(done.stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_options_reach_the_configuration(cli, tmp_path: Path) -> None:
    done = run(cli, tmp_path / "a", "--method", "noise", "--seed", 7, "--precision", "fp32", "--device", "cpu", "--set", "poll=3")
    assert done.exit_code == 0, done.stderr
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["seed"], config["precision"], config["device"], config["poll"], config["method"]["epochs"]) == (7, "fp32", "cpu", 3, 3)


def test_a_stop_signal_leaves_with_75_and_the_command_that_continues(cli, tmp_path: Path, at_poll) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut here"
    assert run(cli, whole, "--set", "poll=2").exit_code == 0
    at_poll(6, stop)
    stopped = run(cli, cut, "--set", "poll=2")
    assert stopped.exit_code == 75, stopped.stderr
    assert not (cut / "student.safetensors").exists()
    said = stopped.stderr.strip().splitlines()[-1]
    program, *words = shlex.split(said.partition("continue with: ")[2])
    assert program == "fastkd" and words == ["run", "--resume", "--out", str(cut)]
    step = int(max((cut / "checkpoints").iterdir()).name.removeprefix("step-"))
    assert re.search(rf"^steps +{step} in", stopped.stdout, re.MULTILINE), stopped.stdout
    continued = cli(*words, "--json")
    assert continued.exit_code == 0, continued.stderr
    assert "continued from step-" in continued.stderr and json.loads(continued.stdout)["epochs"] == 3
    a, b = (models.load_weights(out / "student.safetensors").state for out in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_crash_after_a_checkpoint_names_the_command(cli, tmp_path: Path, at_poll) -> None:
    def crash() -> None:
        raise ValueError("planted")

    at_poll(8, crash)
    done = run(cli, tmp_path / "a", "--set", "poll=2", "--set", "checkpoint.every_steps=3")
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    *_, error, hint = done.stderr.strip().splitlines()
    assert "unexpected ValueError: planted" in error
    assert hint.endswith(f"fastkd run --resume --out {tmp_path / 'a'}")
    assert cli("run", "--resume", "--out", tmp_path / "a").exit_code == 0


def test_the_same_command_with_auto_starts_and_continues(cli, tmp_path: Path, at_poll) -> None:
    at_poll(6, stop)
    assert run(cli, tmp_path / "a", "--resume=auto", "--method", "nayer", "--recipe", "nayer-digits", "--set", "poll=2").exit_code == 75
    done = run(cli, tmp_path / "a", "--resume=auto", "--method", "nayer", "--recipe", "nayer-digits", "--set", "poll=2")
    assert done.exit_code == 0 and "continued from" in done.stderr, done.stderr


@pytest.mark.fault("T16")
def test_what_is_safe_may_change_and_the_rest_may_not(cli, tmp_path: Path, at_poll) -> None:
    at_poll(6, stop)
    assert run(cli, tmp_path / "a", "--set", "poll=2").exit_code == 75
    for words, named in ((("--set", "method.batch=16"), ""), (("--method", "fast"), "'muse'"), (("--seed", "9"), "")):
        done = cli("run", "--resume", "--out", tmp_path / "a", *words)
        assert done.exit_code == 2 and named in one_sentence(done.stderr), done.stderr
    assert cli("run", "--resume", "--out", tmp_path / "a", "--set", "checkpoint.keep=1", "--set", "poll=5").exit_code == 0
    told = [(e["key"], e["was"], e["now"]) for e in events.read(tmp_path / "a" / "events.jsonl") if e["kind"] == "changed"]
    assert told == [("checkpoint.keep", 2, 1), ("poll", 2, 5)]


@pytest.fixture
def code(tmp_path: Path) -> str:
    """A network that is code, in net.py: its specification."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef make(classes, **_):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))\n"
    )
    return f"py:{tmp_path / 'net.py'}:make"


def test_what_is_to_be_done_next_with_a_student_that_is_code(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = "py:net.py:make", Path("a")
    done = run(cli, out, "--method", "noise", "--student", code)
    assert done.exit_code == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("next"))
    program, *words = shlex.split(line.removeprefix("next"))
    assert program == "fastkd" and words == ["eval", str(out), "--model", code]
    assert cli(*words).exit_code == 0
    untyped = cli("eval", out)
    sentence = one_sentence(untyped.stderr)
    assert untyped.exit_code == 2 and "py:net.py:make" in sentence and "add --model py:FILE:FUNCTION" in sentence
    again = cli("run", "--student", f"ckpt:{out}", "--out", "b")
    sentence = one_sentence(again.stderr)
    assert again.exit_code == 4 and f"--student py:FILE:FUNCTION --student-weights {out}" in sentence, sentence
    assert run(cli, Path("c"), "--method", "noise", "--student", code, "--student-weights", out).exit_code == 0


def test_code_is_not_run_again_unless_it_is_typed_again(cli, tmp_path: Path, at_poll, code: str) -> None:
    spec = code
    at_poll(6, stop)
    stopped = run(cli, tmp_path / "a", "--method", "noise", "--student", spec, "--set", "poll=2")
    assert stopped.exit_code == 75, stopped.stderr
    assert f"--student {spec}" in stopped.stderr.strip().splitlines()[-1]
    refused = cli("run", "--resume", "--out", tmp_path / "a")
    assert refused.exit_code == 2 and f"--student {spec}" in one_sentence(refused.stderr)
    assert cli("run", "--resume", "--out", tmp_path / "a", "--student", spec).exit_code == 0


def test_resume_command_quotes_and_names_code() -> None:
    config = build({"teacher": {"spec": "py:a b.py:f"}, "student": {"spec": "resnet20"}})
    assert again(config, Path("my runs/a")) == "fastkd run --resume --out 'my runs/a' --teacher 'py:a b.py:f'"


@pytest.mark.parametrize(
    ("data", "word"), [(None, "nodata"), ("none", "nodata"), ("cifar10", "cifar10"), ("cifar10:/x/y", "cifar10"), ("/x/photos/", "photos")]
)
def test_word_of_the_data_in_the_folder_name(data: str | None, word: str) -> None:
    assert data_word(data) == word


@pytest.mark.fault("T19")
def test_folders_number_themselves_and_stay_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert out_folder("muse-digits") == Path("runs/muse-digits-001")
    Path("runs/muse-digits-007").mkdir(parents=True)
    assert out_folder("muse-digits") == Path("runs/muse-digits-008")
    for hostile in ("../../etc", "/etc/passwd", "a\0b", "x" * 300, "..", "ä/ö", ""):
        found = out_folder(hostile)
        assert found.parent == Path("runs") and len(found.name) < 100 and ".." not in found.parts and "\0" not in str(found)
