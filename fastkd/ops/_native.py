"""The one unsafe seam: tensors become addresses here and nowhere else.

A family's `native.py` settles sizes, layouts and dtypes and allocates outputs and workspaces; `launch` checks the devices, takes the
addresses and makes the call; the compiled part checks only null and alignment. A tensor that is neither contiguous nor channels_last
is copied (`dense`). Kernels run on the current stream of the tensor's device; a tensor that was allocated on another stream needs
`record_stream`, which is its owner's business. `fastkd._C` is loaded on first use, after torch, so that both share one OpenMP.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
NCHW, NHWC = 0, 1
_NOT_BUILT = "not built: the C++ build did not work when fastkd was installed; install again with a C++17 compiler"
_ALONE = 1 << 15  # elements below which a second thread costs more than it brings


@functools.cache
def _load() -> tuple[Any, str]:
    try:
        lib = importlib.import_module("fastkd._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, _NOT_BUILT if missing else f"does not load: {error}"
    return lib, ""


def build_info() -> dict[str, str]:
    """What the compiled part was built with; without it only the key "reason", a sentence for the user."""
    lib, reason = _load()
    return dict(lib.build_info()) if lib else {"reason": f"fastkd._C is {reason}"}


def absent(*, cuda: bool = False) -> str | None:
    """Why the compiled part cannot run here (its CUDA kernels, if `cuda`); None where it can."""
    lib, reason = _load()
    if lib is None:
        return f"fastkd._C is {reason}" if reason.startswith("not") else f"fastkd._C {reason}"
    if not cuda:
        return None
    info = lib.build_info()
    if info["cuda_reason"]:
        return str(info["cuda_reason"])
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _uncovered(info["cuda_architectures"], torch.cuda.get_device_capability())


def _uncovered(built: str, device: tuple[int, int]) -> str | None:
    """Why kernels for `built` ("80-real 90") do not run on compute capability `device`: no binary of its generation, no older PTX."""
    major, minor = device
    for entry in built.split():
        number, _, kind = entry.partition("-")
        if not number.isdigit():  # "native", "all", "90a": only the builder knows
            return None
        generation, step = divmod(int(number), 10)
        binary, ptx = kind != "virtual", kind != "real"
        if (binary and generation == major and step <= minor) or (ptx and (generation, step) <= (major, minor)):
            return None
    return f"compute capability {major}.{minor} is not among the compiled architectures ({built})"


def memory_format(x: Tensor) -> torch.memory_format:
    """The dense layout in which the kernels read `x` [N, C, *S] and write what is shaped like it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous():
        return torch.contiguous_format
    sliced_last = x.stride(1) == 1 and x.shape[1] > 1
    return last if x.is_contiguous(memory_format=last) or sliced_last else torch.contiguous_format


def dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` itself where it is dense in the layout of `like` (default: its own), else a copy."""
    return x.contiguous(memory_format=memory_format(x if like is None else like))


def blank(x: Tensor) -> Tensor:
    """An uninitialised tensor shaped like `x`, in the layout of `dense(x)`."""
    return torch.empty_like(x, memory_format=memory_format(x))


def _addr(t: Tensor | None, device: torch.device) -> int:
    if t is None:
        return 0
    if t.device != device:
        raise ValueError(f"tensors are on {device} and {t.device}; expected one device")
    return t.data_ptr()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one of its kind. Mostly it is: then a call is spared what looking that up in full costs."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


def _where(x: Tensor) -> tuple[int, bool, int]:
    """threads, on a GPU or not, stream handle."""
    if x.is_cuda:
        return 1, True, torch._C._cuda_getCurrentRawStream(x.device.index)  # as Triton asks: no Stream object
    return (torch.get_num_threads() if x.numel() >= _ALONE else 1), False, 0


def launch(kernel: str, tensors: Sequence[Tensor | None], *rest: Any, work: Tensor) -> None:
    """Call a function of `fastkd._C`: the addresses of `tensors` (None: null), then `rest`, then threads, GPU or not, stream.

    `work` decides where it runs: its device and that device's current stream, and on the CPU, by its size, how many threads.
    Raises:
      ValueError: tensors on another device than `work`.
    """
    device = work.device
    addresses = [_addr(t, device) for t in tensors]
    run = getattr(_load()[0], kernel)
    if device.type == "cpu":
        run(*addresses, *rest, *_where(work))
    else:
        with on(device):
            run(*addresses, *rest, *_where(work))


def sizes(*fields: int) -> Any:
    """The C++ struct `Sizes`: n, c, hw, groups, per, dtype, layout."""
    return _load()[0].Sizes(*fields)


def vector(v: Tensor, dtype: torch.dtype) -> Tensor:
    """A small vector as the kernels read it: contiguous, in `dtype`."""
    return v if v.dtype is dtype and v.is_contiguous() else v.to(dtype).contiguous()


def check_range(name: str, index: Tensor, end: int) -> None:
    """CPU only, where looking costs no synchronisation; GPU kernels clamp instead."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= end:
        raise IndexError(f"{name} {low if low < 0 else high} is outside 0..{end - 1}")
