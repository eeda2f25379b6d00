"""`make gpu`: build, quick GPU tests, then the benches, for a machine that can be had for minutes only.

The whole has a budget, each stage a limit within it; what would not fit is skipped and says so. While the tests run, other processes
compile ahead what the benches will call (`warm`). A bench writes its record after every case, so what is measured is on disk if the
time is up; what pytest says goes into tests.txt as it is said. At most eight files, all in one folder.
With `--dry` the same stages run on a CPU: Triton is interpreted, shapes are toys, times mean nothing. Needs no package but pip's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import BENCHES as ALL

BENCHES = tuple(name for name in ALL if name != "step")
"""`step` takes the steps of small networks one by one; what a GPU gains shows `engine`."""
ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540.0
"""Seconds in all."""
LIMITS = {"wheels": 60, "build": 200, "info": 30, "tests": 130}
"""Seconds a stage may take at most; "tests" is also that of the warming beside them."""
BENCHING = 210
"""Seconds that the tests leave to the benches."""
TESTS = ("-v", "--tb=short", "-rfE", "--show-capture=no", "-m", "gpu and not slow and not large", "-p", "no:cacheprovider",
         "--continue-on-collection-errors")  # fmt: skip
STAGES = ("tests", "warm", *BENCHES)
"""What `--only` may name."""
LEAST = 20
"""The benches do not begin with less."""
GRACE = 8
"""Between the end that the benches are told, or pytest's to show its failures, and the one that is enforced."""


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
        process = started(command, **more)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            ended(process)
            self.note(name, f"did not end within its {limit:.0f} s", time.monotonic() - began)
            return False
        except KeyboardInterrupt:
            ended(process)
            raise
        self.note(name, "passed" if code == 0 else f"failed with exit code {code}", time.monotonic() - began)
        return code == 0


def started(command: Sequence[str | Path], **more: Any) -> subprocess.Popen[bytes]:
    """A command in a process group of its own, which Ctrl-C interrupts even where this process was started without it."""
    return subprocess.Popen([*map(str, command)], cwd=ROOT, process_group=0, preexec_fn=_listen, **more)


def _listen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Ctrl-C, on which pytest shows the failures so far; then its whole group is killed."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description="Build, GPU tests and benches within a budget of minutes.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benches/results/ and the device's name")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to install first; nothing is downloaded")
    parser.add_argument("--seconds", type=float, default=BUDGET, metavar="S", help="budget of the whole")
    parser.add_argument("--only", choices=STAGES, action="append", default=[], help="after the build this only; may be given again")
    parser.add_argument("--built", action="store_true", help="neither wheels nor build: an earlier call has made them")
    parser.add_argument("--dry", action="store_true", help="the same stages on a CPU, with toy sizes")
    options = parser.parse_args(argv)
    device = device_name()
    if device is None and not options.dry:
        print("gpu: no GPU that this torch can use, so there is nothing to measure; --dry (make gpu DRY=1) tries the stages on a CPU")
        return 1
    out = (options.out or ROOT / "benches" / "results" / (device or "dry")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, time.monotonic() + options.seconds)
    return stages(log, options.wheels, options.dry, tuple(options.only) or STAGES, options.built)


def device_name() -> str | None:
    """The GPU's name as that of a folder, asked of another process: this one stays free of torch until it is built."""
    ask = "import re, torch; print(re.sub(r'[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else '')"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise SystemExit(f"gpu: {sys.executable} has no torch that can be imported:\n{said.stderr.strip()}")
    return said.stdout.strip().strip("-") or None


def stages(log: Log, wheels: Path | None, dry: bool, only: Sequence[str] = STAGES, built: bool = False) -> int:
    """All stages; the exit code: 0 where everything that ran passed and left its file."""
    env = dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | ({"TRITON_INTERPRET": "1"} if dry else {})
    if not built and not install(log, wheels, dry, env):
        return 1
    fine = log.stage("info", LIMITS["info"], [sys.executable, "-m", "fastkd", "info"], env=env)
    fine &= prepared(log, dry, only, env)
    fine &= measured(log, dry, [name for name in BENCHES if name in only], env)
    print(f"gpu: {'everything that ran passed' if fine else 'something failed, see above'}; files in {log.out}")
    return 0 if fine else 1


def install(log: Log, wheels: Path | None, dry: bool, env: dict[str, str]) -> bool:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    if wheels is not None and not log.stage("wheels", LIMITS["wheels"], [*pip, *sorted(wheels.resolve().glob("*.whl"))]):
        return False
    architectures = {} if dry else {"CMAKE_CUDA_ARCHITECTURES": os.environ.get("CMAKE_CUDA_ARCHITECTURES", "native")}
    build = [*pip, "--no-build-isolation", "-C", "build-dir=build/cmake", "-e", "."]
    return log.stage("build", LIMITS["build"], build, env=env | architectures)


def prepared(log: Log, dry: bool, only: Sequence[str], env: dict[str, str]) -> bool:
    """Tests, and beside them the warming: both are mostly compilers on the CPU."""
    limit = min(LIMITS["tests"], max(0.0, log.left - BENCHING) if set(BENCHES) & set(only) else log.left)
    end, cores = time.monotonic() + limit, os.cpu_count() or 1
    parts = [] if "warm" not in only or limit < LEAST else range(1 if dry else max(1, cores * 3 // 4))
    names = [word for name in BENCHES if name in only for word in ("--only", name)]
    own = env | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benches.warm"]
    toys = ["--quick", "--device", "cpu"] if dry else []
    warming = [started([*command, str(part), str(len(parts)), *names, *toys], env=own) for part in parts]
    fine = True
    if "tests" in only:
        with (log.out / "tests.txt").open("wb") as text:
            run = [sys.executable, "-m", "pytest", *TESTS, *plugins(cores - len(parts) // 2), *gpu_tests()]
            # The interpreter is for the benches: tests of GPU kernels are skipped without a GPU.
            plain = {k: v for k, v in env.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
            fine = log.stage("tests", limit, run, env=plain, stdout=text, stderr=subprocess.STDOUT)
        print("\n".join(tail(log.out / "tests.txt")), flush=True)
    for process in warming:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    late = sum(process.poll() is None for process in warming)
    for process in warming:
        ended(process, 0.0)
    if warming:
        failed = sum(process.returncode != 0 for process in warming) - late
        log.note("warm", f"{len(warming)} parts, {late} cut off, {failed} failed", time.monotonic() - end + limit)
    return fine


def tail(path: Path, lines: int = 40) -> list[str]:
    """The end of a text."""
    return [line[:200] for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]]


def gpu_tests() -> list[str]:
    """The tests of the ops, whose backends are parameters, and every other file with a test that is marked."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if f.parent.name == "ops" or "mark.gpu" in f.read_text(encoding="utf-8")]


def plugins(cores: int) -> list[str]:
    """Several processes where pytest-xdist is there: most of the time of a GPU test is Triton's compiler, on the CPU. A share of the
    list for each, so that every file has its turn before the time is up. A kernel that hangs ends its worker after a minute."""
    words = ["-n", str(max(1, min(14, cores))), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    return [*words, *(["--timeout", "60", "--timeout-method", "thread"] if importlib.util.find_spec("pytest_timeout") else [])]


def measured(log: Log, dry: bool, names: Sequence[str], env: dict[str, str]) -> bool:
    """The benches in one process, which starts and checks the ops once. If a kernel breaks its GPU context, another one measures the
    rest without that backend."""
    fine, without = True, list[str]()
    while names:
        if log.left < LEAST:
            for name in names:
                log.note(name, f"skipped: {max(0.0, log.left):.0f} s are left")
            return fine
        words = [word for name in names for word in ("--only", name)] + [word for name in without for word in ("--without", name)]
        command = [sys.executable, "-m", "benches", "--out", log.out, *words, "--seconds", f"{log.left - GRACE:.0f}"]
        fine &= log.stage("benches", log.left, [*command, *(["--quick", "--device", "cpu"] if dry else [])], env=env)
        for name in names:
            fine &= landed(log, name)
        names, broke = lost(log, names)
        if broke in without or broke == "reference":
            break
        without.append(broke)
    return fine


def lost(log: Log, names: Sequence[str]) -> tuple[list[str], str]:
    """The benches that have no GPU context any more, and the backend that broke it ("auto" is CUDA where it is built)."""
    found, broke = [], ""
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((log.out / f"{name}.json").read_text(encoding="utf-8"))
            if "lost" in record:
                found.append(name)
                broke = record["lost"].partition("backend ")[2].partition(":")[0]
    return found, "cuda" if broke == "auto" else broke


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
