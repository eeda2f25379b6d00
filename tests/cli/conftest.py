"""The command line inside this process (`cli`) and as a process of its own (`shell`), and a run small enough for a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fastkd.cli.app import app
from fastkd.cli.exits import DEBUG

STUDENT = ("method.epochs=3", "method.warmup=1", "method.kd_steps=3", "method.kd_batch=32", "method.batch=32")
"""Settings of the student phase that make any digits recipe a matter of seconds."""
TINY = (*STUDENT, "method.g_steps=2", "method.g_loops=1", "method.gwp_loops=1")
"""The same for MUSE and NAYER."""


def sets(*items: str) -> list[str]:
    """KEY=VALUE items as --set options."""
    return [word for item in items for word in ("--set", item)]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command line in this process; the result has exit_code, stdout and stderr."""
    monkeypatch.delenv(DEBUG, raising=False)

    def invoke(*words: Any) -> Result:
        return CliRunner().invoke(app, [str(w) for w in words])

    return invoke


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: this checkout is importable, one thread."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m fastkd …` as a process."""

    def call(*words: Any, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fastkd", *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300, check=False)

    return call


def one_sentence(stderr: str) -> str:
    """The last line of stderr, which must be the whole of what is said of an error: no traceback anywhere."""
    assert "Traceback" not in stderr, stderr
    lines = stderr.strip().splitlines()
    assert lines and lines[-1].startswith("fastkd: "), stderr
    return lines[-1]
