"""Safetensors bytes that depend on their content alone. Atomic writes are tested where they are used: checkpoints and weights."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from fastkd.files import tensor_bytes

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
