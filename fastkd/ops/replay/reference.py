"""Definition of the gather from an image store in plain torch: the specification of every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def tiny(v: Tensor | None, dtype: torch.dtype, fill: float, images: Tensor) -> Tensor:
    if v is None:
        return torch.full((images.shape[-1],), fill, dtype=dtype, device=images.device)
    return v.to(dtype)


def normalise(v: Tensor, mean: Tensor | None, std: Tensor | None, images: Tensor) -> Tensor:
    """(v - mean)/std over the last dimension of v, [..., C]; v itself where both are None."""
    if mean is None and std is None:
        return v
    return (v - tiny(mean, v.dtype, 0.0, images)) / tiny(std, v.dtype, 1.0, images)


def shades(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[C, 256]: what each byte of each channel becomes, by the arithmetic of `replay_gather_ref`."""
    wide = torch.promote_types(dtype, torch.float32)
    bytes_ = torch.arange(256, dtype=wide, device=images.device) / 255
    made = normalise(bytes_[:, None].expand(256, images.shape[-1]), mean, std, images).t()
    return torch.empty(made.shape, dtype=dtype, device=images.device).copy_(made)  # one pass rounds and transposes: a call is short


def taps(size: int, out: int, mode: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the `out` samples of a resized axis lie: (low [out] int64, weight of low + 1 [out]), in integers up to one division."""
    i = torch.arange(out, device=device)
    if mode == "nearest":
        return i * size // out, torch.zeros(out, dtype=dtype, device=device)
    at = ((2 * i + 1) * size - out).clamp_min(0)  # 2·out times the position (i + 1/2)·size/out - 1/2
    return at // (2 * out), (at % (2 * out)).to(dtype) / (2 * out)


def _resize(v: Tensor, dim: int, out: int, mode: str) -> Tensor:
    low, weight = taps(v.shape[dim], out, mode, v.dtype, v.device)
    a = v.index_select(dim, low)
    if mode == "nearest":
        return a
    b = v.index_select(dim, (low + 1).clamp_max(v.shape[dim] - 1))
    return a + (b - a) * weight.view([-1 if d == dim else 1 for d in range(v.dim())])


def replay_gather_ref(
    images: Tensor,
    index: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
    flip: Tensor | None,
    pad: int,
    mean: Tensor | None,
    std: Tensor | None,
    size: tuple[int, int] | None,
    mode: str,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] in the layout asked for; see the public function."""
    _, height, width, _ = images.shape
    zero = torch.zeros_like(index)
    across = torch.arange(width, device=images.device).expand(index.shape[0], width)
    if flip is not None:
        across = torch.where(flip[:, None], width - 1 - across, across)
    rows = torch.arange(height, device=images.device) + (zero if dy is None else dy - pad)[:, None]  # [B, H]
    cols = across + (zero if dx is None else dx - pad)[:, None]  # [B, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None, :]
    taken = images[index[:, None, None], rows.clamp(0, height - 1)[:, :, None], cols.clamp(0, width - 1)[:, None, :]]
    taken = taken.to(torch.promote_types(dtype, torch.float32))
    if images.dtype == torch.uint8:
        taken = taken / 255
    taken = torch.where(inside[..., None], taken, 0.0)
    if size is not None:
        taken = _resize(_resize(taken, 1, size[0], mode), 2, size[1], mode)
    out = normalise(taken, mean, std, images).to(dtype).permute(0, 3, 1, 2)
    return out if channels_last else out.clone(memory_format=torch.contiguous_format)
