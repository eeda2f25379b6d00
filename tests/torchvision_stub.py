"""Lets torchvision be imported beside a CPU torch, for tests and benches only.

torchvision's wheels are built for CUDA; beside a CPU build of torch its library does not load, and the Python side then fails
because it decorates operators that nobody defined. Declaring their schemas beforehand is enough for its networks, transforms
and data sets (and for timm, which imports it). Detection operators and native image decoders stay missing.

    from tests import torchvision_stub      # before torchvision or timm
    torchvision_stub.define()
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SCHEMAS = (  # those for which torchvision registers a fake kernel at import
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the definitions live as long as this does


def define() -> None:
    """Declare the operators once, and only where torchvision's own library does not: it would end the process if it found them declared."""
    global _library
    if _library is not None or _loads() or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        _library.define(schema)


def _loads() -> bool:
    """Whether torchvision is installed and its library loads beside this torch, as its own import would do it."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return False
    try:
        torch.ops.load_library(Path(package.origin).with_name("_C.so"))
    except OSError:  # made for another build of torch
        return False
    return True
