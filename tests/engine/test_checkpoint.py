"""Checkpoints: complete or absent; truncation, a flipped bit and missing files are noticed; older good ones are used."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from fastkd.engine import checkpoint
from fastkd.errors import CheckpointError


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
