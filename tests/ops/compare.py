"""The double-baseline rule: our error against the fp64 truth is at most twice the error of same-dtype plain torch, plus a little."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def close(ours: Tensor, eager: Tensor, truth: Tensor, *, floor: float | None = None) -> None:
    """`truth` is fp64; `eager` and `ours` are the same computation in a smaller dtype. Worst element, RMS, direction and bias."""
    assert ours.shape == truth.shape == eager.shape
    assert ours.dtype == eager.dtype
    assert ours.isfinite().all(), "an element is not finite: uninitialised memory?"
    if not truth.numel():
        return
    a, b, t = (v.detach().double().cpu() for v in (ours, eager, truth))
    size = float(t.abs().max()) or 1.0
    slack = (FLOOR[ours.dtype] if floor is None else floor) * size
    assert (a - t).abs().max() <= 2 * (b - t).abs().max() + slack, f"worst {(a - t).abs().max():.3e}, eager {(b - t).abs().max():.3e}"
    rms, rms_eager = (a - t).square().mean().sqrt(), (b - t).square().mean().sqrt()
    assert rms <= 2 * rms_eager + slack, f"rms {rms:.3e}, eager {rms_eager:.3e}"
    assert (a - t).mean().abs() <= 2 * rms_eager + slack, "biased"
    if t.norm() > 0:
        assert torch.dot(a.flatten(), t.flatten()) / (a.norm() * t.norm()) > 0.999, "another direction"


def layouts(x: Tensor, layout: str) -> Tensor:
    """The same values as NCHW, channels_last, or a slice of something larger (in either order of memory)."""
    if layout == "nchw":
        return x.contiguous()
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    big = torch.full((n, c + 1, h + 2, w + 1), float("nan"), dtype=x.dtype, device=x.device)
    if layout == "sliced_nhwc":
        big = big.contiguous(memory_format=torch.channels_last)
    part = big[:, 1:, 1:-1, :-1]
    part.copy_(x)
    return part
