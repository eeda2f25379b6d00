"""The benches of several ranks: they run, and the documentation shows their committed records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benches import _ranked, ranks, store

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("bench", [store, ranks], ids=["store", "ranks"])
def test_the_documentation_shows_the_committed_record(bench):
    record = json.loads((ROOT / "benches" / "results" / "cpu-2-cores" / f"{bench.__name__.split('.')[1]}.json").read_text())
    page = (ROOT / "docs" / "ranks.md").read_text(encoding="utf-8")
    assert not record["quick"] and "\n".join(_ranked.markdown(record, bench.COLUMNS)) in page and record["command"] in page
