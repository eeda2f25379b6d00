"""Checkpoints: a folder of safetensors and JSON with a sha256 manifest, written beside its place, fsynced and renamed.

A folder is visible under its name only when it is complete. Loading takes the newest one whose manifest verifies; a damaged one
is set aside and named. The state is global: it does not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from fastkd.errors import CheckpointError
from fastkd.files import fsync_folder, tensor_bytes, write_atomic, write_file

SCHEMA = 1


@dataclass
class Saved:
    """A verified checkpoint: where it stands and what it holds."""

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, step of that epoch) at which the run goes on."""
        epoch, step = self.manifest["position"]
        return epoch, step


def _digest(manifest: dict[str, Any]) -> str:
    body = {k: v for k, v in manifest.items() if k != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write(
    folder: Path,
    number: int,
    position: tuple[int, int],
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
    student: dict[str, Tensor],
    student_metadata: dict[str, str],
    about: dict[str, Any],
    keep: int,
) -> Path:
    """Write checkpoint `number` (steps done since the start) into `folder` and prune to the `keep` newest.

    Raises:
      OSError: nothing was written; older checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / name_of(number), folder / f".tmp-step-{number:08d}-{os.getpid()}"
    try:
        temporary.mkdir()
        files = {
            "state.safetensors": write_file(temporary / "state.safetensors", tensor_bytes(tensors)),
            "state.json": write_file(temporary / "state.json", json.dumps(numbers, sort_keys=True).encode()),
            "student.safetensors": write_file(temporary / "student.safetensors", tensor_bytes(student, student_metadata)),
        }
        manifest = {"schema": SCHEMA, "step": number, "position": list(position), "files": files, **about}
        write_file(temporary / "manifest.json", json.dumps({**manifest, "digest": _digest(manifest)}, indent=1).encode())
        fsync_folder(temporary)
        if final.exists():  # the same step again, e.g. a second stop at one place
            os.rename(final, temporary.with_name(f"{temporary.name}-old"))  # `prune` removes it
        os.rename(temporary, final)
        fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_atomic(folder / "LATEST", f"{final.name}\n".encode())
    prune(folder, keep)
    return final


def name_of(number: int) -> str:
    """Folder name of the checkpoint after `number` steps."""
    return f"step-{number:08d}"


def listed(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, newest first, by step."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest (at least one), oldest first, and what an interrupted save left behind."""
    for path in reversed(listed(folder)[max(1, keep) :]):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
      ValueError: the first thing that is wrong, in one sentence.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if manifest["digest"] != _digest(manifest):
            raise ValueError("manifest.json was changed after it was written")
        if manifest["schema"] != SCHEMA:
            raise ValueError(f"its schema is {manifest['schema']}, this version reads {SCHEMA}")
        files = manifest["files"]
        for name, entry in files.items():
            data = (path / name).read_bytes()
            if len(data) != entry["bytes"]:
                raise ValueError(f"{name} has {len(data)} bytes, {entry['bytes']} were written")
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError(f"{name} does not match its checksum")
    except FileNotFoundError as e:
        raise ValueError(f"{Path(e.filename).name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError("manifest.json is damaged") from None
    return manifest


def read(path: Path) -> Saved:
    """A checkpoint that verifies.

    Raises:
      ValueError: the first thing that is wrong with it.
    """
    manifest = verify(path)
    tensors = load((path / "state.safetensors").read_bytes())
    return Saved(path, manifest, tensors, json.loads((path / "state.json").read_bytes()))


def newest(folder: Path, said: list[str]) -> Saved | None:
    """The newest checkpoint that verifies, or None where there are none at all. Damaged ones are set aside and named in `said`.

    Raises:
      CheckpointError: there were checkpoints and none of them verifies.
    """
    tried = []
    for path in listed(folder):
        try:
            return read(path)
        except ValueError as e:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            tried.append(f"{path.name}: {e}")
            said.append(f"checkpoint {path.name} is damaged ({e}); it was set aside as {aside.name}")
    if tried:
        raise CheckpointError(f"no checkpoint in '{folder}' can be used ({'; '.join(tried)}); start anew with another --out.")
    return None
