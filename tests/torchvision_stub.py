"""Lets torchvision be imported beside a CPU torch, for tests and benches only.

torchvision's wheels are built for CUDA; beside a CPU build of torch its library does not load, and the Python side then fails
because it decorates operators that nobody defined. Declaring their schemas beforehand is enough for its networks, transforms
and data sets (and for timm, which imports it). Detection operators and native image decoders stay missing.

    from tests import torchvision_stub      # before torchvision or timm
    torchvision_stub.define()
"""

from __future__ import annotations

import torch

SCHEMAS = (  # those for which torchvision registers a fake kernel at import
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the definitions live as long as this does


def define() -> None:
    """Declare the operators once, and only where torchvision's own library does not: beside a CUDA build of torch it loads, and would
    end the process if it found them declared."""
    global _library
    if _library is not None or torch.version.cuda is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        _library.define(schema)
