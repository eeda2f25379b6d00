"""The bench of pretrained teachers: its settings are the methods' own fields, and a run of it ends in a record."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benches import pretrained
from fastkd import config, methods


@pytest.mark.parametrize("name", pretrained.METHODS)
def test_settings_are_fields_of_the_method(name, tmp_path):
    options = pretrained.parser().parse_args(["--data", str(tmp_path), "--method", name, "--out", str(tmp_path)])
    words = pretrained.words(options, 20, 2)
    made = config.parse_sets([words[i + 1] for i, w in enumerate(words) if w == "--set"])["method"]
    fields = {f.name for f in dataclasses.fields(methods.method_class(name))}
    assert made["epochs"] == 20 and made["warmup"] == 2 and made.keys() <= fields


@pytest.mark.slow
def test_a_short_run_becomes_a_record(shared_data, tmp_path):
    words = ["--data", str(shared_data), "--method", "fast", "--cpu-minutes", "1", "--out", str(tmp_path)]
    for text in ("kd_steps=2", "kd_batch=16", "batch=8", "loops=1", "g_steps=1"):
        words += ["--set", f"method.{text}"]
    assert pretrained.main(words) == 0
    record = json.loads((tmp_path / "pretrained-fast.json").read_text())
    assert record["code"] in (0, 75) and record["cpu_seconds"] < 90
    assert record["teacher"]["top1"] == pytest.approx(0.9173)
    assert record["top1"] == record["seconds_top1"][-1][1] and record["epochs"] >= 2
    assert str(shared_data) not in json.dumps(record)
