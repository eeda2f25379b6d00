"""`fastkd info`."""

from __future__ import annotations

import json
import sys
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


def test_for_people(cli) -> None:
    said = cli("info").stdout
    assert all(word in said for word in ("python", "torch", "bn_sums", "free disk", "compiled"))


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
