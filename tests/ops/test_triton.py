"""Triton kernels without a GPU: interpreted on CPU tensors against the reference, and compiled for real architectures.

Each program of `triton_programs` is a process of its own: the interpreter is chosen when triton is imported, and an out-of-bounds load
there ends the process. It shows indexing and algebra, not precision; bf16 is rounded towards zero by it, so results in bf16 may be one
unit in the last place off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAMS = Path(__file__).parent / "triton_programs"


def programs(kind: str) -> list[str]:
    return sorted(p.stem for p in PROGRAMS.glob(f"{kind}_*.py"))


def run(program: str, **environment: str) -> str:
    command = [sys.executable, str(PROGRAMS / f"{program}.py")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.parametrize("program", programs("interpret"))
def test_interpreted_kernels_agree_with_the_reference(program):
    assert "agree" in run(program, TRITON_INTERPRET="1")


@pytest.mark.parametrize("program", programs("compile"))
def test_kernels_compile_for_gpus(tmp_path, program):
    pytest.importorskip("triton.backends.nvidia")
    assert "compiled" in run(program, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
