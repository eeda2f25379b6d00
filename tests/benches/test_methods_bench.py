"""All methods with equal budgets: the words that are run, and the record that grows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from benches import _budget
from benches import methods as bench
from fastkd import config, methods


def options(tmp_path, *more):
    return bench.parser().parse_args(["--out", str(tmp_path), *more])


@pytest.mark.parametrize("name", [n for n in methods.names() if f"{n}-digits" in config.recipes()])
def test_the_words_are_the_recipe_with_other_epochs(name, tmp_path):
    words = bench.words(name, options(tmp_path), 10, 2)
    sets = [words[i + 1] for i, w in enumerate(words) if w == "--set"]
    made = config.resolve(f"{name}-digits", config.parse_sets(sets)).method
    own = bench.settings(name)
    assert made["epochs"] == 10 and made.get("warmup", 2) == 2
    if "milestones" in own:
        assert made["milestones"] == [round(10 * m / own["epochs"]) for m in own["milestones"]]
    changed = {k for k in own if made.get(k, own[k]) != own[k]}
    assert changed <= {"epochs", "warmup", "milestones"}


def test_a_method_without_a_recipe_is_named_with_the_reason(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "newest", "nowhere:Newest")
    with pytest.raises(_budget.BenchError, match="no recipe newest-digits"):
        bench.settings("newest")


def test_a_run_adds_to_the_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_budget, "plan", lambda *_: {"epochs": 2, "warmup": 0})  # the plan has a test of its own
    small = ["--seconds", "300"]
    kept = {"method": "fast", "reason": "kept"}
    _budget.write(tmp_path / "methods.json", {"budget": 300.0, "threads": 1, "seed": 0, "rows": [kept]})
    words = bench.words
    over = ["--set", "method.kd_steps=2", "--set", "method.kd_batch=16", "--set", "method.n_images=32"]
    monkeypatch.setattr(bench, "words", lambda *args: [*words(*args), *over])
    assert bench.main(["--out", str(tmp_path), "--only", "noise", *small]) == 0
    found = json.loads((tmp_path / "methods.json").read_text())
    assert found["rows"][0] == kept
    row = found["rows"][1]
    assert (row["method"], row["epochs"], row["code"], row["data"]) == ("noise", 2, 0, False)
    assert row["top1"] == row["seconds_top1"][-1][1] and row["cpu_seconds"] > 0
    assert "noise" in capsys.readouterr().out
    names = [e.text for e in ET.fromstring((tmp_path / "methods.svg").read_text()).iter() if e.tag.endswith("text")]
    assert "noise" in names
    assert bench.older(options(tmp_path, *small)).keys() == {"fast", "noise"}
    assert bench.older(options(tmp_path, "--seconds", "10")) == {}


def test_accuracy_at_a_time():
    row = {"seconds_top1": [[5.0, 40.0], [9.0, 60.0]]}
    assert [bench.at(row, s) for s in (4.0, 5.0, 8.9, 9.0, 99.0)] == [None, 40.0, 40.0, 60.0, 60.0]
