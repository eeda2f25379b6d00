"""Ranks that the user's own torchrun or srun starts: two launchers, as on two machines, against one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from fastkd import models
from fastkd.engine import events
from tests.cli.conftest import STUDENT, environment, sets
from tests.faults.conftest import PLANTED

pytestmark = pytest.mark.faults


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def two_launchers(*words: Any) -> list[str]:
    """Run with two launchers of a rank each, both of which must end well; what each wrote to stderr."""
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-id", uuid.uuid4().hex, "--rdzv-endpoint", f"localhost:{free_port()}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
    command = [*torchrun, *rendezvous, "--local-addr", "localhost", "-m", "fastkd", *map(str, words)]
    both = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        ends = [p.communicate(timeout=240)[1] for p in both]
    finally:
        for p in both:
            p.kill()
    assert [p.returncode for p in both] == [0, 0], ends
    return ends


def state(out: Path) -> dict[str, Any]:
    return models.load_weights(out / "student.safetensors").state


def test_two_launchers_equal_one_process_and_a_stop_is_not_started_again(tmp_path):
    words = ("run", "--method", "noise", "--device", "cpu", *sets(*STUDENT, "poll=1"))
    alone = [sys.executable, "-m", "fastkd", *words, "--out", str(tmp_path / "one")]
    one = subprocess.run(alone, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert one.returncode == 0, one.stderr
    two = tmp_path / "two"
    two_launchers(*words, "--resume=auto", "--out", two, "--time-limit", "0.01s")
    status = json.loads((two / "status.json").read_text())
    assert (status["state"], status["code"]) == ("preempted", 75)
    assert [e["kind"] for e in events.read(two / "events.jsonl")].count("stopped") == 1  # a restart would have stopped again
    ends = two_launchers(*words, "--resume=auto", "--out", two)
    assert sum("continued from step-" in end for end in ends) == 1
    assert json.loads((two / "environment.json").read_text())["ranks"] == 2
    a, b = state(tmp_path / "one"), state(two)
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a) < 1e-4


def together(command: list[str], common: dict[str, str], own: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Ranks that something else starts, each with variables of its own: exit codes and what each wrote to stderr."""
    ranks = [subprocess.Popen(command, env={**environment(), **common, **mine}, stderr=subprocess.PIPE, text=True) for mine in own]
    try:
        ends = [p.communicate(timeout=240)[1] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    return [(p.returncode, end) for p, end in zip(ranks, ends, strict=True)]


def two_tasks(out: Path, *words: Any, job: int) -> list[tuple[int, str]]:
    """Two tasks as srun starts them, each with nothing but srun's variables."""
    command = [sys.executable, "-m", "fastkd", *map(str, words), "--launcher", "slurm", "--out", str(out)]
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost"}
    return together(command, common, [{"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(2)])


def two_pods(out: Path, *words: Any, inside: dict[str, Any] | None = None) -> list[tuple[int, str]]:
    """Two pods of a PyTorchJob; `inside` is a fault (see `planted`)."""
    command = [sys.executable, "-m", "fastkd", *map(str, words), "--out", str(out)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    if inside is not None:
        path = os.pathsep.join([str(PLANTED), environment()["PYTHONPATH"]])
        common |= {"PYTHONPATH": path, "PLANT_INSIDE": json.dumps(inside)}
    return together(command, common, [{"RANK": str(r)} for r in range(2)])


def test_two_tasks_of_slurm_equal_one_process_and_stop_with_75(tmp_path):
    words = ("run", "--method", "noise", "--device", "cpu", *sets(*STUDENT, "poll=1"))
    alone = [sys.executable, "-m", "fastkd", *words, "--out", str(tmp_path / "one")]
    one = subprocess.run(alone, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert one.returncode == 0, one.stderr
    job, two = free_port(), tmp_path / "two"
    ends = two_tasks(two, *words, "--time-limit", "0.01s", job=job)
    assert [code for code, _ in ends] == [75, 75], ends  # srun hands it on, and the job script starts itself again
    ends = two_tasks(two, *words, "--resume=auto", job=job + 1)
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum("continued from step-" in end for _, end in ends) == 1
    assert json.loads((two / "environment.json").read_text())["ranks"] == 2
    a, b = state(tmp_path / "one"), state(two)
    assert max(float((a[k].double() - b[k].double()).abs().max()) for k in a) < 1e-4


@pytest.mark.fault("T24")
def test_a_pod_without_memory_ends_the_other_with_its_reason_and_the_next_start_does_the_step_in_parts(tmp_path):
    words, out = ("run", "--method", "noise", "--device", "cpu", *sets(*STUDENT, "poll=1"), "--resume=auto"), tmp_path / "run"
    ends = two_pods(out, *words, inside={"do": "no-memory", "rank": 1, "at": [1, "learn", 0]})
    assert [code for code, _ in ends] == [7, 7], ends
    assert "another rank has ended the run: rank 1: out of memory in step 'learn'" in ends[0][1] and "a fault of fastkd" not in ends[0][1]
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["code"]) == ("fatal", 7) and status["reason"].startswith("rank 1: out of memory")
    ends = two_pods(out, *words)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "student steps are taken in 2 parts" in ends[0][1]


def test_ranks_that_a_launcher_started_say_that_gpus_starts_none(tmp_path):
    words = ("run", "--method", "noise", "--device", "cpu", *sets(*STUDENT), "--gpus", "8", "--out", str(tmp_path / "run"))
    pod = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}  # as a PyTorchJob sets them
    done = subprocess.run([sys.executable, "-m", "fastkd", *words], env=environment(**pod), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gpus 8 starts nothing: a launcher has started this rank on this machine already" in done.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 1
