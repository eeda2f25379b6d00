"""Files that are whole or absent: fsynced, renamed into place; and tensors as bytes that depend on nothing but their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fsync_folder(path: Path) -> None:
    """Make a rename inside `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write and fsync; returns {"bytes": length, "sha256": hex digest}."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_atomic(path: Path, data: bytes, *, writer: str = "") -> None:
    """Replace `path` in one rename, durable when this returns; an older file stays whole if anything fails.

    Args:
      writer: names the temporary file where several processes may write at once.
    """
    temporary = path.with_name(f".tmp-{path.name}{writer}")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file in memory: equal tensors and metadata give equal bytes.

    The library writes metadata in the order of a hash map that is seeded anew in each process; here they are sorted.

    Args:
      tensors: key → contiguous tensor on the CPU, no two of them sharing memory.
      metadata: text by text, or None.
    """
    from safetensors.torch import save

    data = save(dict(tensors), metadata=dict(metadata) if metadata else None)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]
