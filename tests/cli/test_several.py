"""`fastkd run --gpus N`: refusals, and two ranks against one."""

from __future__ import annotations

import contextlib
import json
import time
from types import SimpleNamespace

import pytest
import torch

from fastkd import models
from fastkd.cli import several
from fastkd.cli.follow import Follower
from fastkd.engine import launch
from tests.cli.conftest import STUDENT, TINY, one_sentence, sets


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs are here")
def test_ranks_without_gpus_are_refused_with_the_way_out(cli, tmp_path):
    done = cli("run", "--gpus", 8, "--out", tmp_path / "a")
    assert done.exit_code == 2 and "add --device cpu to run 8 ranks on the CPU" in done.stderr
    assert not (tmp_path / "a").exists()


def test_a_dry_run_of_eight_ranks_is_one_of_them(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, eight = (json.loads(cli("run", "--dry-run", *words, *sets(*TINY), "--json").stdout) for words in ((), ("--gpus", 8)))
    assert [s | {"wire": 0} for s in eight["steps"]] == one["steps"] and (one["ranks"], eight["ranks"]) == (1, 8)
    assert one["wire"] == 0 < eight["wire"]
    assert torch.cuda.is_available() or ([p["device"] for p in (one, eight)], eight["precision"]) == (["cpu", "cuda"], "bf16")
    assert eight["bytes"]["student"] == one["bytes"]["student"] and eight["bytes"]["at"] < one["bytes"]["at"]
    odd = cli("run", "--dry-run", "--gpus", 8, *sets(*TINY, "method.kd_batch=36"))
    assert odd.exit_code == 2 and "36 rows cannot be dealt to 8 ranks" in one_sentence(odd.stderr)
    assert not list(tmp_path.iterdir())


def test_what_a_rank_is_told_and_what_is_said_of_a_stop(cli, tmp_path, monkeypatch):
    told = []

    def launched(gpus, argv, out, *, max_restarts, grace):
        told.append(argv)
        return 75

    monkeypatch.setattr(launch, "launch", launched)
    words = ("run", "--gpus", 2, "--device", "cpu", "--out", tmp_path / "a")
    done = cli(*words, "--time-limit", "12d", "--seed", 3)
    assert done.exit_code == 75
    assert f"continue with: fastkd run --resume --out {tmp_path / 'a'} --gpus 2" in done.stderr
    assert {"--resume=auto", "--seed", "3", "--device", "cpu"} <= set(told[0]) and told[0][-2:] == ["--time-limit", "1036800.000000s"]
    cli(*words, "--resume=auto", "--time-limit", "0.5s")
    assert told[1][-2:] == ["--time-limit", "0.500000s"]
    (tmp_path / "a" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "a" / "config.json").write_text("{}")
    cli(*words, "--resume")
    assert "--resume=must" in told[2]


def test_a_folder_in_use_is_refused_before_anything_in_it_changes(cli, tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    (tmp_path / "status.json").write_text('{"state": "running"}')
    done = cli("run", "--gpus", 2, "--device", "cpu", "--resume=auto", "--out", tmp_path)
    assert done.exit_code == 2 and "in use by process 1 on elsewhere" in one_sentence(done.stderr)
    assert (tmp_path / "status.json").read_text() == '{"state": "running"}'


def test_the_launcher_draws_what_is_whole_and_passes_over_a_torn_line(tmp_path):
    shown = []
    (tmp_path / "events.jsonl").write_text('{"kind": "before"}\n')
    with Follower(tmp_path, shown.append):
        with open(tmp_path / "events.jsonl", "a") as f:
            f.write('{"kind": "epo{"kind": "lost"}\n{"kind": "epoch", "epoch": 1}\n{"kind": "half"')
    assert shown == [{"kind": "epoch", "epoch": 1}]


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


@pytest.mark.parametrize(
    ("state", "age", "code"),
    [("fatal", 0, 7), ("fatal", 60, 1), ("preempted", 0, 1), ("running", 0, 1)],
    ids=["said-now", "of-an-earlier-start", "preempted", "running"],
)
def test_a_rank_whose_connection_breaks_names_what_another_has_said_since_it_began(state, age, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "joined", lambda on_gpu: contextlib.nullcontext(False))
    config = SimpleNamespace(device="cpu")

    def work():
        status = {"state": state, "code": 7, "time": time.time() - age, "reason": "rank 1: out of memory"}
        (tmp_path / "status.json").write_text(json.dumps(status))
        raise RuntimeError("Connection closed by peer")

    assert several.one_of_them(config, tmp_path, work) == code
    said = capsys.readouterr().err
    assert ("another rank has ended the run: rank 1: out of memory" in said) == (code == 7) == ("unexpected RuntimeError" not in said)
