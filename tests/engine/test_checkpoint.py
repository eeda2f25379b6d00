"""Checkpoints: complete or absent; truncation, a flipped bit and missing files are noticed; older good ones are used."""

from __future__ import annotations

import errno
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.engine import checkpoint, events
from fastkd.engine.guards import Collapse
from fastkd.engine.saver import Saver
from fastkd.engine.settings import Settings
from fastkd.errors import CheckpointError
from fastkd.files import write_file
from tests import small


def write(folder, number, keep=3, value=1.0):
    tensors = {"student.w": torch.full((3,), value), "scalar": torch.tensor(2.5), "empty": torch.zeros(0)}
    return checkpoint.write(
        folder, number, (number // 10, number % 10), tensors, {"pool.fill": 7, "flag": True}, {"w": torch.ones(2)}, {"architecture": "x"},
        {"config": "abc", "world": 1}, keep,
    )  # fmt: skip


def test_round_trip(tmp_path):
    write(tmp_path, 12, value=3.0)
    saved = checkpoint.newest(tmp_path, [])
    assert saved.position == (1, 2) and saved.manifest["config"] == "abc"
    assert torch.equal(saved.tensors["student.w"], torch.full((3,), 3.0)) and saved.numbers == {"pool.fill": 7, "flag": True}
    assert (tmp_path / "LATEST").read_text() == "step-00000012\n"
    assert not list(tmp_path.glob(".tmp*"))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: s != "__metadata__")
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
NUMBERS = st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, st.tuples(st.lists(st.integers(0, 3), max_size=3), DTYPES), max_size=5),
    numbers=st.dictionaries(NAMES, NUMBERS, max_size=5),
    about=st.dictionaries(st.text(min_size=1, max_size=6).map("x".__add__), NUMBERS | st.text(st.characters(exclude_categories=["Cs"]))),
    position=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    number=st.integers(0, 10**9),
)
def test_any_state_comes_back_as_it_was_written(tmp_path_factory, tensors, numbers, about, position, number):
    """Names, shapes, dtypes and bits of tensors, host numbers, and what the manifest says of them."""
    folder = tmp_path_factory.mktemp("round")
    made = {name: (torch.randn(shape) * 100).to(dtype) for name, (shape, dtype) in tensors.items()}
    path = checkpoint.write(folder, number, position, made, numbers, {"w": torch.ones(1)}, {"note": "ü"}, about, keep=1)
    said: list[str] = []
    saved = checkpoint.newest(folder, said)
    assert not said and saved.path == path and saved.position == position and saved.manifest["step"] == number
    assert saved.numbers == numbers and {k: saved.manifest[k] for k in about} == about
    assert saved.tensors.keys() == made.keys()
    for name, t in made.items():
        back = saved.tensors[name]
        assert back.dtype == t.dtype and back.shape == t.shape and torch.equal(back, t)


def test_the_newest_are_kept_by_step(tmp_path):
    for n in (5, 100, 20, 7):
        write(tmp_path, n, keep=2)
    assert [p.name for p in checkpoint.listed(tmp_path)] == ["step-00000100", "step-00000020"]


FILES = ["state.safetensors", "state.json", "student.safetensors", "manifest.json"]


@pytest.mark.fault("T9")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_noticed_and_the_older_checkpoint_taken(tmp_path, name, share):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said).path.name == "step-00000001"
    assert len(said) == 1 and "step-00000002 is damaged" in said[0] and name in said[0]
    assert (tmp_path / "damaged-step-00000002").is_dir()


@pytest.mark.fault("T10")
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed(tmp_path, name):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    assert checkpoint.newest(tmp_path, []).path.name == "step-00000001"


@pytest.mark.fault("T11")
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(tmp_path, name):
    write(tmp_path, 1)
    (write(tmp_path, 2) / name).unlink()
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said).path.name == "step-00000001" and f"{name} is missing" in said[0]


@pytest.mark.fault("T11", "T12")
def test_nothing_there_is_none_and_nothing_good_is_an_error(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", []) is None
    (tmp_path / ".tmp-step-00000009-1").mkdir()
    (tmp_path / "LATEST").write_text("step-00000077\n")
    assert checkpoint.newest(tmp_path, []) is None
    (write(tmp_path, 3) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003: manifest.json is missing"):
        checkpoint.newest(tmp_path, [])


@pytest.mark.fault("T3")
def test_a_checkpoint_that_made_room_for_one_that_never_came_is_put_back(tmp_path):
    os.rename(write(tmp_path, 7, value=5.0), tmp_path / f"step-00000007{checkpoint.REPLACED}")  # died between two renames
    saved = checkpoint.newest(tmp_path, [])
    assert saved.path.name == "step-00000007" and saved.tensors["student.w"][0] == 5
    write(tmp_path, 7, keep=1, value=6.0)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-00000007"]
    assert checkpoint.newest(tmp_path, []).tensors["student.w"][0] == 6


@pytest.mark.fault("T33")
def test_what_dead_saves_left_behind_goes_before_the_next_is_written(tmp_path, monkeypatch):
    for n in (1, 2, 3, 4):
        write(tmp_path, n, keep=4)
    (tmp_path / f".tmp-step-00000005-{os.getpid()}").mkdir()  # of a process of the same number, as containers have them
    seen = []
    monkeypatch.setattr(checkpoint, "write_file", lambda path, data: seen.append(sorted(os.listdir(tmp_path))) or write_file(path, data))
    write(tmp_path, 5, keep=2)
    assert seen[0] == [f".tmp-step-00000005-{os.getpid()}", "LATEST", "step-00000003", "step-00000004"]
    assert [p.name for p in checkpoint.listed(tmp_path)] == ["step-00000005", "step-00000004"]


@pytest.mark.fault("T13")
def test_a_failed_write_leaves_the_older_one_whole(tmp_path, monkeypatch):
    write(tmp_path, 1)
    real = os.fsync
    calls = []

    def full(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path, []).path.name == "step-00000001" and not list(tmp_path.glob(".tmp*"))


def test_a_manifest_of_another_schema_is_refused(tmp_path):
    path = write(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["schema"] = 99
    manifest["digest"] = checkpoint._digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="schema is 99"):
        checkpoint.verify(path.parent)


@pytest.mark.fault("T13")
def test_a_save_asks_for_a_fifth_more_room_than_it_takes_before_it_begins(tmp_path, monkeypatch):
    method = small.prepared("noise")
    small.run(method, tmp_path, max_steps=2)
    whole = checkpoint.listed(tmp_path / "checkpoints")[0]
    need = sum((whole / name).stat().st_size for name in ("state.safetensors", "student.safetensors"))
    asked = []

    def disk(free):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(total=10**12, free=free))

    monkeypatch.setattr(checkpoint, "tensor_bytes", lambda *a: pytest.fail("nothing is written where there is no room"))
    disk(int(1.15 * need))
    saver = Saver(method, Settings(), events.Events(tmp_path), tmp_path, Collapse(method, events.Events(None)))
    saver.save((1, 0), 4)
    assert len(asked) == 2  # once more after older ones have gone
    said = [e["text"] for e in events.read(tmp_path / "events.jsonl") if e["kind"] == "warning"]
    assert re.fullmatch(
        r"checkpoint at step 4 could not be written: the disk is full: \S+ MB take 1.2 times that to write, and \S+ MB are free; "
        r"what was saved before is intact",
        said[0],
    )
    saver.save((1, 1), 5)
    with pytest.raises(CheckpointError, match=r"three checkpoints in a row .*the disk is full: "):
        saver.save((1, 2), 6)
    assert checkpoint.listed(tmp_path / "checkpoints") == [whole] and checkpoint.verify(whole)
    monkeypatch.undo()
    disk(int(1.2 * need))
    saver.save((1, 3), 7)
    assert checkpoint.listed(tmp_path / "checkpoints")[0].name == checkpoint.name_of(7)
