"""The benches of several ranks: they run, and the documentation shows their committed records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benches import ranks, store, tables

ROOT = Path(__file__).resolve().parents[2]
RANKS = {
    **{"recipe": "recipe", "step": "step", "numbers": "numbers", "ms": "step ms", "part_ms": "flat all-reduce, ms", "share": "share"},
    **{"alone_ms": "alone, ms"},
}
"""Column of a record → its title in the documentation."""
STORE = {
    **{"images": "images", "tier": "tier", "prefetch": "batches ahead", "ms": "step ms", "part_ms": "of it the batch, ms"},
    **{"share": "share"},
}
"""The same of the other bench."""


@pytest.mark.parametrize(("bench", "rows"), [(store, 7), (ranks, 2)], ids=["store", "ranks"])
def test_they_run_on_two_ranks(bench, rows, tmp_path):
    path = tmp_path / "found.json"
    assert bench.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["quick"] and record["command"] == f"python -m benches.{bench.__name__.split('.')[1]} --quick --device cpu"
    assert len(record["rows"]) == rows
    for row in record["rows"]:
        assert row["ranks"] == 2 and 0 < row["part_ms"] <= row["p80"] * 2 and 0 < row["share"] < 1


def test_one_rank_has_nobody_to_talk_to(capsys):
    with pytest.raises(SystemExit):
        ranks.main(["--gpus", "1"])
    assert "one rank has nobody to talk to" in capsys.readouterr().err


@pytest.mark.parametrize(("bench", "titles"), [(store, STORE), (ranks, RANKS)], ids=["store", "ranks"])
def test_the_documentation_shows_the_committed_record(bench, titles):
    record = json.loads((ROOT / "benches" / "results" / "cpu-2-cores" / f"{bench.__name__.split('.')[1]}.json").read_text())
    page = (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8")
    lines = [list(titles.values()), ["---"] * len(titles), *([tables.cell(k, r.get(k)) for k in titles] for r in record["rows"])]
    assert "\n".join(f"| {' | '.join(line)} |" for line in lines) in page
    assert not record["quick"] and record["command"] in page
