"""BatchNorm with batch statistics and the activation behind it, as one op that also works over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd import ranks

from .. import _native
from .._library import choose
from . import registered as _registered
from .reference import batch_norm_act_ref

ACTS = ("none", "relu", "relu6", "leaky_relu")


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.01,
    over_ranks: bool = False,
) -> Tensor:
    """BatchNorm in training (batch statistics, running ones updated) and its activation.

      1. m, v = mean and biased variance of x over all dimensions but 1   # of the batch of all ranks with `over_ranks`
      2. y    = act(weight (x - m) / sqrt(v + eps) + bias)
      3. running_mean += momentum (m - running_mean);  running_var += momentum (v n/(n-1) - running_var), in place

    == act(batch_norm(x, running_mean, running_var, weight, bias, training=True, momentum, eps)).

    Bytes:  forward reads x twice, writes y; backward reads x and gy twice, writes dx. The activation's mask is recomputed from x.
    Saves:  x (input, no copy), four vectors of C.
    Ranks:  with `over_ranks` one all-reduce of 2 C numbers in each direction. Every rank must hold equally many rows; gradients of
            weight and bias are this rank's share, as everywhere.

    Args:
      x:            [N, C, *S] fp32, fp64, bf16 or fp16; contiguous and channels_last are read in place, others are copied first.
      running_mean, running_var: [C], updated; None: nothing is tracked.
      weight, bias: [C] or None (ones, zeros); computed with in at least fp32.
      momentum:     weight of the new statistics; a 0-d tensor for one that is counted on the device (1 / num_batches_tracked).
      act:          "none", "relu", "relu6" or "leaky_relu" with negative slope `slope`.
    Returns:
      y in dtype and layout of x. An empty batch gives an empty result and moves no statistics.
    Gradients: x, weight and bias; first order in the native backends, any order in `reference`.
    Raises:
      ValueError: an unknown activation, shapes that do not fit, or one value a channel (which has no variance).
    """
    _check(x, act, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias})
    if x.numel() == 0:
        return _empty(x, weight, bias)
    over_ranks = over_ranks and ranks.world() > 1
    count = x.numel() // x.shape[1] * (ranks.world() if over_ranks else 1)
    if count <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if choose("batch_norm_act", x) == "reference":
        y, mean, unbiased = batch_norm_act_ref(x, weight, bias, eps, act, slope, over_ranks)
    else:
        y, stats = _registered.BatchNormAct.apply(_native.dense(x), weight, bias, eps, act, slope, over_ranks)
        mean, unbiased = stats[0], stats[1]
    for running, now in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            _move(running, now, momentum)
    return y


@torch.no_grad()
def _move(running: Tensor, now: Tensor, momentum: float | Tensor) -> None:
    running.lerp_(now.detach().to(running.dtype), momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum)


def _empty(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """As torch: affine in x, so that weight and bias have gradients (zeros)."""
    shape = (1, -1, *([1] * (x.dim() - 2)))
    y = x.clone() if weight is None else x * weight.view(shape).to(x.dtype)
    return y if bias is None else y + bias.view(shape).to(x.dtype)


def _check(x: Tensor, act: str, vectors: dict[str, Tensor | None]) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [N, C, *S], found {x.dtype} of shape {tuple(x.shape)}")
    for name, v in vectors.items():
        if v is not None and (v.dim() != 1 or v.shape[0] != x.shape[1]):
            raise ValueError(f"{name} must be [{x.shape[1]}], one value per channel of x; found {tuple(v.shape)}")
        if v is not None and v.device != x.device:
            raise ValueError(f"{name} is on {v.device} and x on {x.device}; expected one device")
    if act not in ACTS:
        raise ValueError(f"unknown activation '{act}'; expected one of {', '.join(ACTS)}")
