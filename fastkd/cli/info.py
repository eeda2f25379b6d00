"""`fastkd info`: what is here, what runs, and why something does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import click

from fastkd.cli.common import emit, verb
from fastkd.cli.words import duration, size
from fastkd.errors import ConfigError

NEEDED = ("numpy", "click", "rich", "pydantic", "safetensors", "pillow")
OPTIONAL = {"triton": "triton", "timm": "timm", "torchvision": "torchvision", "scikit-learn": "sklearn"}


@verb("info")
@click.option(
    "--run",
    "run_folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Verify the checkpoints of a run and show its state instead.",
)
def command(run_folder: Path | None, as_json: bool) -> int:
    """Versions, devices, op backends with reasons, disk; or the health of a run. Paste it into an issue."""
    found = of_run(run_folder) if run_folder is not None else of_machine()
    if as_json:
        emit(found)
    elif run_folder is not None:
        show_run(found)
    else:
        show_machine(found)
    saved = run_folder is not None and (found["checkpoints"] or found["set_aside"])
    return 5 if saved and not any(c["good"] for c in found["checkpoints"]) else 0


# This machine ---------------------------------------------------------------------------------------------------------


def of_machine() -> dict[str, Any]:
    """Everything that decides what runs here."""
    import torch

    import fastkd
    from fastkd import ops

    package, disk = Path(fastkd.__file__).parent, shutil.disk_usage(Path.cwd())
    return {
        "fastkd": fastkd.__version__, "package": str(package), "python": platform.python_version(), "platform": platform.platform(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "gpus": [gpu(i) for i in range(torch.cuda.device_count())],
        "launcher": launcher(), "compiled": compiled(), "packages": {name: version(name) for name in NEEDED},
        "optional": {name: importable(name, module) for name, module in OPTIONAL.items()},
        "ops": [
            {"op": op, "device": device, "backend": chosen, "deterministic": ops.deterministic(chosen, device), "why": reasons}
            for op, device, chosen, reasons in ops.table()
        ],
        "disk_free": disk.free, "shared_memory": shared_memory(), "hints": hints(disk.free),
    }  # fmt: skip


def gpu(i: int) -> str:
    """Name and memory of a GPU."""
    import torch

    return f"{torch.cuda.get_device_name(i)}, {size(torch.cuda.get_device_properties(i).total_memory)}"


def compiled() -> str:
    """Whether the native part is built, and what it says of itself."""
    from fastkd import ops

    said = ops.build_info()
    if "reason" in said:
        return f"{said['reason']}; ops run as plain torch"
    return "built: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in said.items() if value)


def launcher() -> str:
    """Whether this torch can start several ranks (`--gpus N`), and what its launcher cannot do."""
    from fastkd.cli.several import GRACE
    from fastkd.engine import launch

    try:
        fixed = launch.grace_of_torch()
    except ImportError as e:
        return f"none, --gpus works with 1 alone: {e}"
    if fixed is None:
        return f"ranks have {GRACE} s for their checkpoint after a stop signal"
    return f"ranks have {fixed} s for their checkpoint after a stop signal; this torch cannot be told another time (later ones: {GRACE} s)"


def version(name: str) -> str:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def importable(name: str, module: str) -> str:
    """The version of an optional package, or why it cannot be used: a broken one fails at import, not before."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as e:
        return f"{version(name)}, but it does not import: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    return version(name)


def shared_memory() -> int | None:
    """Free bytes of shared memory, where there is such a place."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def hints(free: int) -> list[str]:
    """What to look at."""
    import torch

    from fastkd import ops

    said = []
    if free < 2 * 10**9:
        said.append(f"only {size(free)} are free here; a run with large pools saves more than that")
    if torch.cuda.is_available() and torch.version.cuda is None:
        said.append("this torch was not built with CUDA")
    if "reason" in ops.build_info():
        said.append("the compiled part is missing: runs work, more slowly")
    return said


def show_machine(found: dict[str, Any]) -> None:
    from fastkd.cli import summary

    single = ("fastkd", "package", "python", "platform", "torch", "cuda", "threads", "cores", "launcher", "compiled")
    rows: list[tuple[str, object]] = [(key, "–" if found[key] is None else found[key]) for key in single]
    rows += [("gpu", gpu) for gpu in found["gpus"] or ["none that torch can use"]]
    rows += list(found["packages"].items()) + list(found["optional"].items())
    rows += [("free disk here", size(found["disk_free"]))]
    if found["shared_memory"] is not None:
        rows += [("shared memory", size(found["shared_memory"]))]
    summary.print_facts(rows)
    summary.print_table(
        ("op", "device", "runs as", "deterministic", "others"),
        [(r["op"], r["device"], r["backend"], "yes" if r["deterministic"] else "with --deterministic", _others(r)) for r in found["ops"]],
    )
    for hint in found["hints"]:
        summary.console().print(f"hint: {hint}")


def _others(row: dict[str, Any]) -> str:
    """Why the backends that do not run the op do not."""
    return "; ".join(f"{name}: {why}" for name, why in row["why"].items() if name not in (row["backend"], "reference"))


# A run ----------------------------------------------------------------------------------------------------------------


def of_run(folder: Path) -> dict[str, Any]:
    """State and checkpoints of a run folder; every file is read and compared with its checksum."""
    from fastkd.engine import checkpoint, heartbeat

    if not folder.is_dir():
        raise ConfigError(f"'{folder}' is {'a file' if folder.exists() else 'not there'}; expected a run folder.")
    if not (folder / "config.json").exists() and not (folder / "status.json").exists():
        raise ConfigError(f"'{folder}' is not a run folder: it has neither config.json nor status.json.")
    checks: list[dict[str, Any]] = []
    for path in checkpoint.listed(folder / "checkpoints"):
        try:
            manifest = checkpoint.verify(path)
            total = sum(f["bytes"] for f in manifest["files"].values())
            checks.append({"name": path.name, "good": True, "why": "", "position": manifest["position"], "bytes": total})
        except (ValueError, OSError) as e:
            checks.append({"name": path.name, "good": False, "why": str(e), "position": None, "bytes": None})
    damaged = checkpoint.set_aside(folder / "checkpoints")
    status, lock = read_json(folder / "status.json"), read_json(folder / "lock")
    beats = heartbeat.read(folder)
    suspects = [b["rank"] for b in heartbeat.suspects(beats)] if (status or {}).get("state") == "running" else []
    found = {"folder": str(folder), "status": status, "lock": lock, "checkpoints": checks, "set_aside": damaged}
    return {**found, "heartbeats": beats, "suspects": suspects}


def read_json(path: Path) -> Any:
    """The content of a small JSON file, None where there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def show_run(found: dict[str, Any]) -> None:
    from fastkd.cli import summary
    from fastkd.engine.folder import owner_lives

    status, lock = found["status"] or {}, found["lock"] or {}
    rows: list[tuple[str, object]] = [("folder", found["folder"])]
    rows += [(k, v) for k, v in status.items() if k != "time" and not isinstance(v, dict | list)]
    if lock:
        rows.append(("owned by", f"process {lock.get('pid')} on {lock.get('host')}{'' if owner_lives(lock) else ', which is dead'}"))
    rows += [("set aside", name) for name in found["set_aside"]]
    summary.print_facts(rows)
    summary.print_table(
        ("checkpoint", "epoch, step", ">bytes", "state"),
        [_check_row(c) for c in found["checkpoints"]],
    )
    if not found["checkpoints"]:
        damaged = "no checkpoint is left: the damaged ones were set aside; --resume=auto starts the run anew"
        summary.console().print(damaged if found["set_aside"] else "no checkpoint yet")
    if found["heartbeats"]:
        summary.print_table(
            ("rank", "phase", "step", ">in it", ">seen", "state"),
            [_beat_row(b, found["suspects"], ended=status.get("state") != "running") for b in found["heartbeats"]],
        )


def _beat_row(b: dict[str, Any], suspects: list[int], ended: bool) -> tuple[str, str, str, str, str, str]:
    step = f"{b['name']}, epoch {b['epoch']}, step {b['step']}"
    if ended:
        return str(b["rank"]), b["phase"], step, "", f"{duration(b['age'])} ago", "has ended"
    state = "the others wait for it" if b["rank"] in suspects else "waits for others" if b["waiting"] else "at work"
    return str(b["rank"]), b["phase"], step, duration(b["since"]), f"{duration(b['age'])} ago", f"{state}, {b['at']}"


def _check_row(c: dict[str, Any]) -> tuple[str, str, str, str]:
    where = ", ".join(map(str, c["position"] or ()))
    return c["name"], where, size(c["bytes"]) if c["bytes"] else "", "good" if c["good"] else f"damaged: {c['why']}"
