"""Files that are whole or absent: fsynced, renamed into place; and tensors as bytes that depend on nothing but their content."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


PIECE = 1 << 26
"""Bytes that are read or written at once where a file is large."""
SYNCED = 1 << 28
"""Bytes after which what is written is forced to the disk, so that a large file makes its way steadily and not all at its end."""
_moved: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar("moved", default=None)


@contextlib.contextmanager
def told(moved: Callable[[], None]) -> Iterator[None]:
    """Context: `moved` is called, often, while large files are written or read; as long as it is, nothing hangs."""
    token = _moved.set(moved)
    try:
        yield
    finally:
        _moved.reset(token)


def amount(count: int) -> str:
    """Bytes in words, of three digits: 3.42 MB, 81.3 GB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _tell() -> None:
    moved = _moved.get()
    if moved is not None:
        moved()


class _Hashed:
    """A file that is written piece by piece, hashed and forced to the disk as it goes."""

    def __init__(self, f: BinaryIO):
        self.f, self.digest, self.length, self.pending = f, hashlib.sha256(), 0, 0

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self.f.write(piece)
            self.digest.update(piece)
            self.length, self.pending = self.length + len(piece), self.pending + len(piece)
            if self.pending >= SYNCED:
                self.sync()
            _tell()

    def sync(self) -> None:
        self.f.flush()
        os.fsync(self.f.fileno())
        self.pending = 0
        _tell()

    @property
    def entry(self) -> dict[str, Any]:
        return {"bytes": self.length, "sha256": self.digest.hexdigest()}


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
        file = _Hashed(f)
        file.write(memoryview(data))
        file.sync()
    return file.entry


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and fsync a safetensors file piece by piece, hashed as it goes: no copy of it is held; returns as `write_file`.

    Args:
      tensors: key → tensor that is contiguous row by row, on any device.
    """
    import torch
    from safetensors.torch import save

    empty = save({k: t.new_empty(0, device="cpu") for k, t in tensors.items()})  # for the format's names of the types
    header = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")])
    end = 0
    for key, t in sorted(tensors.items()):
        header[key] |= {"shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        file = _Hashed(f)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, t in sorted(tensors.items()):
            for rows in t.split(max(1, PIECE // max(1, t[:1].nbytes))) if t.numel() else ():
                file.write(memoryview(rows.cpu().contiguous().flatten().view(torch.uint8).numpy()))
        file.sync()
    return file.entry


def digest(path: Path) -> str:
    """The sha256 of a file, hex, read piece by piece."""
    found = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(PIECE):
            found.update(piece)
            _tell()
    return found.hexdigest()
