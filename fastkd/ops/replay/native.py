"""The gather from an image store in C++ and CUDA: what the compiled part gets."""

from __future__ import annotations

from torch import Tensor

from .. import _native
from .values import Values


def looks_up(images: Tensor) -> bool:
    """Whether bytes are looked up in tables (`values.Values`)."""
    return images.device.type == "cpu"


def replay_gather(
    images: Tensor,
    index: Tensor,
    draws: tuple[Tensor | None, Tensor | None, Tensor | None],
    pad: int,
    values: Values,
    out: Tensor,
    channels_last: bool,
) -> None:
    """Fills `out` [B, C, H, W]; `draws` are dy, dx and flip."""
    _native.check_range("row", index, images.shape[0])
    if images.shape[0] == 0 and index.numel():
        raise ValueError("the store is empty")
    rows = [None if v is None else v.contiguous() for v in (index, *draws)]
    tables = (values.lut, values.mean, values.std, values.y, values.x, values.wy, values.wx)
    sizes = [len(index), *images.shape, images.stride(0), *out.shape[2:], pad]
    kinds = _native.DTYPE[images.dtype], _native.DTYPE[out.dtype]
    _native.launch("replay_gather", (images, *rows, *tables, out), sizes, *kinds, values.blended, channels_last, work=out)
