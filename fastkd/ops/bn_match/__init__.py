"""BN-statistic matching: statistics of BN inputs, the frozen BN that yields them on the way, and the distance to a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import choose
from . import reference
from . import registered as _registered
from .reference import bn_match_loss_ref, bn_sums_ref, frozen_bn_act_stats_ref, moments_ref

ACTS = ("none", "relu", "relu6", "leaky_relu")


def bn_sums(x: Tensor, shift: Tensor) -> Tensor:
    """Shifted sums of a BN input per channel, in one read; they add over batches and ranks.

      1. S1 = sum(x - shift)
      2. S2 = sum((x - shift)^2)

    The running mean is a good shift: var = S2/n - (S1/n)^2 then does not cancel (`moments`).

    Bytes:  reads x once; backward reads x and writes dx.
    Saves:  x and shift (inputs, no copy).

    Args:
      x:     [N, C, *S] floating point, any layout; contiguous and channels_last are read in place, others are copied first.
      shift: [C], a constant: it gets no gradient.
    Returns:
      [2, C] fp32 (fp64 for fp64 input); zeros for an empty batch.
    Gradients: x; first order in the native backends, any order in `reference`.
    Raises:
      ValueError: shapes that do not fit, or a shift that requires a gradient.
    """
    _check_x(x)
    _check_vector("shift", shift, x)
    if choose("bn_sums", x) == "reference":
        return bn_sums_ref(x, shift)
    return _registered.sums_fwd(x, shift)  # type: ignore[no-any-return]


def moments(sums: Tensor, count: int | float | Tensor, shift: Tensor) -> Tensor:
    """Mean and biased variance from (global) shifted sums.

      1. d    = S1 / count
      2. mean = shift + d
      3. var  = S2 / count - d^2, at least 0 (a rounding error below 0 becomes 0 with gradient 0)

    Args:
      sums:  [2, C] of `bn_sums`, possibly added over ranks.
      count: elements per channel that went into the sums.
      shift: [C] of `bn_sums`.
    Returns:
      [2, C] in the dtype of `sums`.
    Gradients: sums, any order.
    Raises:
      ValueError: a count of 0 (an empty batch has no statistics) or shapes that do not fit.
    """
    if sums.dim() != 2 or sums.shape[0] != 2 or shift.shape != sums.shape[1:]:
        raise ValueError(f"moments expects sums [2, C] and shift [C], found {tuple(sums.shape)} and {tuple(shift.shape)}")
    if not isinstance(count, Tensor) and count <= 0:
        raise ValueError(f"an empty batch has no BN statistics: count is {count}, at least 1 is expected")
    return moments_ref(sums, count, shift)


def bn_stats(x: Tensor, shift: Tensor | None = None) -> Tensor:
    """Mean and biased variance per channel of this rank's batch: `moments(bn_sums(x, shift), n, shift)`.

    Args:
      x:     [N, C, *S] floating point with at least one element per channel.
      shift: [C] near the mean, or None: the mean of the first sample.
    Returns:
      [2, C] fp32 (fp64 for fp64 input).
    Gradients: x, as in `bn_sums`.
    Raises:
      ValueError: an empty batch, or shapes that do not fit.
    """
    _check_x(x)
    count = x.numel() // max(x.shape[1], 1)
    if count == 0:
        raise ValueError(f"an empty batch has no BN statistics: found x of shape {tuple(x.shape)}")
    if shift is None:
        first = x.detach()[:1].to(reference.wide(x.dtype))
        shift = first.mean([d for d in range(x.dim()) if d != 1])
    return moments(bn_sums(x, shift), count, shift)


def frozen_bn_act_stats(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    act: str = "none",
    slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Frozen BatchNorm, residual and activation in one pass that also yields the statistics of the BN input.

      1. pre  = scale x + bias + residual     # scale = gamma/sqrt(rv + eps), bias = beta - scale rm
      2. y    = act(pre)
      3. sums = bn_sums(x, shift)             # shift = rm

    Backward: m = gy act'(pre), recomputed from x;  dx = m scale + g1 + 2 g2 (x - shift);  dresidual = m.

    Bytes:  forward reads x (and residual), writes y; backward reads x, gy (and residual), writes dx (and dresidual).
    Saves:  x and residual (inputs, no copy), three vectors of C.

    Args:
      x:        [N, C, *S] fp32, fp64, bf16 or fp16; contiguous and channels_last are read in place, others are copied first.
      scale, bias, shift: [C] constants of the frozen layer; they get no gradient.
      residual: same shape, dtype and device as x, or None; it is never broadcast.
      act:      "none", "relu", "relu6" or "leaky_relu" with negative slope `slope`.
    Returns:
      y in dtype and layout of x, and sums [2, C] fp32 (fp64 for fp64 input).
    Gradients: x and residual; first order in the native backends, any order in `reference`.
    Raises:
      ValueError: an unknown activation, shapes or dtypes that do not fit, or a constant that requires a gradient.
    """
    _check_x(x)
    for name, v in (("scale", scale), ("bias", bias), ("shift", shift)):
        _check_vector(name, v, x)
    if act not in ACTS:
        raise ValueError(f"unknown activation '{act}'; expected one of {', '.join(ACTS)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must have shape and dtype of x, {tuple(x.shape)} {x.dtype}; found {tuple(residual.shape)} {residual.dtype}"
        )
    if choose("frozen_bn_act_stats", x) == "reference":
        return frozen_bn_act_stats_ref(x, scale, bias, shift, residual, act, slope)
    return _registered.frozen_fwd(x, scale, bias, shift, residual, act, slope)  # type: ignore[no-any-return]


def bn_match_loss(
    stats: Tensor,
    target: Tensor,
    offsets: tuple[int, ...],
    *,
    first: float = 1.0,
    kind: str = "l2",
    average: Tensor | None = None,
    momentum: float = 0.0,
    calls: Tensor | None = None,
) -> Tensor:
    """Distance of batch statistics from a teacher's running statistics, summed over its BN layers; all of them in one launch.

    For layer l with channels offsets[l]:offsets[l+1] (layer 0 weighs `first`), with m, v the batch mean and biased variance
    and rm, rv the running ones:
      "l2":       |m - rm|_2 + |v - rv|_2                                       plain norms over the layer's channels, not squared
      "gauss_kl": sum over channels of ((m - rm)^2 + v)/(2 rv) - ln(sqrt(v/rv)) - 1/2      variances at least 1e-8

    With an `average` (FastDFKD, AAAI 2022), m and v are (1 - momentum) stats + momentum average, so that the gradient is (1 - momentum)
    times as strong; with `calls` too, only where calls > 0, as `fastkd.nn.BnEma` has it.

    Bytes:  forward reads 16 per channel (24 with an average), backward the same and writes 8. Saves: its inputs.

    Args:
      stats:    [2, C] mean and biased variance of the (global) batch, layers side by side: `Trace.bn`. fp32 or fp64; half is widened.
      target:   [2, C] running mean and variance, a constant.
      offsets:  L + 1 ints, the channel range of each layer; offsets[0] = 0 and offsets[L] = C. A layer may be empty.
      first:    weight of layer 0 (10 for DeepInversion on ImageNet).
      kind:     "l2" (DeepInversion, CVPR 2020, eq. 4) or "gauss_kl" (Choi et al. 2020, data-free quantisation).
      average:  [2, C] moving average of the statistics of earlier synthesis calls, a constant, or None.
      momentum: share of the average, in [0, 1).
      calls:    [] int64, how many calls the average has seen (0: nothing, the loss is plain), or None: it has seen some.
    Returns:
      [] in the dtype of `stats`, at least fp32; 0 for a teacher without BN layers.
    Gradients: stats, any order. A norm that is exactly 0 gets gradient 0, never NaN.
    Raises:
      ValueError: shapes or offsets that do not fit, an unknown kind, a momentum outside [0, 1) or without an average, or a constant
        that requires a gradient.
    """
    if stats.dim() != 2 or stats.shape[0] != 2 or stats.shape != target.shape:
        raise ValueError(f"stats and target must both be [2, C], found {tuple(stats.shape)} and {tuple(target.shape)}")
    if not offsets or offsets[0] != 0 or offsets[-1] != stats.shape[1] or list(offsets) != sorted(offsets):
        raise ValueError(f"offsets must rise from 0 to {stats.shape[1]}, found {tuple(offsets)}")
    if kind not in ("l2", "gauss_kl"):
        raise ValueError(f"unknown kind '{kind}'; expected l2 or gauss_kl")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1)")
    if average is None and (momentum or calls is not None):
        raise ValueError("momentum and calls are about an average, and none was given; pass average=[2, C]")
    if average is not None and average.shape != stats.shape:
        raise ValueError(f"average must be {list(stats.shape)} as stats is, found {list(average.shape)}")
    for name, v in (("target", target), ("average", average)):
        if v is not None:
            _check_constant(name, v, stats)
    stats = stats.to(reference.wide(stats.dtype))
    if choose("bn_match_loss", stats) == "reference":
        return bn_match_loss_ref(stats, target, offsets, first, kind, average, calls, momentum)
    return _registered.loss_fwd(stats, target, average, calls, offsets, momentum, first, kind)  # type: ignore[no-any-return]


def _check_x(x: Tensor) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [N, C, *S], found {x.dtype} of shape {tuple(x.shape)}")


def _check_vector(name: str, v: Tensor, x: Tensor) -> None:
    if v.dim() != 1 or v.shape[0] != x.shape[1]:
        raise ValueError(f"{name} must be [{x.shape[1]}], one value per channel of x; found {tuple(v.shape)}")
    _check_constant(name, v, x)


def _check_constant(name: str, v: Tensor, beside: Tensor) -> None:
    if v.device != beside.device:
        raise ValueError(f"{name} is on {v.device} and what it belongs to on {beside.device}; expected one device")
    if v.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which this op does not compute; pass {name}.detach()")
