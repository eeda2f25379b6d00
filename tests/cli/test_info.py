"""`fastkd info`."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from fastkd import ops
from fastkd.cli import info
from tests.cli.conftest import one_sentence


def test_machine(cli) -> None:
    done = cli("info", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__ and found["packages"]["click"] != "missing" and found["disk_free"] > 0
    assert {row["op"] for row in found["ops"]} == {row[0] for row in ops.table()}
    assert all(set(row["why"]) >= {"reference"} for row in found["ops"])
    assert all(row["deterministic"] is True for row in found["ops"] if row["device"] == "cpu")


def test_for_people(cli) -> None:
    said = cli("info").stdout
    assert all(word in said for word in ("python", "torch", "bn_sums", "free disk", "compiled", "deterministic"))


def test_which_ops_are_deterministic_as_they_stand(cli, monkeypatch) -> None:
    rows = [("bn_sums", "cuda", "cuda"), ("bn_stats", "cuda", "triton"), ("upsample_conv2d", "cuda", "fold"), ("cam", "cpu", "reference")]
    monkeypatch.setattr(ops, "table", lambda: [(*row, {}) for row in rows])
    assert [row["deterministic"] for row in json.loads(cli("info", "--json").stdout)["ops"]] == [True, True, False, True]
    lines = cli("info").stdout.splitlines()
    assert [line.split()[3:] for line in lines if line.strip().startswith("upsample_conv2d")] == [["with", "--deterministic"]]


@pytest.mark.fault("T32")
def test_a_package_that_breaks_at_import_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                return types.SimpleNamespace(
                    loader=self, origin="x", submodule_search_locations=None, name=name, parent="", has_location=False, cached=None
                )
            return None

        def create_module(self, spec):
            raise RuntimeError("operator torchvision::nms does not exist\nmore lines")

        def exec_module(self, module):
            raise AssertionError

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    said = info.importable("torchvision", "torchvision")
    assert "does not import: operator torchvision::nms does not exist" in said and "\n" not in said


def test_absent_package() -> None:
    assert info.importable("nothing", "there_is_no_such_module") == "not installed"
    assert info.version("there-is-no-such-distribution") == "missing"


def test_what_torchs_launcher_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.engine.launch.grace_of_torch", lambda: None)
    assert info.launcher() == "ranks have 120 s for their checkpoint after a stop signal"
    monkeypatch.setattr("fastkd.engine.launch.grace_of_torch", lambda: 30)
    assert info.launcher().startswith("ranks have 30 s for their checkpoint after a stop signal; this torch cannot be told another time")

    def without() -> None:
        raise ImportError("cannot import name 'Store'")

    monkeypatch.setattr("fastkd.engine.launch.grace_of_torch", without)
    assert info.launcher() == "none, --gpus works with 1 alone: cannot import name 'Store'"


def test_a_low_disk_is_a_hint() -> None:
    assert any("free" in line for line in info.hints(10**6)) and not any("free" in line for line in info.hints(10**12))


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")], ids=["gone", "empty", "file"])
def test_no_run_folder(cli, tmp_path: Path, make) -> None:
    make(tmp_path / "a")
    done = cli("info", "--run", tmp_path / "a")
    assert done.exit_code == 2 and "run folder" in one_sentence(done.stderr)


def test_a_run_without_checkpoints_and_with_torn_files(cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "status.json").write_text('{"state": "runn')
    done = cli("info", "--run", tmp_path)
    assert done.exit_code == 0 and "no checkpoint yet" in done.stdout


def test_heartbeats_of_a_run_that_hangs_name_the_rank(cli, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "step": 9}')
    (tmp_path / "heartbeats").mkdir()
    beat = {"host": "h", "pid": 7, "phase": "distillation", "name": "learn", "epoch": 1, "step": 9, "since": 75.0, "every": 5.0}
    for rank, waiting in ((0, True), (1, False)):
        found = {**beat, "rank": rank, "waiting": waiting, "at": "a.py:3 in f", "time": time.time()}
        (tmp_path / "heartbeats" / f"rank-{rank}.json").write_text(json.dumps(found))
    found = json.loads(cli("info", "--run", tmp_path, "--json").stdout)
    assert found["suspects"] == [1] and [b["rank"] for b in found["heartbeats"]] == [0, 1]
    said = cli("info", "--run", tmp_path).stdout
    assert "the others wait for it, a.py:3 in f" in said and "waits for others" in said and "1:15" in said
    (tmp_path / "status.json").write_text('{"state": "preempted", "code": 75}')
    said = cli("info", "--run", tmp_path).stdout
    assert said.count("has ended") == 2 and "wait" not in said
    (tmp_path / "status.json").write_text('{"state": "done"}')
    assert json.loads(cli("info", "--run", tmp_path, "--json").stdout)["suspects"] == []
