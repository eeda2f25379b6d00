"""Who is a rank, and what its launcher reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastkd import ranks
from fastkd.cli import main
from fastkd.engine import launch
from fastkd.errors import ConfigError
from tests import small
from tests.cli.conftest import TINY, environment, sets

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


def inside_ray(rank, world, folder):
    """What Ray Train has done when it calls a worker's function: a group for GPUs alone, and the variables of a rank."""
    torch.set_num_threads(1)
    dist.init_process_group("cuda:gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "NODE_RANK": "0"}
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.zeros(1))
    words = ["run", "--device", "cpu", "--out", str(folder / "run"), *sets(*TINY, "poll=1", "checkpoint.every_steps=4")]
    assert main(words) == 0
    assert dist.is_initialized() and ranks.world() == world  # the group is its owner's, and so is the process
    assert main([*words[:1], "--resume", *words[1:5]]) == 0
    (folder / f"done-{rank}").touch()
    small.end_of_rank()


def test_ranks_whose_process_group_is_up_and_knows_no_cpu_are_joined_by_a_group_beside_it(tmp_path):
    mp.spawn(inside_ray, (2, tmp_path), nprocs=2)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists() and (tmp_path / "run" / "student.safetensors").exists()
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    ("hosts", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("n[1-4]", "n1"), ("n[03,07-9],m2", "n03"), ("x-y[10]", "x-y10")]
)
def test_first_host_of_a_slurm_list(hosts, first):
    assert launch.first_host(hosts) == first


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"state": "preempted", "code": 75}', 75),
        ('{"state": "done", "code": 0}', 0),
        ('{"state": "fatal", "code": 6}', 6),
        ('{"state": "fatal", "code": 1}', 143),
        ('{"state": "running"}', 143),
        ("{", 143),
        (None, 143),
    ],
)
def test_the_exit_code_is_what_the_ranks_left(tmp_path, text, code):
    if text is not None:
        (tmp_path / "status.json").write_text(text)
    assert launch.code_of(tmp_path, 143) == code


def test_what_the_ranks_are_given_does_not_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before, handler = dict(os.environ), signal.getsignal(signal.SIGUSR1)
    with pytest.raises(KeyError), launch._lent({"OMP_NUM_THREADS": "7", launch.OURS: "1 2.0"}):
        assert os.environ["OMP_NUM_THREADS"] == "7" and launch.OURS in os.environ
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"  # as torch's launcher does
        signal.signal(signal.SIGUSR1, lambda *_: None)
        raise KeyError
    assert dict(os.environ) == before and signal.getsignal(signal.SIGUSR1) == handler


def test_a_time_limit_counts_from_the_start_of_the_launcher(monkeypatch):
    monkeypatch.delenv(launch.OURS, raising=False)
    assert launch.time_left(None) is None and launch.time_left(90.0) == 90.0
    monkeypatch.setenv(launch.OURS, f"1 {time.monotonic() - 60}")
    assert launch.time_left(None) is None and launch.time_left(90.0) < 31 and launch.time_left(0.0) < 0


def test_a_rank_whose_launcher_died_while_it_started_leaves():
    code = "from fastkd.engine import launch; launch._die_with_parent()"
    done = subprocess.run([sys.executable, "-c", code], env=environment(**{launch.OURS: "999999999 0.0"}), timeout=60, check=False)
    assert done.returncode == -signal.SIGTERM
    own = subprocess.run([sys.executable, "-c", code], env=environment(**{launch.OURS: f"{os.getpid()} 0.0"}), timeout=60, check=False)
    assert own.returncode == 0


def test_ranks_without_a_rendezvous_are_a_mistake(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="RANK and WORLD_SIZE are set and MASTER_ADDR is not"), launch.joined(False):
        pass


def test_a_launcher_that_cannot_be_told_a_grace_is_known_by_it(monkeypatch):
    class Config:
        def __init__(self, min_nodes: int): ...

    class LaterConfig:
        def __init__(self, min_nodes: int, shutdown_timeout: int | None = None): ...

    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", Config)
    assert launch.grace_of_torch() == 30
    monkeypatch.setattr("torch.distributed.launcher.api.LaunchConfig", LaterConfig)
    assert launch.grace_of_torch() is None


KILL, TERM, ABORT = -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT


@pytest.mark.parametrize(
    ("failures", "first"),
    [  # rank: (exit code, torch's seconds, last word in its log)
        ({0: (1, 50, 7), 1: (KILL, 50, 5)}, 1),  # the peer of a killed rank loses its connection
        ({0: (1, 50, 5), 1: (KILL, 51, 9)}, 1),  # seen across the turn of a second
        ({0: (1, 50, 7), 1: (1, 50, 6)}, 1),  # two tracebacks: the earlier one
        ({0: (ABORT, 50, 7), 1: (1, 50, 6)}, 1),  # the watchdog aborts what waits for a failed rank
        ({0: (TERM, 50, 5), 1: (1, 50, 6)}, 1),  # the launcher ends the rest
        ({0: (1, 50, 5), 1: (KILL, 170, 6)}, 0),  # it did not end within its grace
    ],
)
def test_the_rank_that_failed_first_is_named(tmp_path, failures, first):
    logs = {}
    for rank, (_, _, word) in failures.items():
        logs[rank] = tmp_path / f"{rank}.log"
        logs[rank].touch()
        os.utime(logs[rank], (word, word))
    errors = {rank: SimpleNamespace(exitcode=code, timestamp=at) for rank, (code, at, _) in failures.items()}
    assert launch.first_of(errors, logs)[0] == first
    assert launch.first_of(errors, dict.fromkeys(errors))[0] in errors  # no log at all
