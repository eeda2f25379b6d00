"""Which backend runs an op: the policy, free of torch at import time.

An op lists its backends in order of preference for each device type; `reference` is always the last one. `auto` takes the
first that says yes and falls through quietly; a backend asked for by name either runs or raises with its reason. An op that
does not have the named backend at all keeps its automatic choice (there is no C++ convolution to ask for).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ConfigError, unknown

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")

_FLOATS = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Op:
    """Backends by device type in order of preference, and the dtypes that each backend takes.

    Attributes:
      captured: another order for calls that are captured in a CUDA graph: there a kernel's own time counts, and not its launch.
    """

    order: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    captured: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def backends(self) -> set[str]:
        return {name for names in self.order.values() for name in names} | {"reference"}


_NATIVE = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
_ONE_EACH: dict[str, tuple[str, ...]] = {"cpu": ("cpp",), "cuda": ("triton",)}
_NO_DOUBLE = tuple(d for d in _FLOATS if d != "float64")
_EVERYWHERE = Op(_NATIVE, {"cpp": _FLOATS, "cuda": _FLOATS, "triton": _NO_DOUBLE})
_BY_DEVICE_TIME: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda")}  # measured: docs/performance.md
_FROZEN = replace(_EVERYWHERE, captured=_BY_DEVICE_TIME)
_SUMS = ("float32", "float64")
_TREE = Op(_NATIVE, dict.fromkeys(("cpp", "cuda", "triton"), _SUMS), _BY_DEVICE_TIME)
_STORES = ("uint8", "float32", "float16")
_DOUBLED = Op(_ONE_EACH, {"cpp": _FLOATS, "triton": _NO_DOUBLE})
_FOLD = Op({"cpu": ("fold",), "cuda": ("fold",)})  # an identity in stock torch, on every device
OPS: dict[str, Op] = {
    "bn_sums": _FROZEN,
    "frozen_bn_act_stats": _FROZEN,
    "bn_match_loss": Op(_ONE_EACH, {"cpp": _SUMS, "triton": ("float32",)}),
    "batch_norm_act": _EVERYWHERE,
    "class_activation_map": _EVERYWHERE,
    "replay_gather": Op(_NATIVE, dict.fromkeys(("cpp", "cuda", "triton"), _STORES)),
    "philox_uniform": Op(_NATIVE, captured=_BY_DEVICE_TIME),
    "replay_sums": _TREE,
    "replay_sample": _TREE,
    "replay_update": _TREE,
    "upsample_conv2d": _FOLD,
    "upsampled_stem_conv2d": _FOLD,
    "upsample_affine_tanh": _DOUBLED,
    "upsample_affine_sigmoid": _DOUBLED,
}

_wanted, _captured = "auto", False
_answers: dict[tuple[str, bool, str, str, str], str] = {}


def backend() -> str:
    """The name that `use` was given last; "auto" at the start."""
    return _wanted


def use(name: str) -> None:
    """Choose the backend of all ops of this process.

    Args:
      name: "auto", "reference", "cpp" (CPU), "cuda" or "triton" (accelerator; Triton also interprets CPU tensors when
        TRITON_INTERPRET=1 was set before the process started).
    Raises:
      ConfigError: an unknown name, or a backend that cannot run here, with the reason.

    A function that torch.compile has already compiled keeps the choice it was compiled with.
    """
    global _wanted
    if name not in BACKENDS:
        raise ConfigError(unknown("ops backend", name, BACKENDS))
    reason = absent(name)
    if reason is not None:
        raise ConfigError(f"ops.backend={name} cannot run here: {reason}; use auto or reference, or install what is missing.")
    _wanted = name
    _answers.clear()


@contextmanager
def captured(on: bool = True) -> Iterator[None]:
    """Context: what is called will be captured in CUDA graphs, so "auto" prefers kernels by their own time, without that of a launch."""
    global _captured
    before, _captured = _captured, on
    try:
        yield
    finally:
        _captured = before


def build_info() -> dict[str, str]:
    """What the compiled part was built with (compiler, openmp, isa, cuda, cuda_architectures, cuda_reason).

    Without the compiled part, or where it does not load: the one key "reason", a sentence for the user.
    """
    from . import _native

    return _native.build_info()


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def interpreting() -> bool:
    """Whether Triton kernels are interpreted on CPU tensors (its own switch, read when the process starts)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def absent(name: str) -> str | None:
    """Why the backend cannot run on this machine at all; None where it can."""
    if name in ("auto", "reference", "fold"):
        return None
    if name == "triton":
        if not _installed("triton"):
            return "triton is not installed"
        if interpreting():
            from . import _interpreter

            _interpreter.prepare()
            return None
        import torch

        return None if torch.cuda.is_available() else "no CUDA device, and TRITON_INTERPRET=1 is not set"
    from . import _native

    return _native.absent(cuda=name == "cuda")


def why_not(op: str, name: str, device: str, dtype: str) -> str | None:
    """None: the backend runs this op on this device type and dtype. Otherwise the reason why it does not."""
    spec = OPS[op]
    if name == "reference":
        return None
    if name not in spec.backends():
        return "not written for this op"
    interpreted = name == "triton" and device == "cpu" and interpreting()
    if name not in spec.order.get(device, ()) and not interpreted:
        return "interpreter only (TRITON_INTERPRET=1)" if name == "triton" and device == "cpu" else f"does not run on {device}"
    if reason := absent(name):
        return reason
    allowed = spec.dtypes.get(name)
    if allowed is not None and dtype not in allowed:
        return f"no kernel for {dtype} ({', '.join(allowed)} have one)"
    return None


def choose(op: str, device: str, dtype: str) -> str:
    """The backend that runs `op` on this device type and dtype.

    Raises:
      ConfigError: an unknown op, or the backend given to `use` exists for this op and cannot take this call.
    """
    key = (_wanted, _captured, op, device, dtype)
    if key not in _answers:
        _answers[key] = _choose(*key)
    return _answers[key]


def _choose(wanted: str, captured: bool, op: str, device: str, dtype: str) -> str:
    if op not in OPS:
        raise ConfigError(unknown("op", op, OPS))
    spec = OPS[op]
    if wanted == "reference":
        return wanted
    if wanted != "auto" and wanted in spec.backends():
        reason = why_not(op, wanted, device, dtype)
        if reason is not None:
            raise ConfigError(f"ops.backend={wanted} cannot run {op} on {device} {dtype}: {reason}; use auto or reference.")
        return wanted
    order = spec.captured.get(device) if captured else None
    for name in order or spec.order.get(device, ()):
        if why_not(op, name, device, dtype) is None:
            return name
    return "reference"


def deterministic(backend: str, device: str) -> bool:
    """Whether the same call gives the same bits each time, as it stands.

    Kernels of ours add in a fixed order on every device. `reference` and `fold` are stock torch, which does so on a CPU; on a GPU it has
    kernels that do not, and torch.use_deterministic_algorithms (`fastkd run --deterministic`) replaces or refuses those.
    """
    return device == "cpu" or backend not in ("reference", "fold")


def table() -> list[tuple[str, str, str, dict[str, str]]]:
    """Rows (op, device type, chosen backend, {backend: "ok" or the reason why not}) for this machine, in fp32.

    Devices are "cpu" and, where torch sees one, "cuda". The chosen backend is what `auto` takes, or what `use` asked for.
    """
    import torch

    rows: list[tuple[str, str, str, dict[str, str]]] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, spec in OPS.items():
            dtype = "uint8" if op == "replay_gather" else "float32"
            names: list[str] = [*sorted(spec.backends() - {"reference"}), "reference"]
            reasons: dict[str, str] = {name: why_not(op, name, device, dtype) or "ok" for name in names}
            try:
                chosen: Any = choose(op, device, dtype)
            except ConfigError as error:
                chosen = f"refused: {error}"
            rows.append((op, device, chosen, reasons))
    return rows
