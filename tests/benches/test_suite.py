"""A run of the benches: gate, records, budget, baseline, exit codes, both front ends."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
import torch

from benches import BENCHES, __main__, baseline, check, suite
from benches._case import CannotRun, Case, Provider, provider
from benches._timing import measure_all
from benches.suite import Request
from fastkd.cli.bench import command
from fastkd.errors import ConfigError, PlaceError

from .records import record, row


def a_case(name: str = "ten", wrong: bool = False) -> Case:
    x = torch.arange(10.0)

    def absent():
        raise CannotRun("is not here")

    return Case(
        op="frozen_bn_act_stats",
        labels={"case": name, "dtype": "float32"},
        providers=[
            Provider("published", "eager", lambda: (x * 2,), rung="as published"),
            Provider("ours: cpp", "ours", lambda: (x * (3 if wrong else 2),), rung="kernels"),
            provider("absent", "peer", absent),
            Provider("draws", "peer", lambda: (x + 1,), checked=False),
        ],
        truth=lambda: (x.double() * 2,),
        baseline="published",
    )


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Benches of one file each are replaced by the cases that a test gives."""

    def use(*cases: Case) -> None:
        made = types.SimpleNamespace(run=lambda plan: measure_all(cases, plan), cases=lambda plan: iter(cases))
        monkeypatch.setattr(suite, "module_of", lambda name: made)

    return use


def quick(**more) -> Request:
    return Request(**{"only": ("cam",), "quick": True, "device": "cpu", **more})


def test_rows_of_a_run(only, tmp_path: Path):
    only(a_case())
    result = suite.run(quick(out=tmp_path, threads=(1, 2)), lambda line: None)
    saved = json.loads((tmp_path / "cam.json").read_text())
    assert result.code == 0 and saved == json.loads(json.dumps(result.records["cam"])) and saved["complete"]
    rows = saved["rows"]
    assert [r["threads"] for r in rows] == [1] * 4 + [2] * 4
    by = {r["provider"]: r for r in rows}
    assert by["ours: cpp"]["ok"] and by["ours: cpp"]["x_eager"] > 0 and by["ours: cpp"]["x_rung"] == by["ours: cpp"]["x_eager"]
    assert by["published"]["x_eager"] == 1 and "x_rung" not in by["published"]
    assert by["absent"]["reason"] == "is not here" and "ms" not in by["absent"]
    assert by["draws"]["ms"] > 0 and "x_eager" not in by["draws"]
    facts = saved["facts"]
    assert {"host", "torch", "triton", "python", "revision", "compiled", "ops", "flags", "copy_gbps"} <= facts.keys() and facts[
        "threads"
    ] == [1, 2]


def test_threads_are_given_back(only):
    only(a_case())
    before = torch.get_num_threads()
    suite.run(quick(threads=(2,)), lambda line: None)
    assert torch.get_num_threads() == before


def test_a_wrong_op_has_a_time_and_no_ratio(only):
    only(a_case(wrong=True))
    said: list[str] = []
    result = suite.run(quick(), said.append)
    ours = next(r for r in result.records["cam"]["rows"] if r["provider"] == "ours: cpp")
    assert result.code == suite.WRONG and ours["ok"] is False and ours["ms"] > 0 and "x_eager" not in ours and "x_rung" not in ours
    assert any(line.startswith("WRONG") for line in said)


def test_no_further_case_begins_when_the_time_is_up(only, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suite, "LEAST_SECONDS", -1)
    only(a_case("first"), a_case("second"), a_case("third"))
    result = suite.run(quick(out=tmp_path, seconds=0.0), lambda line: None)
    rows = json.loads((tmp_path / "cam.json").read_text())["rows"]
    assert [r["reason"] for r in rows] == ["no time was left"] and not result.records["cam"]["complete"]


def test_a_bench_that_does_not_fit_is_skipped_and_says_so(only, tmp_path: Path):
    only(a_case())
    said: list[str] = []
    result = suite.run(quick(out=tmp_path, seconds=1.0), said.append)
    assert json.loads((tmp_path / "cam.json").read_text())["skipped"] == "no time was left for it"
    assert result.code == 0 and any("skipped: no time was left for it" in line for line in said)


def test_what_is_measured_is_on_disk_when_a_bench_breaks(only, tmp_path: Path):
    def cases():
        yield a_case("first")
        raise RuntimeError("no memory")

    only()
    made = types.SimpleNamespace(run=lambda plan: measure_all(cases(), plan))
    plan = suite.plan_of(quick())
    found = suite.bench("cam", made, plan, {"type": "cpu"}, [], tmp_path)
    assert found["error"] == "RuntimeError: no memory" and json.loads((tmp_path / "cam.json").read_text()) == found
    assert {r["case"] for r in found["rows"]} == {"first"} and not found["complete"]


def test_a_bench_that_loses_the_gpu_ends_the_measuring(only, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(plan):
        raise check.DeviceLost("cuda", "an illegal address")

    monkeypatch.setattr(suite, "module_of", lambda name: types.SimpleNamespace(run=run))
    result = suite.run(quick(out=tmp_path, only=("replay", "cam")), lambda line: None)
    assert result.code == suite.LOST
    assert all("backend cuda: an illegal address" in json.loads((tmp_path / f"{n}.json").read_text())["lost"] for n in ("replay", "cam"))


def test_a_budget_is_divided_by_the_shares(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suite.time, "monotonic", lambda: 100.0)
    assert suite.share(None, ["cam"]) is None and suite.share(160.0, ["cam"]) == 160.0
    first = suite.share(100.0 + sum(suite.SHARES.values()), BENCHES)
    assert first == pytest.approx(100.0 + suite.SHARES[BENCHES[0]])


def test_baseline(only, tmp_path: Path):
    only(a_case())
    before = suite.run(quick(out=tmp_path), lambda line: None)
    (tmp_path / "cam.json").write_text(json.dumps(slowed(before.records["cam"], 1e-6)))
    said: list[str] = []
    result = suite.run(quick(baseline=tmp_path), said.append)
    assert result.code == suite.SLOWER and len(result.slower) == 1 and "ours: cpp" in result.slower[0]
    (tmp_path / "cam.json").write_text(json.dumps(slowed(before.records["cam"], 1e6)))
    assert suite.run(quick(baseline=tmp_path / "cam.json"), lambda line: None).code == 0


def slowed(of: dict, factor: float) -> dict:
    rows = [r | {k: r[k] * factor for k in ("ms", "p20", "p80") if k in r} for r in of["rows"]]
    return of | {"rows": rows}


def test_only_beyond_both_spreads_is_slower():
    old = record([row("ours: cpp", 1.0, p20=0.9, p80=1.1), row("hooks", 1.0, "eager"), row("definition", 1.0)])
    same = record([row("ours: cpp", 1.15, p20=1.05, p80=1.3), row("hooks", 9.0, "eager"), row("definition", 9.0)])
    assert baseline.slower(old, same) == []
    assert len(baseline.slower(old, record([row("ours: cpp", 1.3, p20=1.2, p80=1.4)]))) == 1
    assert baseline.slower(old, record([row("ours: cpp", 9.0, threads=2)])) == []


def test_a_baseline_with_memory_left_to_the_c_library_is_refused():
    facts = {"device": "cpu", "settings": {}, "torch": "2", "host": {"cpu": "a"}}
    assert baseline.comparable(facts, facts | {"memory_kept": False}) is None, "older records do not say, and left it"
    assert "freed memory kept False" in str(baseline.comparable(facts, facts | {"memory_kept": True}))


def test_a_baseline_of_another_machine_is_refused(only, tmp_path: Path):
    only(a_case())
    (tmp_path / "cam.json").write_text(json.dumps(record([], "cam")))
    with pytest.raises(ConfigError, match="baseline of cam cannot be compared"):
        suite.run(quick(baseline=tmp_path), lambda line: None)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"what": "a curve"}'])
def test_a_baseline_that_is_none(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="record of a bench"):
        baseline.load(tmp_path)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"only": ("cma",)}, ConfigError, "did you mean 'cam'"),
        ({"threads": (0,)}, ConfigError, "at least 1"),
        ({"device": "tpu"}, ConfigError, "expected auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, ConfigError, "expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, PlaceError, "is not there"),
    ],
)
def test_mistakes(more, error, said: str):
    with pytest.raises(error, match=said):
        suite.run(quick(**more), lambda line: None)


def test_both_front_ends_have_the_same_options():
    ours = {option.dest for option in __main__.parser()._actions} - {"help"}
    theirs = {p.name for p in command.params} - {"as_json", "debug"}
    assert ours == theirs == set(Request.__dataclass_fields__)


def test_a_real_bench_through_both_front_ends(cli_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--only", "upsample", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert __main__.main(words) == 0
    said = capsys.readouterr().out
    assert "gate: " in said and "targets" in said and "upsample + conv + BN + LeakyReLU stage" in said
    assert json.loads((tmp_path / "upsample.json").read_text())["complete"]
    done = cli_run("bench", *words, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["targets"] and found["records"]["upsample"]["rows"] and "gate: " in done.stderr


def test_a_mistake_on_the_command_line_is_one_sentence(cli_run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    done = cli_run("bench", "--only", "cma")
    assert done.exit_code == 2 and "did you mean 'cam'" in done.stderr
    assert __main__.main(["--out", str(tmp_path), "--device", "tpu"]) == 2
    assert "expected auto, cpu, cuda" in capsys.readouterr().err


def test_every_bench_is_there():
    files = {p.stem.removeprefix("bench_") for p in Path(suite.__file__).parent.glob("bench_*.py")}
    assert files == set(BENCHES)
