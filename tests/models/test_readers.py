"""Hostile and damaged files: one clear sentence, nothing executed, nothing allocated (faults T17 and T18)."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastkd import models
from fastkd.errors import InputError

MARK = "was_executed"


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(InputError) as e:
        models.load_weights(path)
    text = str(e.value)
    assert e.value.exit_code == 4 and "\n" not in text and str(path) in text, text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.fault("T17")
def test_missing_directory_empty(tmp_path):
    refused(tmp_path / "none.pth", "there is no file", "expected a state dict")
    refused(tmp_path, "is a directory")
    (tmp_path / ".metadata").write_bytes(b"x")
    refused(tmp_path, "distributed checkpoint")
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth", "is empty")


@pytest.mark.fault("T17")
@pytest.mark.parametrize("text", ["<!DOCTYPE html><html>", "\n  <html><body>404</body></html>", "<?xml version='1.0'?>"])
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_web_page(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, "web page (HTML)")


@pytest.mark.parametrize("text", ["import torch\nfrom torch import nn\n\nnet = nn.Linear(2, 3)\n", "a,b\n1,2\n", "größer als " * 200])
def test_a_text_file(tmp_path, text):
    (tmp_path / "nets.py").write_text(text)
    said = refused(tmp_path / "nets.py", "is a text file, not weights")
    assert "pickle" not in said


def test_other_things_under_the_name(tmp_path):
    file = tmp_path / "net.pth"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(file, "Git LFS pointer")
    file.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    refused(file, "neither a safetensors nor a torch file")
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("readme.txt", "hello")
    refused(file, "zip archive without weights", "readme.txt")
    with zipfile.ZipFile(file, "w") as z:  # how torch.jit.save lays a program out
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            z.writestr(f"net/{name}", b"x")
    refused(file, "TorchScript program")


@pytest.mark.fault("T17")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_truncated_torch_file(tmp_path, zipped, keep):
    file = tmp_path / "net.pth"
    torch.save({"a": torch.rand(100, 100)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    refused(file, "cut")


@pytest.mark.fault("T17")
@pytest.mark.parametrize("keep", [4, 12, 200, 5000])
def test_truncated_safetensors(tmp_path, keep):
    file = tmp_path / "net.safetensors"
    save_file({"a": torch.rand(100, 100)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    refused(file)


@pytest.mark.fault("T18")
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_raw_pickle_is_not_run(tmp_path, protocol):
    file, mark = tmp_path / "net.pth", tmp_path / MARK
    file.write_bytes(pickle.dumps({"w": Evil(mark)}, protocol=protocol))
    refused(file, "nothing in it was run", "system", "state_dict()")
    assert not mark.exists()


@pytest.mark.fault("T18")
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_pickle_is_not_run(tmp_path, zipped):
    file, mark = tmp_path / "net.pth", tmp_path / MARK
    torch.save({"state_dict": {"w": torch.rand(3)}, "opt": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    refused(file, "nothing in it was run", "posix.system" if os.name == "posix" else "system")
    assert not mark.exists()


@pytest.mark.fault("T18")
def test_nested_load_from_bytes_is_not_run(tmp_path):
    """A pickle inside the bytes of another, opened by torch's own helper."""
    file, mark = tmp_path / "net.pth", tmp_path / MARK

    class Nested:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (pickle.dumps(Evil(mark)),)

    for zipped in (True, False):
        torch.save({"w": Nested()}, file, _use_new_zipfile_serialization=zipped)
        refused(file, "nothing in it was run", "_load_from_bytes")
    assert not mark.exists()


def test_a_pickled_network_is_named(tmp_path):
    file = tmp_path / "net.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), file)
    refused(file, "torch.nn.modules", "save `model.state_dict()`")


@pytest.mark.fault("T18")
def test_safetensors_that_lie(tmp_path):
    file = tmp_path / "net.safetensors"

    def write(header: dict | bytes, body: bytes = b"", length: int | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)

    write(b"{}", length=1 << 40)
    refused(file, "1099511627776 bytes")
    write({"a": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 16]}}, bytes(16))
    refused(file, "damaged safetensors")
    write({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 42]}}, bytes(16))
    refused(file, "damaged safetensors")
    write(b"{not json", bytes(16))
    refused(file, "damaged safetensors")


@pytest.mark.fault("T18")
def test_archives_that_grow_are_refused(tmp_path):
    file = tmp_path / "net.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("net/data.pkl", bytes(64 << 20))
    assert file.stat().st_size < 1 << 20
    refused(file, "would unpack to")


@pytest.mark.fault("T18")
def test_hostile_files_take_no_memory(tmp_path):
    """All of them in one process: the peak stays within 200 MB of what the import took."""
    header = struct.pack("<Q", 1 << 40) + b"{}"
    (tmp_path / "long.safetensors").write_bytes(header)
    lie = json.dumps({"a": {"dtype": "F32", "shape": [1 << 36], "data_offsets": [0, 1 << 38]}}).encode()
    (tmp_path / "lie.safetensors").write_bytes(struct.pack("<Q", len(lie)) + lie)
    old = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 10)}, old, _use_new_zipfile_serialization=False)
    raw = old.getvalue()
    small, large = pickle.dumps(1 << 10, 2)[2:-1], pickle.dumps((1 << 31) - 1, 2)[2:-1]
    assert small in raw
    (tmp_path / "storage.pth").write_bytes(raw.replace(small, large))  # a storage of 2^31 numbers, none of them there
    (tmp_path / "bytes.pth").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.")  # a bytes object of 2^40
    code = """
import resource, sys, fastkd.models as m
from fastkd.errors import InputError
m.load_weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        m.load_weights(path)
    except InputError:
        continue
    sys.exit(path + ' was read')
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    paths = sorted(map(str, tmp_path.iterdir()))
    assert len(paths) == 4
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200


@pytest.mark.parametrize("zipped", [True, False])
def test_options_and_numpy_scalars_of_research_code_are_admitted(tmp_path, zipped):
    file = tmp_path / "net.pth"
    scalars = [k(1) for k in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)]
    options = argparse.Namespace(lr=0.1, milestones=[60, 120], name="r20", nested=argparse.Namespace(best=np.float64(93.1)))
    saved = {"state_dict": {"w": torch.ones(3)}, "args": options, "acc": scalars, "epoch": 7}
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    weights = models.load_weights(file)
    assert weights.state.keys() == {"w"} and any("'state_dict'" in n for n in weights.notes)


def test_the_admission_ends_with_the_call(tmp_path):
    file = tmp_path / "net.pth"
    torch.save({"args": argparse.Namespace(lr=0.1), "w": torch.ones(1)}, file)
    before = set(map(str, torch.serialization.get_safe_globals()))
    models.load_weights(file)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_content_decides_not_the_name(tmp_path):
    file = tmp_path / "net.pth"
    save_file({"w": torch.ones(3)}, file)
    assert torch.equal(models.load_weights(file).state["w"], torch.ones(3))


def test_a_tar_of_something_else(tmp_path):
    file = tmp_path / "net.pth"
    with tarfile.open(file, "w") as t:
        t.addfile(tarfile.TarInfo("a"), io.BytesIO())
    refused(file)
