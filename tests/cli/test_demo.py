"""`fastkd demo`: three runs of one budget."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import TINY, one_sentence, sets


def test_three_runs_of_equal_budget(cli, tmp_path: Path) -> None:
    done = cli("demo", *sets(*TINY), "--out", tmp_path / "d", "--json")
    assert done.exit_code == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [r["run"] for r in runs] == ["muse", "noise, uniform", "noise, gaussian"]
    assert len({r["images"] for r in runs}) == 1 and len({json.dumps(r["teacher"]) for r in runs}) == 1
    assert json.loads((tmp_path / "d" / "comparison.json").read_text()) == runs
    muse, *floors = (
        json.loads((tmp_path / "d" / name / "config.json").read_text()) for name in ("muse", "noise-uniform", "noise-gaussian")
    )
    for floor in floors:
        assert floor["method"]["epochs"] == muse["method"]["epochs"] - muse["method"]["warmup"] and floor["method"]["warmup"] == 0
        shared = {"kd_steps", "kd_batch", "tau", "lr", "momentum", "weight_decay", "eta_min", "kd_aug"}
        assert all(floor["method"][k] == muse["method"][k] for k in shared)
        assert all(floor[k] == muse[k] for k in ("teacher", "student", "data", "seed"))


def test_table_for_people(cli, tmp_path: Path) -> None:
    done = cli("demo", *sets(*TINY), "--out", tmp_path / "d")
    assert done.exit_code == 0, done.stderr
    assert all(word in done.stdout for word in ("teacher", "muse", "noise, uniform", "noise, gaussian", "without one real image"))


def test_a_folder_that_is_taken(cli, tmp_path: Path) -> None:
    (tmp_path / "muse").mkdir()
    (tmp_path / "muse" / "x").write_text("x")
    done = cli("demo", *sets(*TINY), "--out", tmp_path)
    assert done.exit_code == 2 and "not empty" in one_sentence(done.stderr)


def test_a_finished_run_is_no_folder_for_a_demo(cli, tmp_path: Path) -> None:
    for name in ("config.json", "student.safetensors"):
        (tmp_path / name).write_text("x")
    done = cli("demo", *sets(*TINY), "--out", tmp_path)
    assert done.exit_code == 2 and f"'{tmp_path}' is not empty; expected a new" in one_sentence(done.stderr)
    assert len(list(tmp_path.iterdir())) == 2
