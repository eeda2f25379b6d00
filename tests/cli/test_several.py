"""`fastkd run --gpus N`: refusals, and two ranks against one."""

from __future__ import annotations

import json

import pytest
import torch

from fastkd import models
from tests.cli.conftest import STUDENT, TINY, one_sentence, sets


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are here")
def test_ranks_without_gpus_are_refused_with_the_way_out(cli, tmp_path):
    done = cli("run", "--gpus", 8, "--out", tmp_path / "a")
    assert done.exit_code == 2 and "add --device cpu to run 8 ranks on the CPU" in done.stderr
    assert not (tmp_path / "a").exists()


def test_a_dry_run_of_eight_ranks_is_one_of_them(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, eight = (json.loads(cli("run", "--dry-run", *words, *sets(*TINY), "--json").stdout) for words in ((), ("--gpus", 8)))
    assert one["steps"] == eight["steps"] and (one["ranks"], eight["ranks"]) == (1, 8)
    assert eight["bytes"]["student"] == one["bytes"]["student"] and eight["bytes"]["at"] < one["bytes"]["at"]
    odd = cli("run", "--dry-run", "--gpus", 8, *sets(*TINY, "method.kd_batch=36"))
    assert odd.exit_code == 2 and "36 rows cannot be dealt to 8 ranks" in one_sentence(odd.stderr)
    assert not list(tmp_path.iterdir())


def test_two_ranks_from_the_command_line_equal_one(shell, tmp_path):
    words = ("--method", "noise", *sets(*STUDENT), "--json")
    one = shell("run", "--out", tmp_path / "one", *words)
    two = shell("run", "--gpus", 2, "--device", "cpu", "--out", tmp_path / "two", *words)
    assert one.returncode == 0 and two.returncode == 0, two.stderr
    assert "2 ranks on the CPU" in two.stderr and "epoch 3/3" in two.stderr
    assert json.loads(two.stdout)["epochs"] == 3 and json.loads((tmp_path / "two" / "environment.json").read_text())["ranks"] == 2
    a, b = (models.load_weights(tmp_path / name / "student.safetensors").state for name in ("one", "two"))
    far = max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
    assert far < 1e-4, far  # fp32; in fp64 every method's own test says 1e-9
