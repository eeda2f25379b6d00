"""Safetensors bytes that depend on their content alone. Atomic writes are tested where they are used: checkpoints and weights."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save

from fastkd import files
from fastkd.files import tensor_bytes, write_tensors

TENSORS = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.int64), "empty": torch.zeros(0), "ü": torch.tensor(1.5)}
METADATA = {f"key{i}": f'"{i}", ü' for i in range(20)}


def test_equal_content_gives_equal_bytes(tmp_path):
    assert len({save(TENSORS, metadata=METADATA) for _ in range(20)}) > 1, "the library sorts metadata now: the detour can go"
    assert len({tensor_bytes(TENSORS, dict(reversed(METADATA.items()))) for _ in range(20)}) == 1


def test_the_library_reads_it_back(tmp_path):
    for metadata in (METADATA, {}, None):
        data = tensor_bytes(TENSORS, metadata)
        assert int.from_bytes(data[:8], "little") % 8 == 0
        back = load(data)
        assert back.keys() == TENSORS.keys() and all(torch.equal(back[k], v) for k, v in TENSORS.items())
        (tmp_path / "x.safetensors").write_bytes(data)
        with safe_open(tmp_path / "x.safetensors", "pt") as f:
            assert (f.metadata() or {}) == (metadata or {})


def test_one_value_changes_the_bytes():
    assert tensor_bytes(TENSORS, METADATA) != tensor_bytes({**TENSORS, "a": torch.arange(5.0) + 1}, METADATA)


@pytest.mark.parametrize("piece", [1, 50, 1 << 26])
def test_what_is_written_piece_by_piece_is_read_back(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", piece)
    whole = torch.randint(256, (9, 3, 4, 2), dtype=torch.uint8)
    tensors = {
        **{"b.images": whole[:7], "a.images": torch.randn(5, 2, 2, 1).half(), "wide": torch.randn(3, 1, 1, 1, dtype=torch.float64)},
        "none": whole[:0],
    }
    path = tmp_path / "images.safetensors"
    entry = write_tensors(path, tensors)
    data = path.read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} and files.digest(path) == entry["sha256"]
    back = load_file(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype and back[k].shape == t.shape for k, t in tensors.items())
