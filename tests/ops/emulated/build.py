"""Builds the compiled part with its CUDA kernels as C++ for the CPU: `python build.py DIR` leaves an importable `_C` in DIR.

Needs g++, CUDA's headers (no GPU, no driver) and pybind11.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
RUNTIME = """#include <cuda_runtime.h>
extern "C" const char* cudaGetErrorString(cudaError_t) { return ""; }
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
"""
OPENING, CLOSING = "({[<", ")}]>"


def cuda_headers() -> Path | None:
    """The folder with the headers of a CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    roots = [Path(os.path.realpath(nvcc)).parents[1]] if nvcc else []
    triton = importlib.util.find_spec("triton")
    bundled = [Path(triton.origin).parent / "backends" / "nvidia"] if triton and triton.origin else []
    roots += [Path(p) for p in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if p]
    roots += [*sorted(Path("/usr/local").glob("cuda*")), *bundled]
    return next((r / "include" for r in roots if (r / "include" / "cuda_bf16.h").is_file()), None)


def emulated(source: str) -> str:
    """The source with each `kernel<<<grid, block, bytes, stream>>>(arguments)` as a call of the emulator.

    Raises:
      ValueError: a launch that is not written so.
    """
    out, at = "", 0
    for match in re.finditer(r"<<<", source):
        name = re.search(r"[A-Za-z_]\w*$", _without_template(source[: match.start()]))
        end = source.index(">>>", match.end())
        settings = list(_split(source[match.end() : end]))
        if name is None or len(settings) != 4:
            raise ValueError(f"not a launch with four settings: {source[match.start() - 40 : end + 3]}")
        close = _closing(source, end + 3)
        begin = name.start()
        call = source[begin : match.start()] + source[end + 3 : close + 1]
        out += source[at:begin] + f"emulator::launch({', '.join(settings)}, [&] {{ {call}; }})"
        at = close + 1
    return out + source[at:]


def _without_template(text: str) -> str:
    """The text up to the name before a `<…>` at its end."""
    if not text.endswith(">"):
        return text
    depth = 0
    for i in range(len(text) - 1, -1, -1):
        depth += (text[i] == ">") - (text[i] == "<")
        if depth == 0:
            return text[:i]
    return text


def _split(text: str) -> Iterator[str]:
    depth, begin = 0, 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            yield text[begin:i].strip()
            begin = i + 1
    yield text[begin:].strip()


def _closing(text: str, at: int) -> int:
    """Where the bracket that opens at `at` is closed."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("a bracket stays open")


def build(out: Path) -> Path:
    """Compile everything into `out`; returns the module's path.

    Raises:
      RuntimeError: the compiler's words.
    """
    headers = cuda_headers()
    if headers is None:
        raise RuntimeError("no CUDA headers beside nvcc")
    out.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-ffp-contract=off", "-w", "-DFASTKD_WITH_CUDA"]
    cuda = [f"-I{out}", f"-I{CSRC}", f"-I{headers}", "-include", str(HERE / "emulator.h")]
    for source in CSRC.glob("*.cuh"):
        (out / source.name).write_text(emulated(source.read_text(encoding="utf-8")), encoding="utf-8")
    jobs = []
    for source in sorted(CSRC.glob("*.cu")):
        text = out / f"{source.stem}_emulated.cpp"
        text.write_text(emulated(source.read_text(encoding="utf-8")), encoding="utf-8")
        jobs.append([*flags, *cuda, "-c", str(text), "-o", str(out / f"{text.stem}.o")])
    for source in sorted(CSRC.glob("*.cpp")):
        own = _of_module() if source.stem == "module" else ["-DFASTKD_ISA=generic"]
        jobs.append([*flags, *own, "-c", str(source), "-o", str(out / f"{source.stem}.o")])
    (out / "runtime.cpp").write_text(RUNTIME, encoding="utf-8")
    jobs.append([*flags, f"-I{headers}", "-c", str(out / "runtime.cpp"), "-o", str(out / "runtime.o")])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_compile, jobs))
    module = out / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [job[-1] for job in jobs]
    _compile(["-shared", "-fopenmp", *objects, "-o", str(module)])
    return module


def _of_module() -> list[str]:
    import pybind11

    said = {"COMPILER": "g++", "OPENMP": "", "CUDA_VERSION": "emulated", "CUDA_ARCHITECTURES": "native", "CUDA_REASON": ""}
    defined = [f'-DFASTKD_{key}="{value}"' for key, value in said.items()]
    return [*defined, f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]


def _compile(arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"g++ {' '.join(arguments[-2:])}: {done.stderr[-3000:]}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
