"""Ranks that die, are stopped, or are not alike, checkpoints that are gone: T1 to T6, T12, T24, T26, T27 of the fault table, on two CPU
ranks."""

from __future__ import annotations

import signal

import pytest
import torch

from fastkd import models
from fastkd.engine import checkpoint

pytestmark = pytest.mark.faults

STEP = 13
"""In the middle of the second of three epochs."""


@pytest.mark.fault("T1")
def test_a_killed_rank_is_started_again_and_nothing_is_lost(ranks, undisturbed):
    done = ranks.run("killed", "--max-restarts", 2, plant={"rank": 1, "step": STEP, "do": "kill"})
    assert done.returncode == 0, done.stderr
    assert ranks.student("killed") == ranks.student(undisturbed)
    assert "continued from step-" in done.stderr and ranks.attempts("killed") == 2
    ranks.nobody_is_left("killed", 5)


@pytest.mark.fault("T1", "T3")
@pytest.mark.parametrize(("rank", "at", "step"), [(1, "evaluation", 2), (0, "half-write", 6), (0, "rename", 2), (0, "latest", 2)])
def test_a_rank_that_dies_at_an_awkward_moment_is_started_again(ranks, undisturbed, rank, at, step):
    """`test_moments` has all moments, without the launcher."""
    name = f"killed-{at}"
    done = ranks.run(name, plant={"rank": rank, "at": at, "step": step, "do": "kill"})
    assert done.returncode == 0, done.stderr
    assert ranks.attempts(name) == 2 and ranks.student(name) == ranks.student(undisturbed)
    ranks.nobody_is_left(name, 5)


@pytest.mark.fault("T2")
def test_without_restarts_the_first_failure_is_named_and_resume_goes_on(ranks, undisturbed):
    done = ranks.run("no-restart", "--max-restarts", 0, plant={"rank": 1, "step": STEP, "do": "kill"})
    assert done.returncode == 1, done.stderr
    assert "rank 1 failed first, with SIGKILL" in done.stderr and "Traceback (most recent call last)" not in done.stderr.splitlines()[0]
    ranks.nobody_is_left("no-restart", 10)
    again = ranks.run("no-restart", "--resume")
    assert again.returncode == 0, again.stderr
    assert ranks.student("no-restart") == ranks.student(undisturbed)


@pytest.mark.fault("T4")
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


@pytest.mark.fault("T4")
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_signal_while_the_teacher_is_measured_leaves_with_75_and_a_checkpoint_of_the_start(ranks, undisturbed, gpus):
    name, alone = f"teacher-{gpus}", gpus == 1
    plant = {"rank": -1 if alone else 1, "at": "teacher", "do": "signal" if alone else "signal-launcher", "value": int(signal.SIGTERM)}
    done = ranks.run(name, gpus=gpus, plant=plant)
    assert done.returncode == 75, done.stderr
    assert ranks.status(name)["state"] == "preempted" and "fastkd run --resume" in done.stderr
    assert [p.name for p in checkpoint.listed(ranks.parent / name / "checkpoints")] == [checkpoint.name_of(0)]
    ranks.nobody_is_left(name, 5)
    again = ranks.run(name, "--resume", gpus=gpus)
    assert again.returncode == 0, again.stderr
    assert alone or ranks.student(name) == ranks.student(undisturbed)


@pytest.mark.fault("T5")
def test_a_second_signal_leaves_at_once_and_what_was_saved_is_whole(ranks, undisturbed):
    plant = {"rank": 0, "step": STEP, "do": "signal-launcher-twice", "value": int(signal.SIGTERM)}
    done = ranks.run("twice", plant=plant)  # rank 0 would sleep for ten minutes, rank 1 wait for it
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    ranks.nobody_is_left("twice", 2)
    said: list[str] = []
    assert checkpoint.newest(ranks.parent / "twice" / "checkpoints", said).manifest["step"] == 12 and not said
    assert ranks.run("twice", "--resume").returncode == 0
    assert ranks.student("twice") == ranks.student(undisturbed)


@pytest.mark.fault("T5")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_second_signal_to_a_single_process(ranks, number):
    name = f"alone-{number.name}"
    plant = {"rank": -1, "step": STEP, "do": "signal-twice", "value": int(number)}  # it would sleep for ten minutes
    done = ranks.run(name, gpus=1, plant=plant)
    assert done.returncode == 128 + number, done.stderr
    said: list[str] = []
    assert checkpoint.newest(ranks.parent / name / "checkpoints", said).manifest["step"] == 12 and not said
    assert not list((ranks.parent / name).rglob("*.tmp*"))
    assert ranks.run(name, "--resume", gpus=1).returncode == 0


@pytest.mark.fault("T6")
def test_a_killed_launcher_leaves_a_checkpoint_and_no_orphan(ranks, undisturbed):
    done = ranks.run("orphans", plant={"rank": 0, "step": STEP, "do": "kill-launcher"})
    assert done.returncode == -signal.SIGKILL
    ranks.nobody_is_left("orphans", 60)
    assert ranks.status("orphans")["state"] == "preempted"
    assert ranks.run("orphans", "--resume").returncode == 0
    assert ranks.student("orphans") == ranks.student(undisturbed)


@pytest.mark.fault("T26")
def test_a_run_goes_on_with_another_number_of_ranks(ranks, undisturbed):
    done = ranks.run("fewer", plant={"rank": 0, "step": STEP, "do": "signal-launcher", "value": int(signal.SIGTERM)})
    assert done.returncode == 75, done.stderr
    again = ranks.run("fewer", "--resume", gpus=1)
    assert again.returncode == 0 and "equal to rounding, not to the bit" in again.stderr, again.stderr
    one, two = ranks.state("fewer"), ranks.state(undisturbed)
    assert one.keys() == two.keys()
    far = {k: float((one[k].double() - two[k].double()).abs().max()) for k in one if k.startswith("student.") and one[k].numel()}
    assert max(far.values()) < 1e-2 and any(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.fault("T4")
def test_a_time_limit_is_a_stop(ranks, stopped):
    assert ranks.status(stopped)["state"] == "preempted" and ranks.attempts(stopped) == 1
    assert checkpoint.newest(ranks.parent / stopped / "checkpoints", []).manifest["step"] == 1


@pytest.mark.fault("T12")
def test_without_a_valid_checkpoint_resume_refuses_and_auto_starts_anew(ranks, stopped, undisturbed):
    for name in (ranks.copy(stopped, "must"), ranks.copy(stopped, "auto")):
        for path in checkpoint.listed(ranks.parent / name / "checkpoints"):
            (path / "state.safetensors").write_bytes(b"cut")
    done = ranks.run("must", "--resume")
    assert done.returncode == 5, done.stderr
    assert "no checkpoint in" in done.stderr and "step-00000001: state.safetensors has 3 bytes" in done.stderr
    assert ranks.attempts("must") == 1
    done = ranks.run("auto", "--resume=auto")
    assert done.returncode == 0, done.stderr
    assert "starts anew" in done.stderr and ranks.student("auto") == ranks.student(undisturbed)


TEACHER = """
import os
from fastkd import models

def teacher():
    net, rank = models.build("resnet8", classes=10, channels=1, input_size=32), int(os.environ["RANK"])
    def moved(net, keys):
        next(net.parameters()).data.add_(rank)

    net.register_load_state_dict_post_hook(moved)
    return net
"""


@pytest.mark.fault("T27")
def test_ranks_with_different_teachers_are_refused_before_the_first_step(ranks):
    (ranks.parent / "teacher.py").write_text(TEACHER)
    weights = ranks.parent / "teacher.safetensors"
    models.save_weights(weights, models.build("resnet8", classes=10, channels=1, input_size=32).state_dict())
    facts = ("--classes", 10, "--channels", 1, "--input-size", 32, "--mean", 0.5, "--std", 0.5, "--data", "none")
    teacher = ("--teacher", f"py:{ranks.parent / 'teacher.py'}:teacher", "--teacher-weights", weights)
    done = ranks.run("unlike", *teacher, "--student", "resnet8", *facts)
    assert done.returncode == 2, done.stderr
    assert "the teacher of rank 1 is not that of rank 0" in done.stderr
    assert ranks.attempts("unlike") == 1 and not (ranks.parent / "unlike" / "checkpoints").exists()


@pytest.mark.fault("T24")
def test_one_rank_without_memory_ends_the_run_once_with_its_code(ranks):
    done = ranks.run("memory", plant={"rank": 1, "step": STEP, "do": "no-memory"})
    assert done.returncode == 7, done.stderr
    assert ranks.status("memory") | {"time": 0} == {"state": "fatal", "time": 0, "code": 7, "reason": "planted"}
    assert ranks.attempts("memory") == 1
    ranks.nobody_is_left("memory", 5)


def test_a_rank_that_crashes_leaves_its_traceback_in_its_log(ranks):
    done = ranks.run("crash", "--max-restarts", 1, plant={"rank": 1, "step": STEP, "do": "raise"})
    assert done.returncode == 0 and ranks.attempts("crash") == 2, done.stderr
    (log,) = (ranks.parent / "crash" / "logs").glob("*/attempt_0/1/stderr.log")
    assert 'RuntimeError("planted")' in log.read_text()


def test_a_mistake_ends_the_run_once_with_its_own_code(ranks):
    done = ranks.run("odd", "--set", "method.batch=33")
    assert done.returncode == 2, done.stderr
    assert "33 rows cannot be dealt to 2 ranks" in done.stderr and "nearest" in done.stderr
    assert ranks.attempts("odd") == 1
