"""Ranks that die, are stopped, or are not alike: T1, T2, T4, T5, T6 of the fault table, on two CPU ranks."""

from __future__ import annotations

import signal

import pytest
import torch

pytestmark = pytest.mark.faults

STEP = 13
"""In the middle of the second of three epochs."""


def test_a_killed_rank_is_started_again_and_nothing_is_lost(ranks, undisturbed):
    done = ranks.run("killed", "--max-restarts", 2, plant={"rank": 1, "step": STEP, "do": "kill"})
    assert done.returncode == 0, done.stderr
    assert ranks.student("killed") == ranks.student(undisturbed)
    assert "continued from step-" in done.stderr
    ranks.nobody_is_left("killed", 5)


def test_without_restarts_the_first_failure_is_named_and_resume_goes_on(ranks, undisturbed):
    done = ranks.run("no-restart", "--max-restarts", 0, plant={"rank": 1, "step": STEP, "do": "kill"})
    assert done.returncode == 1, done.stderr
    assert "rank 1 failed first, with SIGKILL" in done.stderr and "Traceback (most recent call last)" not in done.stderr.splitlines()[0]
    ranks.nobody_is_left("no-restart", 10)
    again = ranks.run("no-restart", "--resume")
    assert again.returncode == 0, again.stderr
    assert ranks.student("no-restart") == ranks.student(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_to_the_launcher_saves_and_leaves_with_75(ranks, undisturbed, number):
    name = number.name
    done = ranks.run(name, plant={"rank": 0, "step": STEP, "do": "signal-launcher", "value": int(number)})
    assert done.returncode == 75, done.stderr
    assert ranks.status(name)["state"] == "preempted" and "fastkd run --resume" in done.stderr
    ranks.nobody_is_left(name, 5)
    again = ranks.run(name, "--resume")
    assert again.returncode == 0, again.stderr
    assert ranks.student(name) == ranks.student(undisturbed)


def test_a_killed_launcher_leaves_a_checkpoint_and_no_orphan(ranks, undisturbed):
    done = ranks.run("orphans", plant={"rank": 0, "step": STEP, "do": "kill-launcher"})
    assert done.returncode == -signal.SIGKILL
    ranks.nobody_is_left("orphans", 60)
    assert ranks.status("orphans")["state"] == "preempted"
    assert ranks.run("orphans", "--resume").returncode == 0
    assert ranks.student("orphans") == ranks.student(undisturbed)


def test_a_run_goes_on_with_another_number_of_ranks(ranks, undisturbed):
    done = ranks.run("fewer", plant={"rank": 0, "step": STEP, "do": "signal-launcher", "value": int(signal.SIGTERM)})
    assert done.returncode == 75, done.stderr
    again = ranks.run("fewer", "--resume", gpus=1)
    assert again.returncode == 0 and "equal to rounding, not to the bit" in again.stderr, again.stderr
    one, two = ranks.state("fewer"), ranks.state(undisturbed)
    assert one.keys() == two.keys()
    far = {k: float((one[k].double() - two[k].double()).abs().max()) for k in one if k.startswith("student.") and one[k].numel()}
    assert max(far.values()) < 1e-2 and any(torch.equal(one[k], two[k]) for k in one)


def test_a_time_limit_is_a_stop(ranks):
    done = ranks.run("limit", "--time-limit", "0s")
    assert done.returncode == 75, done.stderr
    assert ranks.status("limit")["state"] == "preempted"


def test_a_mistake_ends_the_run_once_with_its_own_code(ranks):
    done = ranks.run("odd", "--set", "method.batch=33")
    assert done.returncode == 2, done.stderr
    assert "33 rows cannot be dealt to 2 ranks" in done.stderr and "nearest" in done.stderr
    assert not list((ranks.parent / "odd" / "logs").glob("*/attempt_1"))
