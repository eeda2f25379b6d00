"""The CUDA kernels themselves, without a GPU: compiled as C++ and run thread by thread on CPU tensors, under the tests of the ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.emulated import build

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_bn_match.py", "test_bn_act.py", "test_cam.py", "test_replay.py")
needed = pytest.mark.skipif(
    build.cuda_headers() is None or shutil.which("g++") is None, reason="needs g++ and the headers of a CUDA toolkit"
)


def test_launches_are_rewritten():
    source = "with([&] { my_kernel<T, V><<<unsigned(a * (b + 1)), dim3(kX, kY), 0, s>>>(f, (const A*)p.x); check(); });"
    assert build.emulated(source) == (
        "with([&] { emulator::launch(unsigned(a * (b + 1)), dim3(kX, kY), 0, s, [&] { my_kernel<T, V>(f, (const A*)p.x); }); check(); });"
    )
    with pytest.raises(ValueError, match="four settings"):
        build.emulated("k<<<1, 2>>>(x);")


@needed
@pytest.mark.slow
def test_the_ops_tests_hold_for_emulated_kernels(tmp_path):
    build.build(tmp_path)
    plugin = ["-p", "tests.ops.emulated.plugin", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, "-k", "cpp", *(f"tests/ops/{name}" for name in FILES)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "EMULATED": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
