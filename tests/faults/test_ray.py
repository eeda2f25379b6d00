"""The command inside Ray Train, with Ray itself, which is no part of any extra: `pip install "ray[train]"`."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkd.engine import events
from tests.cli.conftest import TINY, environment, sets

pytest.importorskip("ray.train.torch", reason='Ray is not here: pip install "ray[train]"')
pytestmark = pytest.mark.faults


def fits(store: Path, *asked: dict[str, Any]) -> list[str | None]:
    """What each of some calls of `TorchTrainer.fit`, one after the other, raised."""
    command = [sys.executable, "-m", "tests.faults.ray_program", json.dumps({"store": str(store), "fits": asked})]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(command, env=environment(**quiet), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def words(out: Path) -> list[str]:
    return ["run", "--device", "cpu", "--resume=auto", "--out", str(out), *sets(*TINY, "poll=1", "checkpoint.every_steps=4")]


def starts_and_ends(out: Path) -> list[str]:
    return [e["kind"] for e in events.read(out / "events.jsonl") if e["kind"] in ("start", "stopped", "done")]


@pytest.mark.fault("T1", "T4")
def test_a_run_inside_ray_stops_goes_on_outlives_a_dead_worker_and_has_the_bits_of_our_own_launcher(ranks, undisturbed):
    out = ranks.parent / "ray"
    killed = {"plant": {"do": "kill", "rank": 1, "at": "step", "step": 10}, "failures": 1}
    ends = fits(ranks.parent / "store", {"words": [*words(out), "--time-limit", "0.01s"]}, {"words": words(out), **killed})
    assert ends == [None, None]
    assert starts_and_ends(out) == ["start", "stopped", "start", "start", "done"]
    assert ranks.status("ray")["code"] == 0 and json.loads((out / "environment.json").read_text())["ranks"] == 2
    assert ranks.student("ray") == ranks.student(undisturbed)
    ranks.nobody_is_left("ray", 10)


@pytest.mark.fault("T24")
def test_a_worker_without_memory_ends_the_others_with_its_reason_and_the_next_start_repeats_the_step(ranks, undisturbed):
    out = ranks.parent / "ray-memory"
    short = {"inside": {"do": "no-memory", "rank": 1, "at": [1, "invert", 0]}}
    (end,) = fits(ranks.parent / "store", {"words": words(out), **short})
    assert end is not None and "fastkd: exit code 7" in end and "exit code 1" not in end
    status = ranks.status("ray-memory")
    assert (status["state"], status["code"]) == ("fatal", 7) and "rank 1: out of memory in step 'invert'" in status["reason"]
    assert fits(ranks.parent / "store", {"words": words(out)}) == [None]
    assert ranks.student("ray-memory") == ranks.student(undisturbed)
