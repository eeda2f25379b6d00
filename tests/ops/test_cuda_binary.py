"""What the compiled CUDA kernels say of themselves without a GPU: a block of 1024 threads has 64 registers a thread, and no more."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastkd.ops import _native

WHOLE_BLOCKS = ("bn_finish_kernel", "ends_kernel")  # launched with 1024 threads


def _dumper() -> str | None:
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else Path()
    return shutil.which("cuobjdump") or (str(beside) if beside.is_file() else None)


def test_largest_blocks_fit_the_register_file():
    info = _native.build_info()
    if reason := info.get("reason") or info["cuda_reason"]:
        pytest.skip(reason)
    if (dumper := _dumper()) is None:
        pytest.skip("no cuobjdump, neither of CUDA nor of triton")
    from fastkd import _C

    text = subprocess.run([dumper, "-res-usage", _C.__file__], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+)", text)
    for kernel in WHOLE_BLOCKS:
        registers = [int(count) for name, count in found if kernel in name]
        assert registers, f"{kernel} is not in the compiled part"
        assert max(registers) <= 64, f"{kernel} takes {max(registers)} registers a thread: a launch of 1024 threads fails"
