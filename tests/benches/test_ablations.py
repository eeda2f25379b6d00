"""Ablations: their switches exist, and what their runs say is said without flattery."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benches import _budget, ablations
from fastkd import config, methods


def values(texts):
    return {key: config.parse_value(value) for key, value in (text.split("=") for text in texts)}


@pytest.mark.parametrize("own", ablations.ABLATIONS, ids=lambda a: a.part)
def test_a_switch_is_a_field_and_changes_the_setting(own):
    table = config.resolve(f"{own.method}-digits", {}).method | values(own.setting)
    fields = {f.name: f.default for f in dataclasses.fields(methods.method_class(own.method, table))}
    assert values(own.setting).keys() <= fields.keys()
    assert all(value != table.get(key, fields[key]) for key, value in values(own.switch).items())


BN = next(a for a in ablations.ABLATIONS if a.switch == ("bn=0",))


def runs(*values):
    """Pairs of (as it is, without); the mean over two epochs is the value, and the last epoch is one point above it."""
    about = {"method": BN.method, "setting": list(BN.setting)}
    return [
        {**about, "switch": list(switch), "seed": seed, "top1": top1 + 1, "top1_by_epoch": [top1 - 1, top1 + 1]}
        for seed, pair in enumerate(values)
        for switch, top1 in zip(((), BN.switch), pair)
    ]


@pytest.mark.parametrize(("values", "said"), [
    ([(80.0, 70.0), (78.0, 69.0)], "yes"),
    ([(80.0, 70.0), (78.0, 79.0)], "within two standard errors"),
    ([(80.0, 81.0), (78.0, 79.5)], "the other way"),
    ([(80.0, 70.0)], "within two standard errors"),
])  # fmt: skip
def test_what_the_last_column_says(values, said):
    (row,) = ablations.rows(runs(*values))
    assert ablations.cells(row)[-1] == said and row["method"] == BN.method


def test_a_seed_without_its_counterpart_is_left_out():
    (row,) = ablations.rows([*runs((80.0, 70.0)), {**runs((10.0, 0.0))[0], "seed": 1}])
    assert row["whole"] == [80.0] and row["without"] == [70.0] and (row["change"], row["last"], row["fell"]) == (-10.0, -10.0, 1)


def test_the_record_grows_and_old_runs_are_kept(tmp_path, monkeypatch):
    """Two toy runs; the others of the record are not run again."""
    two = tuple(ablations.Ablation("a part", "fast", (switch,), ("lr=0.05",), "a reason") for switch in ("adv=0", "bn=0"))
    monkeypatch.setattr(ablations, "ABLATIONS", two)
    known = {"method": "fast", "setting": ["lr=0.05"], "seed": 0, "top1": 50.0, "top1_by_epoch": [50.0]}
    old = [{**known, "switch": switch} for switch in ([], ["adv=0"])]
    _budget.write(tmp_path / "ablations.json", {"runs": old})
    toy = ["epochs=2", "warmup=1", "batch=10", "g_steps=1", "loops=1", "kd_steps=2", "kd_batch=8"]
    words = [w for text in toy for w in ("--set", f"method.{text}")]
    assert ablations.main(["--out", str(tmp_path), "--seeds", "1", *words]) == 0
    found = json.loads((tmp_path / "ablations.json").read_text())["runs"]
    assert found[:2] == old and [r["switch"] for r in found[2:]] == [["bn=0"]] and len(found[2]["top1_by_epoch"]) == 1
