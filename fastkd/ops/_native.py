"""The one unsafe seam: tensors become addresses here and nowhere else.

Everything about sizes, layouts, dtypes and devices is settled before an address is taken; the compiled part checks only null
and alignment. Outputs and workspaces are allocated here. A tensor that is neither contiguous nor channels_last is copied
(`dense`). Kernels run on the current stream of the tensor's device; a tensor that was allocated on another stream needs
`record_stream`, which is its owner's business. `fastkd._C` is loaded on first use, after torch, so that both share one OpenMP.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
_ACT = {"none": 0, "relu": 1, "relu6": 2, "leaky_relu": 3}
_NORM = {"none": 0, "minmax": 1, "max": 2}
_NCHW, _NHWC = 0, 1
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
    return torch.empty_like(x, memory_format=memory_format(x), requires_grad=False)


def pieces(n: int, c: int, hw: int, layout: int, cuda: bool) -> tuple[int, int]:
    """How a sum over [n, c, hw] is cut: (number of pieces, images or rows a piece). Shape decides, never the thread count."""
    if n * c * hw == 0:
        return 0, 1
    if layout == _NCHW:
        per = min(max(4096 // hw, 1), n)
        return -(-n // per), per
    rows = n * hw
    per = max(256, -(-rows // 512)) if cuda else 256
    return -(-rows // per), per


def _sizes(x: Tensor) -> tuple[Any, int]:
    """Sizes of a dense tensor, and the number of its pieces."""
    n, c = x.shape[:2]
    hw = x.numel() // max(n * c, 1) if n * c else 0
    layout = _NHWC if hw == 1 or not x.is_contiguous() else _NCHW
    groups, per = pieces(n, c, hw, layout, x.is_cuda)
    return _load()[0].Sizes(n, c, hw, groups, per, _DTYPE[x.dtype], layout), groups


def _addr(t: Tensor | None, device: torch.device) -> int:
    if t is None:
        return 0
    if t.device != device:
        raise ValueError(f"tensors are on {device} and {t.device}; expected one device")
    return t.data_ptr()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _where(x: Tensor) -> tuple[int, bool, int]:
    """threads, on a GPU or not, stream handle."""
    if x.is_cuda:
        return 1, True, torch.cuda.current_stream(x.device).cuda_stream
    return (torch.get_num_threads() if x.numel() >= _ALONE else 1), False, 0


def _vector(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype).contiguous()


def bn_fwd(
    x: Tensor, shift: Tensor, frozen: tuple[Tensor, Tensor] | None, residual: Tensor | None, act: str, slope: float
) -> tuple[Tensor | None, Tensor]:
    """(y or None, sums [2, C]); `frozen` is (scale, bias) where y is wanted."""
    x = dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    size, groups = _sizes(x)
    shift = _vector(shift, wide)
    scale, bias = (_vector(v, wide) for v in frozen) if frozen else (None, None)
    residual = None if residual is None else dense(residual, x)
    y = blank(x) if frozen else None
    sums = torch.empty((2, x.shape[1]), dtype=wide, device=x.device)
    partial = torch.empty((groups, 2, x.shape[1]), dtype=torch.float64, device=x.device)
    tensors = [_addr(t, x.device) for t in (x, residual, scale, bias, shift, y, partial, sums)]
    with on(x.device):
        _load()[0].bn_fwd(*tensors, size, _ACT[act], slope, *_where(x))
    return y, sums


def bn_bwd(
    gy: Tensor | None,
    gsums: Tensor | None,
    x: Tensor,
    shift: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    act: str,
    slope: float,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dresidual or None) in the layout of x."""
    x = dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    size, _ = _sizes(x)
    gsums = None if gsums is None else gsums.to(wide).contiguous()
    gy = None if gy is None else dense(gy.to(x.dtype), x)
    shift = _vector(shift, wide)
    scale, bias = (_vector(v, wide) for v in frozen) if frozen else (None, None)
    residual = None if residual is None else dense(residual, x)
    dx = blank(x)
    dresidual = None
    if want_residual:
        dresidual = torch.zeros_like(dx) if gy is None else gy.clone() if residual is None else blank(x)
    written = dresidual if gy is not None and residual is not None else None
    tensors = [_addr(t, x.device) for t in (gy, gsums, x, residual, scale, bias, shift, dx, written)]
    with on(x.device):
        _load()[0].bn_bwd(*tensors, size, _ACT[act], slope, *_where(x))
    return dx, dresidual


def cam(features: Tensor, weight: Tensor, labels: Tensor, grad: Tensor | None) -> Tensor:
    """The raw map [B, h, w]; with `grad` (of that map) the gradient of `features` [B, K, h, w], of which only the layout is read."""
    wide = torch.promote_types(features.dtype, torch.float32)
    if features.device.type != "cpu":
        raise RuntimeError(f"the C++ class activation map runs on the CPU, features are on {features.device}")
    if grad is None:
        features = dense(features)
        given, out = features, torch.empty((features.shape[0], *features.shape[2:]), dtype=wide, device=features.device)
        pair = (given, out)
    else:
        out, grad = blank(features), grad.to(wide).contiguous()
        pair = (out, grad)
    weight, labels = _vector(weight, wide), labels.contiguous()
    check_range("label", labels, weight.shape[0])
    batch, channels, h, w = features.shape
    like = pair[0]
    layout = _NCHW if like.is_contiguous() and h * w > 1 else _NHWC
    device = features.device
    sizes = (batch, channels, h * w, weight.shape[0], _DTYPE[features.dtype], layout, _where(features)[0])
    run = _load()[0].cam_fwd if grad is None else _load()[0].cam_bwd
    run(_addr(pair[0], device), _addr(weight, device), _addr(labels, device), _addr(pair[1], device), *sizes)
    return out


def cam_finish(raw: Tensor, relu: bool, norm: str, size: list[int]) -> Tensor:
    """relu, scaling and bilinear resize of raw maps [B, h, w]; an empty `size` leaves the size."""
    if raw.device.type != "cpu":
        raise RuntimeError(f"the C++ class activation map runs on the CPU, the map is on {raw.device}")
    raw = raw.contiguous()
    batch, h, w = raw.shape
    height, width = size or (h, w)
    rows = torch.empty((batch, h, width), dtype=raw.dtype, device=raw.device)
    out = torch.empty((batch, height, width), dtype=raw.dtype, device=raw.device) if size else None
    sizes = (batch, h, w, height, width, _DTYPE[raw.dtype], relu, _NORM[norm])
    tensors = [_addr(t, raw.device) for t in (raw, rows, out)]
    _load()[0].cam_finish(*tensors, *sizes, _where(rows if out is None else out)[0])
    return rows if out is None else out


def check_range(name: str, index: Tensor, end: int) -> None:
    """CPU only, where looking costs no synchronisation; GPU kernels clamp instead."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= end:
        raise IndexError(f"{name} {low if low < 0 else high} is outside 0..{end - 1}")


def replay_gather(
    images: Tensor,
    index: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
    flip: Tensor | None,
    pad: int,
    lut: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] channels_last; `lut` [C, 256] in `dtype` for uint8 stores, else mean and std [C]."""
    images, index = images.contiguous(), index.contiguous()
    check_range("row", index, images.shape[0])
    stored, height, width, channels = images.shape
    if channels > 4096:
        raise ValueError(f"a store with {channels} channels; at most 4096 are expected")
    if stored == 0 and index.numel():
        raise ValueError("the store is empty")
    out = torch.empty((index.shape[0], height, width, channels), dtype=dtype, device=images.device)
    wide = torch.promote_types(dtype, torch.float32)
    rows = [None if v is None else v.contiguous() for v in (dy, dx, flip)]
    tables = [None if v is None else v.contiguous() for v in (lut, *(None if v is None else v.to(wide) for v in (mean, std)))]
    tensors = [_addr(t, images.device) for t in (images, index, *rows, *tables, out)]
    sizes = [index.shape[0], stored, height, width, channels, pad]
    with on(images.device):
        _load()[0].replay_gather(*tensors, sizes, _DTYPE[images.dtype], _DTYPE[dtype], *_where(out))
    return out.permute(0, 3, 1, 2)
