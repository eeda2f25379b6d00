"""The run folder: made or found, probed, locked by one process at a time, numbered by itself."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastkd.errors import ConfigError, PlaceError
from fastkd.files import write_atomic


def next_numbered(parent: Path, stem: str) -> Path:
    """`parent/stem-001`, or the next number that is free."""
    taken = [int(p.name.rsplit("-", 1)[1]) for p in parent.glob(f"{stem}-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return parent / f"{stem}-{max(taken, default=0) + 1:03d}"


def why(e: OSError) -> str:
    """The reason of an OSError in words."""
    return {errno.ENOSPC: "the disk is full", errno.EROFS: "it is read-only", errno.EACCES: "permission is denied"}.get(
        e.errno or 0, os.strerror(e.errno) if e.errno else str(e)
    )


def refuse(out: Path, *, resume: bool) -> None:
    """Refuse a place that cannot be a run's folder, touching nothing.

    Raises:
      ConfigError: it holds something and `resume` is not asked for. PlaceError: it is a file.
    """
    if out.exists() and not out.is_dir():
        raise PlaceError(f"--out '{out}' is a file; expected a folder, new or empty.")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out '{out}' is not empty; choose a new folder, or continue the run in it with --resume=auto.")


def refuse_unwritable(out: Path) -> None:
    """Refuse a folder that could not be made, or not be written, by what the rights of the nearest folder say; touches nothing.

    Raises:
      PlaceError: no right to write there, or a file stands on the way. A full disk shows only when something is written.
    """
    there = next((p for p in (out, *out.absolute().parents) if p.exists()), Path("/"))
    number = errno.ENOTDIR if not there.is_dir() else 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    if number:
        raise PlaceError(f"--out '{out}' cannot be written: {why(OSError(number, ''))}; choose a folder with room and write permission.")


def prepare(out: Path, *, resume: bool) -> None:
    """Make the folder and prove, by a file that is written and fsynced, that it can hold a run.

    Raises:
      ConfigError: see `refuse`. PlaceError: it cannot be written.
    """
    refuse(out, resume=resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / ".probe", b"x" * 4096)
        (out / ".probe").unlink()
    except OSError as e:
        raise PlaceError(f"--out '{out}' cannot be written: {why(e)}; choose a folder with room and write permission.") from None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: tells it from another one that got its number later. None where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _attempt() -> dict[str, str]:
    """The job of a scheduler or of torchrun that this process belongs to, and which start of it."""
    env = os.environ
    return {
        "job": env.get("SLURM_JOB_ID") or env.get("TORCHELASTIC_RUN_ID") or "",
        "start": f"{env.get('SLURM_RESTART_COUNT', '0')}.{env.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    }


def owner_lives(lock: dict[str, Any]) -> bool:
    """Whether the process that a lock names may still run. On another host it may, unless it belongs to an earlier start of this job."""
    try:
        if lock["host"] != socket.gethostname():
            mine = _attempt()
            return not (mine["job"] and mine["job"] == lock.get("job") and mine["start"] != lock.get("start"))
        pid = int(lock["pid"])
        began = _started(pid)
        return _alive(pid) and (began is None or lock.get("began") in (None, began))
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _owner(path: Path) -> dict[str, Any]:
    """What a lock holds; empty where it is not there or unreadable. One that is being written gets a moment."""
    for _ in range(5):
        try:
            found = json.loads(path.read_text())
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return {}
        except (ValueError, OSError):
            time.sleep(0.1)
    return {}


def refuse_owned(out: Path) -> None:
    """Refuse a folder in which another run is at work.

    Raises:
      ConfigError: pid and host of the owner are named.
    """
    owner = _owner(out / "lock")
    if owner_lives(owner):
        raise ConfigError(
            f"'{out}' is in use by process {owner.get('pid')} on {owner.get('host')}; "
            f"wait for it, or remove '{out / 'lock'}' if that run is dead."
        )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Own the folder for the duration; the lock of a dead process is taken over.

    Raises:
      ConfigError: another run owns it; pid and host are named.
    """
    path, pid = out / "lock", os.getpid()
    me = {"pid": pid, "host": socket.gethostname(), "began": _started(pid), **_attempt()}
    for attempt in range(2):
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            break
        except FileExistsError:
            refuse_owned(out)
            if attempt:
                raise
            path.unlink(missing_ok=True)
    with os.fdopen(fd, "w") as f:
        json.dump(me, f)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
