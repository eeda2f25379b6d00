"""Differentiable augmentation of synthetic images; every draw is an argument, nothing waits for the device.

All functions take x [B, C, H, W] and return the same shape, dtype and memory layout; they are linear in x (`normalise`: affine) and
can be differentiated twice. Their backward is a gather or a matrix product: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def none(x: Tensor) -> Tensor:
    """The images as they are."""
    return x


def crop_flip(x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int) -> Tensor:
    """A crop of each image from its zero-padded self, then a horizontal flip:
    `out[i, j] = x[i + dy - pad, (W-1-j if flip else j) + dx - pad]`, zero outside.

    Args:
      dy, dx: [B] int64 in 0 … 2·pad; pad means no shift.
      flip: [B] bool.
      pad: pixels of zeros at each border.
    Raises:
      ValueError: draws that do not have one entry per image.
    """
    _check_rows(x, dy=dy, dx=dx, flip=flip)
    out: Tensor = _Crop.apply(x, dy - pad, dx - pad, flip)
    return out


class _Crop(torch.autograd.Function):
    """out[i, j] = x[i + dy, (W-1-j if flip else j) + dx], zero outside. The transpose is a crop too, so is its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
        ctx.save_for_backward(dy, dx, flip)
        h, w = x.shape[-2:]
        rows = torch.arange(h, device=x.device) + dy[:, None]
        columns = torch.arange(w, device=x.device).expand(len(flip), w)
        columns = torch.where(flip[:, None], w - 1 - columns, columns) + dx[:, None]
        inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
        return _take(x, rows.clamp(0, h - 1), columns.clamp(0, w - 1), inside)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dy, dx, flip = ctx.saved_tensors
        return _Crop.apply(grad, -dy, torch.where(flip, dx, -dx), flip), None, None, None


def _take(x: Tensor, rows: Tensor, columns: Tensor, inside: Tensor | None = None) -> Tensor:
    """x[b, :, rows[b, i], columns[b, j]], zero where not `inside`; keeps the layout of x."""
    b, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        batch = torch.arange(b, device=x.device)[:, None, None]
        out = x.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    else:
        flat = (rows[:, :, None] * w + columns[:, None, :]).reshape(b, 1, h * w)
        out = x.reshape(b, c, h * w).gather(2, flat.expand(b, c, h * w)).view(b, c, h, w)
    return out if inside is None else torch.where(inside[:, None], out, out.new_zeros(()))


def window(x: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, size: int) -> Tensor:
    """Square crops of stored images or label maps, then a horizontal flip: `out[b, i, j] = x[index[b], dy[b] + i, dx[b] + j]`.

    Args:
      x: [N, H, W, …], any dtype; not differentiated.
      index: [B] int64, which rows. dy, dx: [B] int64 in 0 … H - size, W - size. flip: [B] bool.
    Returns:
      [B, size, size, …].
    """
    across = torch.arange(size, device=x.device)
    rows = dy[:, None] + across
    columns = dx[:, None] + torch.where(flip[:, None], size - 1 - across, across)
    return x[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def resized_crop(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor) -> Tensor:
    """A box of each image, resized to the size of the image (bilinear, as `F.interpolate(crop, align_corners=False)`), then flipped.

    Args:
      top, left, height, width: [B] floating, the box in pixels; it lies inside the image and may begin between pixels.
      flip: [B] bool.
    Raises:
      ValueError: draws that do not have one entry per image.
    """
    _check_rows(x, top=top, left=left, height=height, width=width, flip=flip)
    h, w = x.shape[-2:]
    no = torch.zeros_like(flip)
    with torch.autocast(x.device.type, enabled=False):  # a half-precision matrix would blur by more than rounding
        rows = _hats(top, height, h, no, x)
        columns = _hats(left, width, w, flip, x)
        out = rows[:, None] @ x @ columns[:, None].transpose(2, 3)
    return out.contiguous(memory_format=_layout(x))


def _hats(start: Tensor, length: Tensor, n: int, flip: Tensor, x: Tensor) -> Tensor:
    """[B, n, n]: row i holds the bilinear weights of output pixel i. Sampling stops at the border of the box."""
    start, length = start.detach()[:, None], length.detach()[:, None]
    i = torch.arange(n, device=x.device, dtype=start.dtype).expand(len(flip), n)
    i = torch.where(flip[:, None], n - 1 - i, i)
    at = start + torch.minimum(((i + 0.5) * length / n - 0.5).clamp_min(0), length - 1)
    at = at.clamp(0, n - 1)
    return torch.relu(1 - (at[:, :, None] - torch.arange(n, device=x.device, dtype=at.dtype)).abs()).to(x.dtype)


def roll_flip(x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """One cyclic roll (as `torch.roll(x, (dy, dx), (2, 3))`) and then one horizontal flip for the whole batch.

    Args:
      dy, dx: [1] int64, any value. flip: [1] bool.
    """
    out: Tensor = _Roll.apply(x, dy.reshape(1), dx.reshape(1), flip.reshape(1))
    return out


class _Roll(torch.autograd.Function):
    """out[i, j] = x[(i - dy) mod H, ((W-1-j if flip else j) - dx) mod W]; a permutation, its transpose is its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
        ctx.save_for_backward(dy, dx, flip)
        h, w = x.shape[-2:]
        rows = torch.arange(h, device=x.device) - dy
        columns = torch.arange(w, device=x.device)
        columns = torch.where(flip, w - 1 - columns, columns) - dx
        return x.index_select(2, rows % h).index_select(3, columns % w).contiguous(memory_format=_layout(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        dy, dx, flip = ctx.saved_tensors
        return _Roll.apply(grad, -dy, torch.where(flip, dx, -dx), flip), None, None, None


def normalise(x: Tensor, mean: Tensor | Sequence[float] | None, std: Tensor | Sequence[float] | None) -> Tensor:
    """(x - mean) / std per channel; None means no normalisation.

    Args:
      mean, std: [C] tensors, or numbers (these are copied to the device in each call: give tensors in a hot loop).
    """
    if mean is not None:
        x = x - _channels(mean, x)
    return x if std is None else x / _channels(std, x)


def _channels(v: Tensor | Sequence[float], x: Tensor) -> Tensor:
    v = v if isinstance(v, Tensor) else torch.tensor(v, dtype=x.dtype, device=x.device)
    return v.to(x.dtype).view(1, -1, 1, 1)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _check_rows(x: Tensor, **draws: Tensor) -> None:
    for name, v in draws.items():
        if v.shape != x.shape[:1]:
            raise ValueError(f"{name} must be [{x.shape[0]}], one entry per image; found {tuple(v.shape)}")
