"""Triton kernel of the gather: the path without a compiler on GPUs, and interpreted on CPU tensors for the tests.

A program makes a block of one image's elements, in the order in which they lie in memory. A row number outside the store is clamped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _native
from .values import Values


@triton.jit
def _over(a, b, WIDE: tl.constexpr):
    # Rounded as the definition rounds.
    if WIDE == tl.float64:  # noqa: SIM300
        q = a / b
    else:
        q = tl.div_rn(a, b)
    return q


@triton.jit
def _read(image_ptr, r, q, c, m, height, width, channels, BYTES: tl.constexpr, WIDE: tl.constexpr, DIVIDED: tl.constexpr):
    # The value of a pixel as a float; black outside the image. Bytes over 255 as torch divides by a number on the device.
    inside = m & (r >= 0) & (r < height) & (q >= 0) & (q < width)
    v = tl.load(image_ptr + (r * width + q) * channels + c, mask=inside, other=0)
    wide = v.to(WIDE)
    if BYTES:
        whole = tl.full([1], 255.0, WIDE)
        if DIVIDED:
            wide = _over(wide, whole, WIDE)
        else:
            wide = wide * _over(tl.full([1], 1.0, WIDE), whole, WIDE)
    return wide


@triton.jit
def _gather_kernel(
    images_ptr, index_ptr, dy_ptr, dx_ptr, flip_ptr, mean_ptr, std_ptr, y_ptr, x_ptr, wy_ptr, wx_ptr, out_ptr,
    stored, height, width, channels, stride, out_height, out_width, pad, blocks,
    HAS_DY: tl.constexpr, HAS_DX: tl.constexpr, HAS_FLIP: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
    RESIZED: tl.constexpr, BLENDED: tl.constexpr, BYTES: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, LONG: tl.constexpr,
    DIVIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    if LONG:  # an image has 2^31 elements
        block = block.to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    elements = (b * 0 + out_height) * out_width * channels  # in 64 bits, also where Triton makes a constant of a size of 1
    m = e < elements
    if LAST:
        c, j, i = e % channels, e // channels % out_width, e // channels // out_width
    else:
        j, i, c = e % out_width, e // out_width % out_height, e // out_width // out_height
    at = tl.minimum(tl.maximum(tl.load(index_ptr + b), 0), stored - 1)
    image_ptr = images_ptr + at * stride
    down, right = b * 0, b * 0
    if HAS_DY:
        down = tl.load(dy_ptr + b) - pad
    if HAS_DX:
        right = tl.load(dx_ptr + b) - pad
    y, x = i, j
    if RESIZED:
        y, x = tl.load(y_ptr + i, mask=m, other=0), tl.load(x_ptr + j, mask=m, other=0)
    turned, sign = b * 0, b * 0 + 1
    if HAS_FLIP:
        flip = tl.load(flip_ptr + b).to(tl.int64)
        turned, sign = flip * (width - 1), 1 - 2 * flip
    q = turned + sign * x + right
    if BLENDED:
        next_y, next_x = tl.minimum(y + 1, height - 1), tl.minimum(x + 1, width - 1)
        n = turned + sign * next_x + right
        wy, wx = tl.load(wy_ptr + i, mask=m, other=0.0), tl.load(wx_ptr + j, mask=m, other=0.0)
        a = _read(image_ptr, y + down, q, c, m, height, width, channels, BYTES, WIDE, DIVIDED)
        d = _read(image_ptr, y + down, n, c, m, height, width, channels, BYTES, WIDE, DIVIDED)
        left = a + (_read(image_ptr, next_y + down, q, c, m, height, width, channels, BYTES, WIDE, DIVIDED) - a) * wy
        far = d + (_read(image_ptr, next_y + down, n, c, m, height, width, channels, BYTES, WIDE, DIVIDED) - d) * wy
        v = left + (far - left) * wx
    else:
        v = _read(image_ptr, y + down, q, c, m, height, width, channels, BYTES, WIDE, DIVIDED)
    if HAS_MEAN:
        v -= tl.load(mean_ptr + c, mask=m, other=0.0)
    if HAS_STD:
        v = _over(v, tl.load(std_ptr + c, mask=m, other=1.0), WIDE)
    tl.store(out_ptr + b * elements + e, v.to(out_ptr.dtype.element_ty), mask=m)


def looks_up(images: Tensor) -> bool:
    """Whether bytes are looked up in tables (`values.Values`)."""
    return False


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
    if out.numel() == 0:
        return
    if images.shape[0] == 0:
        raise ValueError("the store is empty")
    _native.check_range("row", index, images.shape[0])
    stored, height, width, channels = images.shape
    index = index.contiguous()
    dy, dx, flip = (None if v is None else v.contiguous() for v in draws)
    tables = (values.mean, values.std, values.y, values.x, values.wy, values.wx)
    tensors = [index if v is None else v for v in (dy, dx, None if flip is None else flip.view(torch.uint8), *tables)]  # stand-ins
    elements, block = out[0].numel(), 1024
    blocks = triton.cdiv(elements, block)
    with _native.on(images.device):
        _gather_kernel[(blocks * len(index),)](
            images, index, *tensors, out, stored, height, width, channels, images.stride(0), *out.shape[2:], pad, blocks,
            HAS_DY=dy is not None, HAS_DX=dx is not None, HAS_FLIP=flip is not None, HAS_MEAN=values.mean is not None,
            HAS_STD=values.std is not None, RESIZED=values.y is not None, BLENDED=values.blended, BYTES=images.dtype == torch.uint8,
            LAST=channels_last, WIDE=tl.float64 if values.wide == torch.float64 else tl.float32, LONG=elements + block >= 2**31,
            DIVIDED=images.device.type == "cpu", BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip
