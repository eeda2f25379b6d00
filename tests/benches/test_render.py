"""The committed page is what the committed records say, and records become tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benches import render

from .records import record, row

LADDER = [
    row("published", 30.0, "eager", rung="as published", x_eager=1.0),
    row("frozen", 24.0, "eager", rung="freezing", x_eager=1.25, x_rung=1.25, layout="channels_last"),
    row("fused BN in teacher", 12.0, rung="kernels", x_eager=2.5, x_rung=2.0, layout="channels_last"),
    row("fused BN in generator", None, rung="kernels", layout="channels_last"),
    row("compile(G, T, S)", 15.0, "compile", x_eager=2.0),
]


def put(folder: Path, *made: dict) -> Path:
    folder.mkdir(parents=True)
    for one in made:
        (folder / f"{one['bench']}.json").write_text(json.dumps(one))
    return folder.parent


def test_the_committed_page_is_what_the_records_say():
    assert render.page(render.RESULTS) == render.PAGE.read_text(encoding="utf-8"), "run python -m benches.render"


def test_a_device_with_records(tmp_path: Path):
    rows = [row("hooks", 10.0, "eager", x_eager=1.0), row("compile(definition)", 4.0, "compile"), row("ours: cpp", 1.0, x_eager=10.0)]
    page = render.page(put(tmp_path / "cpu-2-cores", record(rows), record(LADDER, "generator")))
    assert "## cpu-2-cores" in page and "## GPU: not measured yet" in page and "## CPU: not measured yet" not in page
    assert "| eager | ≥ 5x | met: 10.00x |" in page.replace("met: 10x", "met: 10.00x")
    assert "| fused BN in teacher | kernels | float32 | 12 | 2.00x | 2.50x |" in page
    assert "| fused BN in generator | kernels | float32 | is not here |  |  |" in page
    assert "Engine 1.25x, kernels 2.00x" in page
    assert "10.00x" in page and "1 (cpp)" in page and "revision abc" in page


def test_a_record_that_was_cut_off(tmp_path: Path):
    left = {"op": "frozen_bn_act_stats", "case": "another", "provider": "this case and those after it", "reason": "no time was left"}
    put(tmp_path / "cpu", record([row("hooks", 10.0, "eager", x_eager=1), row("ours: cpp", 1.0, x_eager=10.0), left]))
    assert "| 10.00x |" in render.page(tmp_path)


def test_kernels_stand_beside_their_twins_without_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        row("hooks", 10.0, "eager", x_eager=1.0, graph_ms=8.0),
        row("compile(definition)", 4.0, "compile", graph_ms=3.0),
        row("ours: cuda", 1.0, graph_ms=0.5, graph_gbps=2500.0, graph_of_copy=0.9, graph_x_triton=1.2),
        row("ours: triton", 1.1, graph_ms=0.6, graph_gbps=2100.0),
    ]
    folder = put(tmp_path / "gpu" / "h200", record(rows)) / "h200"
    assert render.main(["--show", str(folder)]) == 0
    assert "| 8 | 3 | 0.5 | 0.6 | 1.20x | 2500 | 90 % |" in capsys.readouterr().out


def test_without_records_the_page_claims_nothing(tmp_path: Path):
    page = render.page(tmp_path)
    assert "CPU: not measured yet" in page and "met:" not in page and "short:" not in page and " ms" not in page


def test_toy_sizes_are_not_published(tmp_path: Path):
    with pytest.raises(ValueError, match="--quick"):
        render.page(put(tmp_path / "a", record([], settings={"quick": True})))


def test_files_that_are_no_records_are_left_alone(tmp_path: Path):
    (put(tmp_path / "a", record([row("hooks", 1.0, "eager")])) / "a" / "curve.json").write_text('{"what": "a curve"}')
    assert "## a\n" in render.page(tmp_path)
