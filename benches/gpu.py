"""`make gpu`: build, quick GPU tests, then the benches, for a machine that can be had for minutes only.

The whole has a budget, each stage a limit within it; what would not fit is skipped and says so. A bench writes its record after every
case, so what is measured is on disk if the time is up. At most eight files, all in one folder.
With `--dry` the same stages run on a CPU: Triton is interpreted, shapes are toys, times mean nothing. Needs no package but pip's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import BENCHES

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540.0
"""Seconds in all."""
LIMITS = {"wheels": 30, "build": 200, "info": 30, "tests": 90}
"""Seconds a stage may take at most."""
SHARES = {"bn_match": 90, "upsample": 60, "generator": 90, "replay": 60, "cam": 45, "step": 60}
"""The same for the benches; what an earlier one leaves over goes to the later ones."""
TESTS = ("-q", "-m", "gpu and not slow and not large", "-p", "no:cacheprovider", "tests/ops")
LEAST = 20
"""No bench begins with less."""
GRACE = 8
"""Between the end that a bench is told and the one that is enforced."""


@dataclass
class Log:
    """What happened, on the screen and in stages.json."""

    out: Path
    end: float
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def note(self, name: str, result: str, seconds: float = 0.0) -> None:
        print(f"gpu: {name} {result}" + (f" after {seconds:.0f} s" if seconds else ""), flush=True)
        self.stages.append({"stage": name, "result": result, "seconds": round(seconds, 1), "left": round(self.left, 1)})
        (self.out / "stages.json").write_text(json.dumps(self.stages, indent=1) + "\n", encoding="utf-8")

    def stage(self, name: str, limit: float, command: Sequence[str | Path], **more: Any) -> bool:
        """Run a command for at most `limit` seconds, or what is left. True: it exited with 0."""
        limit, began = min(limit, self.left), time.monotonic()
        if limit <= 0:
            self.note(name, "skipped: no time is left")
            return False
        try:
            code = subprocess.run([*map(str, command)], cwd=ROOT, timeout=limit, check=False, **more).returncode
        except subprocess.TimeoutExpired:
            self.note(name, f"did not end within its {limit:.0f} s", time.monotonic() - began)
            return False
        self.note(name, "passed" if code == 0 else f"failed with exit code {code}", time.monotonic() - began)
        return code == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description="Build, GPU tests and benches within a budget of minutes.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benches/results/ and the device's name")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to install first; nothing is downloaded")
    parser.add_argument("--seconds", type=float, default=BUDGET, metavar="S", help="budget of the whole")
    parser.add_argument("--dry", action="store_true", help="the same stages on a CPU, with toy sizes")
    options = parser.parse_args(argv)
    device = device_name()
    if device is None and not options.dry:
        print("gpu: no GPU that this torch can use, so there is nothing to measure; --dry (make gpu DRY=1) tries the stages on a CPU")
        return 1
    out = (options.out or ROOT / "benches" / "results" / (device or "dry")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    return stages(Log(out, time.monotonic() + options.seconds), options.wheels, options.dry)


def device_name() -> str | None:
    """The GPU's name as that of a folder, asked of another process: this one stays free of torch until it is built."""
    ask = "import re, torch; print(re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else '')"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise SystemExit(f"gpu: {sys.executable} has no torch that can be imported:\n{said.stderr.strip()}")
    return said.stdout.strip().strip("-") or None


def stages(log: Log, wheels: Path | None, dry: bool) -> int:
    """All stages; the exit code: 0 where everything that ran passed and left its file."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    env = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if dry else {})
    if wheels is not None and not log.stage("wheels", LIMITS["wheels"], [*pip, *sorted(wheels.resolve().glob("*.whl"))]):
        return 1
    architectures = {} if dry else {"CMAKE_CUDA_ARCHITECTURES": os.environ.get("CMAKE_CUDA_ARCHITECTURES", "native")}
    build = [*pip, "--no-build-isolation", "-C", "build-dir=build/cmake", "-e", "."]
    if not log.stage("build", LIMITS["build"], build, env=env | architectures):
        return 1
    with (log.out / "info.txt").open("w", encoding="utf-8") as text:
        fine = log.stage("info", LIMITS["info"], [sys.executable, "-m", "fastkd", "info"], env=env, stdout=text)
    fine &= log.stage("tests", LIMITS["tests"], [sys.executable, "-m", "pytest", *TESTS, *workers()])
    spare = log.left - sum(SHARES.values())
    for name in BENCHES:
        limit = min(log.left, SHARES[name] + max(0.0, spare))
        if limit < LEAST:
            log.note(name, f"skipped: {max(0.0, log.left):.0f} s are left")
            continue
        command = [sys.executable, "-m", "benches", "--out", log.out, "--only", name, "--seconds", f"{limit - GRACE:.0f}"]
        fine &= log.stage(name, limit, [*command, *(["--quick", "--device", "cpu"] if dry else [])], env=env) and landed(log, name)
        spare = log.left - sum(SHARES[n] for n in BENCHES[BENCHES.index(name) + 1 :])
    print(f"gpu: {'everything that ran passed' if fine else 'something failed, see above'}; files in {log.out}")
    return 0 if fine else 1


def workers() -> list[str]:
    """Several processes where pytest-xdist is there: most of the time of a GPU test is Triton's compiler, on the CPU."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]


def landed(log: Log, name: str) -> bool:
    """Whether a bench left a record with rows."""
    try:
        rows = json.loads((log.out / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError) as error:
        log.note(name, f"left no record: {error}")
        return False
    if not rows:
        log.note(name, "left a record without rows")
    return bool(rows)


if __name__ == "__main__":
    sys.exit(main())
