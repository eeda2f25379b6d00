"""The loop on a small method: events, damage, changed configuration, failing saves, stop signals, collapse to NaN."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading

import pytest
import torch

from fastkd.engine import checkpoint, evaluation, events, loop
from fastkd.engine.folder import locked, next_numbered, owner_lives, prepare, refuse_owned
from fastkd.engine.signals import Stop, watched
from fastkd.errors import CheckpointError, ConfigError, NumericalError, PlaceError
from tests import small


def test_events_hold_every_epoch_once_also_after_a_resume(tmp_path):
    small.run(small.prepared("muse"), tmp_path, max_steps=9, every_steps=4)
    method = small.prepared("muse")
    small.run(method, tmp_path, resume=True)
    curve = events.curve(tmp_path / "events.jsonl")
    assert [e["epoch"] for e in curve] == [0, 1, 2]
    assert [e["trained"] for e in curve] == [False, True, True]
    assert {"agreement", "confidence", "balance"} <= curve[-1].keys()
    assert curve[-1]["step"] == curve[-1]["steps"] and set(curve[-1]["seconds"]) >= {"synthesis", "distillation", "memory", "evaluation"}


@pytest.mark.fault("T31")
def test_a_torn_line_of_the_log_is_skipped(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "epoch", "epoch": 0}\n[1]\n{"kind": "epoch", "epoch": 1}\n{"kind": "epo')
    assert [e["epoch"] for e in events.curve(path)] == [0, 1]


@pytest.mark.fault("T31")
def test_the_event_after_a_torn_line_is_not_lost_with_it(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "epoch", "epoch": 0}\n{"kind": "epo')
    for epoch in (1, 2):
        events.Events(tmp_path).write("epoch", epoch=epoch)
    assert [e["epoch"] for e in events.curve(path)] == [0, 1, 2] and path.read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("then", "epochs"),
    [
        (["start", "epoch 0"], [0]),
        (["start", "warning", "epoch 0"], [0]),
        (["start", "warning", "resumed", "epoch 1"], [0, 1, 2]),
        (["start", "start", "resumed", "epoch 1"], [0, 1, 2]),
        (["start", "checkpoint", "start", "resumed", "epoch 0"], [0]),
        (["start"], [0, 1, 2]),
    ],
    ids=lambda v: "-".join(map(str, v)),
)
def test_the_curve_is_that_of_the_newest_start_from_the_beginning(tmp_path, then, epochs):
    log = events.Events(tmp_path)
    for line in ("start", "epoch 0", "epoch 1", "epoch 2", *then):
        kind, _, epoch = line.partition(" ")
        log.write(kind, **({"epoch": int(epoch)} if epoch else {}))
    assert [e["epoch"] for e in events.curve(tmp_path / "events.jsonl")] == epochs


@pytest.mark.fault("T9")
def test_a_damaged_checkpoint_costs_only_its_steps(tmp_path):
    whole = small.prepared("fast")
    small.run(whole)
    small.run(small.prepared("fast"), tmp_path, max_steps=11, every_steps=5)
    newest = checkpoint.listed(tmp_path / "checkpoints")[0]
    (newest / "state.safetensors").write_bytes(b"cut")
    resumed = small.prepared("fast")
    small.run(resumed, tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True))
    assert any("damaged" in e["text"] for e in events.read(tmp_path / "events.jsonl") if e["kind"] == "warning")


@pytest.mark.fault("T12")
def test_where_all_checkpoints_are_damaged_a_run_starts_anew_only_when_it_may(tmp_path):
    whole = small.prepared("fast")
    small.run(whole)
    small.run(small.prepared("fast"), tmp_path, max_steps=11, every_steps=5)
    for path in checkpoint.listed(tmp_path / "checkpoints"):
        (path / "manifest.json").write_text("{}")
    settings = loop.Settings(poll=2, every_minutes=1e6)
    aside = tmp_path / "copy"
    shutil.copytree(tmp_path / "checkpoints", aside / "checkpoints")
    with pytest.raises(CheckpointError, match=r"can be used \(step-.*step-"):
        loop.run(small.prepared("fast"), settings, events.Events(aside), aside, resume=True)
    method = small.prepared("fast")
    assert loop.run(method, settings, events.Events(tmp_path), tmp_path, resume=True, anew=True) == 0
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), method.student.parameters(), strict=True))
    assert any("starts anew" in e["text"] for e in events.read(tmp_path / "events.jsonl") if e["kind"] == "warning")


@pytest.mark.fault("T16")
def test_another_configuration_is_refused_by_name(tmp_path):
    small.run(small.prepared("fast"), tmp_path, max_steps=3, about={"config": "a", "teacher": "1"})
    with pytest.raises(ConfigError, match="another teacher: it was 1, now 2"):
        small.run(small.prepared("fast"), tmp_path, resume=True, about={"config": "a", "teacher": "2"})


def test_a_checkpoint_of_another_method_does_not_fit(tmp_path):
    small.run(small.prepared("fast"), tmp_path, max_steps=3)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        small.run(small.prepared("noise"), tmp_path, resume=True)


@pytest.mark.fault("T13")
def test_failing_saves_do_not_end_a_run_until_the_third(tmp_path, monkeypatch):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    small.run(small.prepared("fast"), tmp_path, max_steps=2)
    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(CheckpointError, match=r"three checkpoints in a row.*the disk is full"):
        small.run(small.prepared("fast"), tmp_path, resume=True, every_steps=2)
    monkeypatch.undo()
    warned = [e["text"] for e in events.read(tmp_path / "events.jsonl") if e["kind"] == "warning"]
    assert len(warned) == 3 and checkpoint.newest(tmp_path / "checkpoints", []).manifest["step"] == 2


@pytest.mark.fault("T4")
def test_a_stop_signal_saves_and_leaves_with_75(tmp_path):
    method = small.prepared("fast")
    with watched() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        code = loop.run(method, loop.Settings(poll=1, every_minutes=1e6), events.Events(tmp_path), tmp_path, stop)
    assert code == 75 and checkpoint.newest(tmp_path / "checkpoints", []).manifest["step"] == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.fault("T4")
def test_a_stop_in_the_last_steps_of_an_epoch_does_not_wait_for_the_evaluation(tmp_path, monkeypatch):
    whole = small.prepared("fast")
    small.run(whole)
    method, stop = small.prepared("fast"), Stop()
    original = loop.Guards.step

    def step(guards, at):
        stop.signal = signal.SIGTERM
        original(guards, at)

    monkeypatch.setattr(loop.Guards, "step", step)
    code = loop.run(method, loop.Settings(poll=10**6, every_minutes=1e6), events.Events(tmp_path), tmp_path, stop)
    assert code == 75 and events.curve(tmp_path / "events.jsonl") == []
    assert checkpoint.newest(tmp_path / "checkpoints", []).manifest["step"] > 0
    monkeypatch.undo()
    method = small.prepared("fast")
    assert small.run(method, tmp_path, resume=True) == 0
    assert [e["epoch"] for e in events.curve(tmp_path / "events.jsonl")] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), method.student.parameters(), strict=True))


@pytest.mark.fault("T4")
def test_a_stop_before_the_first_step_takes_none_and_a_time_limit_leaves_some(tmp_path):
    whole = small.prepared("fast")
    small.run(whole)
    for name, stop in (("signal", Stop()), ("limit", Stop(0.0))):
        stop.signal = signal.SIGTERM if name == "signal" else None
        code = loop.run(small.prepared("fast"), loop.Settings(poll=2), events.Events(None), tmp_path / name, stop)
        assert code == 75 and checkpoint.newest(tmp_path / name / "checkpoints", []).manifest["step"] == {"signal": 0, "limit": 2}[name]
        method = small.prepared("fast")
        assert small.run(method, tmp_path / name, resume=True) == 0
        assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), method.student.parameters(), strict=True))


@pytest.mark.fault("T4")
def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(tmp_path, monkeypatch):
    data = small.real()
    whole = small.prepared("fast")
    small.run(whole, data=data)
    method, stop = small.prepared("fast"), Stop()
    original = evaluation.measure

    def measure(*args):
        stop.signal = signal.SIGTERM
        return original(*args)

    monkeypatch.setattr(evaluation, "measure", measure)
    settings = loop.Settings(poll=10**6, every_minutes=1e6, data=data)
    assert loop.run(method, settings, events.Events(tmp_path), tmp_path, stop) == 75
    assert events.curve(tmp_path / "events.jsonl") == []
    monkeypatch.undo()
    method = small.prepared("fast")
    assert small.run(method, tmp_path, resume=True, data=data) == 0
    assert [e["epoch"] for e in events.curve(tmp_path / "events.jsonl")] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(whole.student.parameters(), method.student.parameters(), strict=True))


@pytest.mark.fault("T13")
def test_a_stop_that_could_save_nothing_does_not_say_75(tmp_path, monkeypatch):
    def full(*args, **kw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(CheckpointError, match="stopped at step 2, and no checkpoint could be written"):
        small.run(small.prepared("fast"), tmp_path, max_steps=2)


def test_the_heartbeat_leaves_what_another_rank_has_said(tmp_path):
    own = events.Events(tmp_path)
    beat = events.Heartbeat(own, seconds=0.0)
    beat({"kind": "poll", "epoch": 0, "step": 1})
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 1
    own.status("fatal", code=7, reason="no memory on rank 1")
    beat({"kind": "poll", "epoch": 0, "step": 2})
    assert events.final(tmp_path)["code"] == 7


@pytest.mark.fault("T22")
def test_a_method_that_stops_being_finite_ends_with_a_sentence():
    method = small.prepared("noise")
    with torch.no_grad():
        next(iter(method.student.parameters())).fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"'learn' steps in a row were not finite.*no checkpoint"):
        small.run(method)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.fault("T22", "T23")
def test_a_non_finite_step_changes_nothing(value):
    method = small.prepared("noise")
    w = torch.nn.Parameter(torch.ones(3))
    for opt in (method.adam([w], lr=0.1), method.sgd([w], lr=0.1)):
        method.minimise({"good": (w * 2).sum()}, opt)
        before, state = w.detach().clone(), [t.clone() for t in opt.state[w].values()]
        method.minimise({"bad": (w * value).sum()}, opt)
        assert torch.equal(before, w) and all(torch.equal(a, b) for a, b in zip(state, opt.state[w].values(), strict=True))
        assert torch.equal(method.applied([w])[0], torch.zeros(3))
        method.step_ends()


def test_clip_and_per_sample_rows():
    method = small.prepared("noise")
    w = torch.nn.Parameter(torch.zeros(4))
    opt = method.sgd([w], lr=1.0, momentum=0.0)
    total = method.minimise({"a": (w * torch.tensor([3.0, 0, 4.0, 0])).sum(), "b": torch.ones(())}, opt, clip=1.0)
    torch.testing.assert_close(w.detach(), -torch.tensor([0.6, 0, 0.8, 0]))
    assert total == 1.0
    assert method.per_sample(4, 2).per_sample and method.buffer(4).per_sample


def test_folders(tmp_path):
    assert next_numbered(tmp_path, "muse").name == "muse-001"
    (tmp_path / "muse-009").mkdir()
    (tmp_path / "muse-x").mkdir()
    assert next_numbered(tmp_path, "muse").name == "muse-010"
    prepare(tmp_path / "new" / "deep", resume=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlaceError, match="is a file"):
        prepare(tmp_path / "file", resume=False)
    with pytest.raises(PlaceError, match="cannot be written"):
        prepare(tmp_path / "file" / "below", resume=False)
    with pytest.raises(ConfigError, match="not empty"):
        prepare(tmp_path, resume=False)


@pytest.mark.fault("T8")
def test_a_folder_has_one_owner_and_a_dead_one_is_replaced(tmp_path):
    with locked(tmp_path), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), locked(tmp_path):
        pass
    (tmp_path / "lock").write_text(json.dumps({"pid": 999999999, "host": os.uname().nodename}))
    with locked(tmp_path):
        lock = json.loads((tmp_path / "lock").read_text())
        with pytest.raises(ConfigError, match="in use by"):
            refuse_owned(tmp_path)
    assert not (tmp_path / "lock").exists()
    refuse_owned(tmp_path)
    assert owner_lives(lock) and not owner_lives({**lock, "began": "1"})  # another process had this number before: a container's does


def test_a_lock_of_another_host_holds_except_for_a_later_start_of_the_same_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    lock = {"pid": 1, "host": "elsewhere", "began": "5", "job": "77", "start": "0.0"}
    assert owner_lives(lock) and owner_lives({**lock, "job": ""})
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert owner_lives(lock)  # two steps of one job, in one folder
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not owner_lives(lock) and owner_lives({**lock, "job": "78"})


def test_a_lock_that_is_being_written_is_waited_for(tmp_path):
    (tmp_path / "lock").write_text("")
    full = json.dumps({"pid": os.getpid(), "host": os.uname().nodename})
    threading.Timer(0.15, (tmp_path / "lock").write_text, [full]).start()
    with pytest.raises(ConfigError, match="in use by"), locked(tmp_path):
        pass


@pytest.mark.parametrize("name", ["muse", "fast", "noise"])
def test_bf16_autocast_stays_finite_and_moves_the_student(name):
    method = small.prepared(name)
    before = [p.detach().clone() for p in method.student.parameters()]
    assert small.run(method, precision="bf16") == 0
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in method.student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters(), strict=True))


def test_progress_tells_steps_and_images():
    method, told = small.prepared("noise"), []
    loop.run(method, loop.Settings(poll=2), events.Events(None, [told.append]), None)
    polls = [e for e in told if e["kind"] == "poll"]
    assert polls and all(e["steps_per_second"] > 0 and e["steps"] == polls[0]["steps"] for e in polls)
    assert polls[-1]["images_per_second"] > 0 and polls[-1]["terms"]() is not None


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_cpu_may_have_a_number(device):
    assert small.run(small.prepared("noise", device=device)) == 0
