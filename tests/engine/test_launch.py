"""Who is a rank, and what its launcher reads."""

from __future__ import annotations

import pytest

from fastkd.engine import launch
from fastkd.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what `_from_slurm` sets is undone after the test
        monkeypatch.delenv(name)


def test_auto_joins_only_where_ranks_are_set(monkeypatch):
    assert not launch.is_rank("auto") and not launch.is_rank("none")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.is_rank("auto") and launch.is_rank("torchrun") and not launch.is_rank("none")


def test_a_launcher_that_is_not_there_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="RANK and WORLD_SIZE are not set"):
        launch.is_rank("torchrun")
    with pytest.raises(ConfigError, match="SLURM_PROCID is not set; start it with srun"):
        launch.is_rank("slurm")
    with pytest.raises(ConfigError, match="unknown launcher 'mpi'"):
        launch.is_rank("mpi")


def test_sruns_variables_count_only_when_asked_for(monkeypatch):
    for name, value in (("SLURM_PROCID", "3"), ("SLURM_NTASKS", "16"), ("SLURM_LOCALID", "1"), ("SLURM_JOB_ID", "4242")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[07-09,12],b1")
    assert not launch.is_rank("auto")
    assert launch.is_rank("slurm")
    found = [launch.os.environ[name] for name in VARIABLES]
    assert found == ["3", "16", "1", "gpu07", "24242"]


@pytest.mark.parametrize(
    ("hosts", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("n[1-4]", "n1"), ("n[03,07-9],m2", "n03"), ("x-y[10]", "x-y10")]
)
def test_first_host_of_a_slurm_list(hosts, first):
    assert launch.first_host(hosts) == first


@pytest.mark.parametrize(
    ("text", "code"),
    [('{"state": "preempted", "code": 75}', 75), ('{"state": "done", "code": 0}', 0), ("{", 1), ('{"state": "running"}', 1), (None, 1)],
)
def test_the_exit_code_is_what_the_ranks_left(tmp_path, text, code):
    if text is not None:
        (tmp_path / "status.json").write_text(text)
    assert launch.code_of(tmp_path, 1) == code
