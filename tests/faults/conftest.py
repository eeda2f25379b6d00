"""Runs of several processes, with faults planted in them, and what must be true afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import TINY, cli, environment, sets

__all__ = ["cli"]

PLANTED = Path(__file__).parent / "planted"


class Ranks:
    """Starts `fastkd run --gpus 2 --device cpu` in folders of its own and looks at what is left."""

    def __init__(self, parent: Path):
        self.parent = parent

    def command(self, name: str, *words: Any, gpus: int = 2) -> list[str]:
        run = ["run", "--gpus", gpus, "--device", "cpu", "--out", self.parent / name]
        run += [*sets(*TINY, "poll=1", "checkpoint.every_steps=4"), *words]  # of two settings the last one counts
        return [sys.executable, "-m", "fastkd", *map(str, run)]

    def run(
        self,
        name: str,
        *words: Any,
        gpus: int = 2,
        plant: dict[str, Any] | None = None,
        inside: dict[str, Any] | None = None,
        limit: float = 240,
    ) -> Any:
        """Args: plant: a fault between two steps. inside: one inside a step (see `planted`)."""
        planted = {"PLANT": plant, "PLANT_INSIDE": inside}
        env = environment(**{name: json.dumps(fault) for name, fault in planted.items() if fault})
        if plant or inside:
            env["PYTHONPATH"] = os.pathsep.join([str(PLANTED), env["PYTHONPATH"]])
        done = subprocess.run(self.command(name, *words, gpus=gpus), env=env, capture_output=True, text=True, timeout=limit, check=False)
        return done

    def status(self, name: str) -> dict[str, Any]:
        return json.loads((self.parent / name / "status.json").read_text())

    def student(self, name: str) -> bytes:
        return (self.parent / name / "student.safetensors").read_bytes()

    def state(self, name: str) -> dict[str, Any]:
        """All tensors of the newest checkpoint."""
        newest = max((self.parent / name / "checkpoints").glob("step-*"), key=lambda p: p.name)
        return load_file(newest / "state.safetensors")

    def copy(self, name: str, to: str) -> str:
        shutil.copytree(self.parent / name, self.parent / to)
        return to

    def attempts(self, name: str) -> int:
        """How often the ranks of the last launch were started."""
        launches = max((self.parent / name / "logs").iterdir(), key=lambda p: p.stat().st_mtime)
        return len(list(launches.glob("attempt_*")))

    def alive(self, name: str) -> list[str]:
        """Command lines of processes that still work on the run."""
        word, found = str(self.parent / name).encode(), []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if word in line and int(path.parent.name) != os.getpid():
                found.append(line.replace(b"\0", b" ").decode())
        return found

    def nobody_is_left(self, name: str, within: float) -> None:
        end = time.monotonic() + within
        while self.alive(name) and time.monotonic() < end:
            time.sleep(0.2)
        assert not self.alive(name)


@pytest.fixture
def tries(record_property: Callable[[str, object], None]) -> Callable[[int, int], None]:
    """Say, once, how many tries a test made and how many were survived; without it a case is one try."""

    def say(made: int, survived: int) -> None:
        record_property("tries", made)
        record_property("survived", survived)

    return say


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def undisturbed(ranks: Ranks) -> str:
    """The name of a run of two ranks that nothing happened to."""
    done = ranks.run("undisturbed")
    assert done.returncode == 0, done.stderr
    return "undisturbed"


@pytest.fixture(scope="session")
def stopped(ranks: Ranks) -> str:
    """The name of a run of two ranks that a time limit stopped at its first step."""
    done = ranks.run("stopped", "--time-limit", "0.01s")
    assert done.returncode == 75, done.stderr
    return "stopped"
