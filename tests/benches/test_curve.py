"""Committed curves come from run folders, not from hands."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from benches import curve
from fastkd import assemble, config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("curve") / "noise"
    table = {"method": {"name": "noise", "epochs": 3, "kd_steps": 2, "kd_batch": 8, "n_images": 16}}
    assemble.distil(config.resolve("noise-digits", table), out)
    return out


def test_a_run_becomes_json_and_svg(run, tmp_path):
    files = ["--json", str(tmp_path / "c.json"), "--svg", str(tmp_path / "c.svg")]
    code = curve.main([f"first={run}", str(run), "--command", "fastkd run", *files])
    assert code == 0
    made = json.loads((tmp_path / "c.json").read_text())
    first, second = made["runs"]
    assert (first["name"], first["command"], second["name"], second["command"]) == ("first", "fastkd run", "noise", None)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    epochs = [e for e in events if e["kind"] == "epoch"]
    assert [p[1] for p in first["minutes_top1"]] == [round(100 * e["top1"], 2) for e in epochs]
    assert first["minutes"] == pytest.approx(sum(e["wall"] for e in epochs) / 60, abs=1e-3)
    root = ET.fromstring((tmp_path / "c.svg").read_text())
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 2 and all(len(e.get("points").split()) == 3 for e in lines)
    assert "teacher 99.20 %" in [e.text for e in root.iter() if e.tag.endswith("text")]


def test_published_figures_are_dashed_lines(run, tmp_path):
    recipe = "zskt-cifar10-wrn40_1-wrn16_2"
    assert curve.main([str(run), "--published", recipe, "--json", str(tmp_path / "c.json"), "--svg", str(tmp_path / "c.svg")]) == 0
    figures = json.loads((tmp_path / "c.json").read_text())["published"]
    assert [(f["label"], f["value"], f["evidence"]) for f in figures] == [("ZSKT", 86.6, "paper"), ("ZSKT", 87.71, "paper")]
    root = ET.fromstring((tmp_path / "c.svg").read_text())
    dashed = [e for e in root.iter() if e.get("stroke-dasharray")]
    words = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert len(dashed) == 3 and "ZSKT, published (last) 86.60 %" in words and "ZSKT, published (not stated) 87.71 %" in words
    heights = [float(e.get("y1")) for e in dashed]
    assert heights == sorted(heights, reverse=True) and 0 < heights[-1] < heights[0] < curve.HEIGHT - curve.BOTTOM


@pytest.mark.parametrize(("low", "high"), [(0, 1.5), (28.4, 92.8), (85.0, 92.8), (0, 27.9), (0, 240.0), (99.0, 99.4)])
def test_ticks_are_few_round_and_inside(low, high):
    found = curve.ticks(low, high)
    assert 3 <= len(found) <= 10 and all(low <= t <= high for t in found) and found == sorted(found)
