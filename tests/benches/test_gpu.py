"""`make gpu`: a budget that holds, files that stay, a dry run of the whole recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benches import BENCHES, gpu, suite

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def log(folder: Path, seconds: float) -> gpu.Log:
    return gpu.Log(folder, time.monotonic() + seconds)


def results(folder: Path) -> list[str]:
    return [stage["result"] for stage in json.loads((folder / "stages.json").read_text())]


def test_a_stage_ends_at_its_limit(tmp_path: Path):
    began = time.monotonic()
    assert not log(tmp_path, 60).stage("sleep", 0.5, SLEEP)
    assert time.monotonic() - began < 30 and results(tmp_path) == ["did not end within its 0 s"]


def test_a_stage_ends_with_the_budget(tmp_path: Path):
    assert not log(tmp_path, 0.5).stage("sleep", 60, SLEEP)
    assert not log(tmp_path, 0).stage("late", 60, SLEEP)
    assert results(tmp_path) == ["skipped: no time is left"]


def test_an_interrupted_stage_has_a_grace_in_which_it_may_speak(tmp_path: Path):
    """As pytest does: its failures so far are worth more than the time."""
    said = tmp_path / "said"
    program = f"import pathlib, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: pathlib.Path({str(said)!r}).write_text('failures')"
    assert not log(tmp_path, 60).stage("tests", 2, [sys.executable, "-c", program])
    assert said.read_text() == "failures"


def test_a_stage_says_how_it_ended(tmp_path: Path):
    own = log(tmp_path, 60)
    assert own.stage("good", 60, [sys.executable, "-c", ""]) and not own.stage("bad", 60, [sys.executable, "-c", "raise SystemExit(3)"])
    assert results(tmp_path) == ["passed", "failed with exit code 3"]


def test_a_build_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.Log, "stage", lambda self, name, *a, **k: name != "build")
    assert gpu.stages(log(tmp_path, 60), None, dry=True) == 1


def test_benches_that_do_not_fit_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    monkeypatch.setattr(gpu.Log, "stage", lambda self, name, *a, **k: ran.append(name) or True)
    assert gpu.stages(log(tmp_path, gpu.LEAST - 1), None, dry=True) == 0
    assert ran == ["build", "info", "tests"] and len(results(tmp_path)) == len(gpu.BENCHES) and "skipped" in results(tmp_path)[0]


def test_only_what_is_named_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []
    monkeypatch.setattr(gpu.Log, "stage", lambda self, name, limit, command, **k: ran.append([name, *map(str, command)]) or True)
    monkeypatch.setattr(gpu, "landed", lambda *a: True)
    assert gpu.stages(log(tmp_path, 300), None, dry=True, only=("cam", "replay"), built=True) == 0
    assert [words[0] for words in ran] == ["info", "benches"]
    assert [w for w, before in zip(ran[1][1:], ran[1]) if before == "--only"] == ["replay", "cam"]


def test_a_backend_that_breaks_the_gpu_is_left_out_of_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []

    def stage(self, name, limit, command, **more):
        ran.append([str(w) for w in command])
        for bench in ("replay", "cam"):
            why = {"lost": "the bench replay broke the GPU context: backend cuda: an illegal address"} if len(ran) == 1 else {}
            (tmp_path / f"{bench}.json").write_text(json.dumps({"rows": [{"ms": 1}], **why}))
        return True

    monkeypatch.setattr(gpu.Log, "stage", stage)
    assert gpu.measured(log(tmp_path, 300), False, ["replay", "cam"], {})
    assert len(ran) == 2 and "--without" not in ran[0] and ran[1][ran[1].index("--without") + 1] == "cuda"


def test_the_files_of_the_gpu_tests_are_those_that_have_some():
    files = gpu.gpu_tests()
    assert "tests/ops/test_gpu.py" in files and "tests/ops/test_cam.py" in files and "tests/test_config.py" not in files


def test_a_bench_without_a_record_fails(tmp_path: Path):
    own = log(tmp_path, 60)
    assert not gpu.landed(own, "cam")
    (tmp_path / "cam.json").write_text('{"rows": []}')
    assert not gpu.landed(own, "cam")
    (tmp_path / "cam.json").write_text('{"rows": [{"ms": 1}]}')
    assert gpu.landed(own, "cam")


def test_shares_cover_the_benches_and_the_files_fit_eight():
    assert set(suite.SHARES) == set(BENCHES) and len(gpu.BENCHES) + len(("tests.txt", "stages.json")) <= 8
    assert sum(suite.SHARES.values()) == gpu.BENCHING < gpu.BUDGET <= 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_what_tries_it(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "--dry" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["gpu", "DRY=1", "OUT=there"], ["gpu", "GPU_PYTHON=python3.12", "WHEELS=w", "OUT=there"]])
def test_the_makefile_hands_the_options_on(words: list[str]):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # this may run under make itself
    done = subprocess.run(["make", "-n", *words], cwd=gpu.ROOT, env=env, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()[-1].split()
    wanted = {"DRY=1": "--dry", "OUT=there": "--out there", "WHEELS=w": "--wheels w", "GPU_PYTHON=python3.12": "python3.12 -m benches.gpu"}
    assert all(wanted[w] in " ".join(said) for w in words[1:])
