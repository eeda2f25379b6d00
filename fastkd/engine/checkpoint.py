"""Checkpoints: a folder of safetensors and JSON with a sha256 manifest, written beside its place, fsynced and renamed.

A folder is visible under its name only when it is complete. Loading takes the newest one whose manifest verifies; a damaged one
is set aside and named. The state is global: it does not depend on the number of ranks, but for images that are dealt to them. Those are
in `images-r000.safetensors` and so on, written by the ranks that hold them; whoever loads them picks its own rows out of all files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from fastkd import ranks
from fastkd.errors import CheckpointError
from fastkd.files import amount, digest, fsync_folder, tensor_bytes, write_atomic, write_file, write_tensors

SCHEMA = 1
REPLACED = "-old"
"""Ends the name of a checkpoint that one of the same step is about to replace."""
ROOM = 1.2
"""Free space that a save asks for before it begins, in times of what it will write."""
IMAGES = "images-r"
"""How the names of files with images begin."""


class Part:
    """The rows of a store in one file: length, shape, dtype and slices of a tensor that is not read as a whole."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        with safe_open(path, "pt") as f:
            self.shape = tuple(f.get_slice(key).get_shape())
            self.dtype = f.get_slice(key)[:0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        with safe_open(self.path, "pt") as f:
            return f.get_slice(self.key)[rows]  # type: ignore[no-any-return]


@dataclass
class Saved:
    """A verified checkpoint: where it stands and what it holds."""

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    images: dict[str, list[Part]] = field(default_factory=dict)

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
    images: Mapping[str, Tensor] | None = None,
    together: bool = False,
) -> Path:
    """Write checkpoint `number` (steps done since the start) into `folder` and prune to the `keep` newest.

    Args:
      images: path → this rank's rows of a store whose images are not in `tensors`.
      together: several ranks have such rows, and all of them are here; else rank 0 is here alone. Rank 0 writes all the rest.
    Raises:
      OSError: nothing was written, perhaps because there is less than `ROOM` for it; older checkpoints are as they were. The same on
        all ranks.
    """
    first = ranks.rank() == 0
    owner = int(ranks.max(torch.tensor(os.getpid() if first else 0)).item()) if together else os.getpid()
    final, temporary = folder / name_of(number), folder / f".tmp-step-{number:08d}-{owner}"

    own = _bytes(images or {})
    need = _bytes(tensors) + _bytes(student) + (int(ranks.total(torch.tensor(own)).item()) if together else own)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder, keep)  # saves that died, one after another, must not fill the disk
        _refuse_without_room(folder, need)
        temporary.mkdir()

    def own_images() -> dict[str, Any] | None:
        return write_tensors(temporary / _images_of(ranks.rank()), images) if images else None

    def rest() -> None:
        files = {
            **{_images_of(r): entry for r, entry in enumerate(entries) if entry is not None},
            "state.safetensors": write_file(temporary / "state.safetensors", tensor_bytes(tensors)),
            "state.json": write_file(temporary / "state.json", json.dumps(numbers, sort_keys=True).encode()),
            "student.safetensors": write_file(temporary / "student.safetensors", tensor_bytes(student, student_metadata)),
        }
        manifest = {"schema": SCHEMA, "step": number, "position": list(position), "files": files, **about}
        write_file(temporary / "manifest.json", json.dumps({**manifest, "digest": _digest(manifest)}, indent=1).encode())
        fsync_folder(temporary)
        if final.exists():  # the same step again, e.g. a second stop at one place; it may be the only checkpoint
            shutil.rmtree(folder / f"{final.name}{REPLACED}", ignore_errors=True)
            os.rename(final, folder / f"{final.name}{REPLACED}")  # `prune` removes it, `newest` puts it back
        os.rename(temporary, final)
        fsync_folder(folder)
        write_atomic(folder / "LATEST", f"{final.name}\n".encode())

    try:
        _agreed(begin if first else None, together)
        entries = _entries(_agreed(own_images, together), together)
        _agreed(rest if first else None, together)
    finally:
        if first:  # all ranks have agreed, so none writes there any more
            shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return final


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _refuse_without_room(folder: Path, need: int) -> None:
    """Refuse to begin what the disk will not hold; a quota that it does not tell of shows when it is written.

    Raises:
      OSError: one sentence with what is needed and what is free.
    """
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < ROOM * need:  # some mounted buckets have no size
        raise OSError(f"the disk is full: {amount(need)} take {ROOM:g} times that to write, and {amount(disk.free)} are free")


def _agreed(act: Callable[[], Any] | None, together: bool) -> Any:
    """Do it; where several ranks write together, a failure on one of them is a failure on all."""
    result, problem = None, None
    try:
        result = act() if act is not None else None
    except (OSError, RuntimeError) as e:
        problem = e
    if together:
        ranks.meet()  # a rank may have much to write
    failed = bool(ranks.max(torch.tensor(float(problem is not None))).item()) if together else problem is not None
    if failed:
        raise problem or OSError("another rank could not write its part")
    return result


def _entries(own: dict[str, Any] | None, together: bool) -> list[dict[str, Any] | None]:
    """The manifest's lines for the files with images, rank by rank."""
    if not together:
        return [own]
    said = (own["bytes"].to_bytes(8, "little") + bytes.fromhex(own["sha256"])) if own else bytes(40)
    rows = [bytes(row) for row in ranks.gather(torch.frombuffer(bytearray(said), dtype=torch.uint8)[None]).tolist()]
    return [{"bytes": int.from_bytes(row[:8], "little"), "sha256": row[8:].hex()} if any(row) else None for row in rows]


def _images_of(rank: int) -> str:
    return f"{IMAGES}{rank:03d}.safetensors"


def name_of(number: int) -> str:
    """Folder name of the checkpoint after `number` steps."""
    return f"step-{number:08d}"


def listed(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, newest first, by step."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def set_aside(folder: Path) -> list[str]:
    """Names of the damaged checkpoints that `newest` has set aside in `folder`."""
    return sorted(p.name for p in folder.glob("damaged-step-*"))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest (at least one), oldest first, and what an interrupted save left behind. Rank 0 does it."""
    if ranks.rank():
        return
    _put_back(folder)
    for path in reversed(listed(folder)[max(1, keep) :]):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*folder.glob(".tmp-step-*"), *folder.glob(f"step-*{REPLACED}")):
        shutil.rmtree(path, ignore_errors=True)


def forget_after(folder: Path, number: int) -> None:
    """Remove the checkpoints of more steps than `number`: the run takes those again, in another way. Rank 0 does it."""
    for path in listed(folder) if ranks.rank() == 0 else ():
        if int(path.name[5:]) > number:
            shutil.rmtree(path, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """A checkpoint that made room for another of the same step, which then did not come, has its name again."""
    for path in folder.glob(f"step-*{REPLACED}"):
        place = path.with_name(path.name.removesuffix(REPLACED))
        with contextlib.suppress(OSError):
            if not place.exists():
                path.rename(place)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written. Files with images are hashed by rank 0 alone.

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
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{name} has {size} bytes, {entry['bytes']} were written")
            if (ranks.rank() == 0 or not name.startswith(IMAGES)) and digest(path / name) != entry["sha256"]:
                raise ValueError(f"{name} does not match its checksum")
    except FileNotFoundError as e:
        raise ValueError(f"{Path(e.filename).name} is missing") from None
    except OSError as e:  # a bad sector, a folder in a file's place
        raise ValueError(f"{Path(e.filename).name if e.filename else 'a file'} cannot be read ({e.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError("manifest.json is damaged") from None
    return manifest


def read(path: Path) -> Saved:
    """A checkpoint that verifies.

    Raises:
      ValueError: the first thing that is wrong with it.
    """
    manifest = verify(path)
    tensors = load((path / "state.safetensors").read_bytes())
    images: dict[str, list[Part]] = {}
    for name in sorted(n for n in manifest["files"] if n.startswith(IMAGES)):
        with safe_open(path / name, "pt") as f:
            for key in f.keys():  # noqa: SIM118  (no mapping)
                images.setdefault(key, []).append(Part(path / name, key))
    return Saved(path, manifest, tensors, json.loads((path / "state.json").read_bytes()), images)


def readable(folder: Path, most: int) -> Saved | None:
    """The newest checkpoint of at most `most` steps that verifies as this process sees the folder; nothing is touched, and nothing is said
    of others: on a network disk they may be on their way."""
    for path in listed(folder):
        if int(path.name[5:]) <= most:
            try:
                return read(path)
            except ValueError:
                continue
    return None


def newest(folder: Path, said: list[str]) -> Saved | None:
    """The newest checkpoint that verifies, or None where there are none at all. Damaged ones are set aside and named in `said`.

    Raises:
      CheckpointError: there were checkpoints and none of them verifies.
    """
    tried = []
    _put_back(folder)
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
