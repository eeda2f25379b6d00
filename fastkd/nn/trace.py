"""What one forward of a teacher or student returns, and how its statistics become those of the global batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd import ops, ranks
from fastkd.errors import ConfigError, InputError, unknown

ASKS = ("bn", "moments", "groups")


@dataclass
class Trace:
    """One forward.

    Attributes:
      logits: [B, C], or [B, C, *S] for dense prediction.
      feature: [B, d], the vector that enters the last linear layer; None where there is no such layer.
      map: [B, K, h, w], the map that enters the global pooling; None where none was found.
      bn: [2, sum C] mean and biased variance of the input of every BatchNorm2d over the global batch, in call order; at least fp32.
      moments: [B, sum C] spatial mean of the input of every BatchNorm2d, per sample; at least fp32.
      groups: maps after the stem and after each resolution stage; see `graph.group_nodes`.
    """

    logits: Tensor
    feature: Tensor | None
    map: Tensor | None
    bn: Tensor | None = None
    moments: Tensor | None = None
    groups: tuple[Tensor, ...] | None = None


def check_ask(ask: Iterable[str]) -> None:
    """Raises ConfigError for anything but "bn", "moments" and "groups"."""
    for name in ask:
        if name not in ASKS:
            raise ConfigError(unknown("part of a trace", name, ASKS))


def sample_means(x: Tensor) -> Tensor:
    """[B, C, *S] → [B, C] means over space, at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dim() <= 2:
        return x.to(wide)
    # A sum, divided afterwards: the gradient of a mean would be written out, in another memory layout than a channels_last map's.
    return x.flatten(2).sum(2, dtype=wide) / x.shape[2:].numel()


class Counts:
    """Elements per channel of the global batch, as a vector for all layers; made once for each set of shapes.

    A vector made anew would be a copy from the host in every forward, and could not be captured.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[int, ...], torch.device, torch.dtype], Tensor] = {}

    def vector(self, counts: Sequence[int], channels: Sequence[int], like: Tensor) -> Tensor:
        """[sum C] in dtype and on the device of `like`."""
        key = (tuple(counts), like.device, like.dtype)
        found = self._made.get(key)
        if found is None:
            parts = [torch.full((c,), float(n), dtype=like.dtype, device=like.device) for n, c in zip(counts, channels, strict=True)]
            found = torch.cat(parts)
            if type(found) is Tensor and not found.is_inference():  # not one of a dry walk on fake tensors
                self._made[key] = found
        return found


def global_statistics(sums: Sequence[Tensor], counts: Sequence[int], shift: Tensor, made: Counts) -> Tensor:
    """Shifted sums [2, C_l] of all layers → mean and biased variance [2, sum C] of the global batch; one flat all-reduce.

    Args:
      counts: elements per channel that this rank summed, per layer; every rank has as many.
      shift: [sum C] what the sums are taken about.
    """
    if not sums:
        return shift.new_zeros(2, 0)
    if not all(counts):
        raise InputError("BatchNorm statistics of an empty batch were asked for; expected at least one image")
    flat = torch.cat([s if s.dtype == sums[0].dtype else s.to(sums[0].dtype) for s in sums], 1)
    count = made.vector([n * ranks.world() for n in counts], [s.shape[1] for s in sums], flat)
    return ops.moments(ranks.total(flat), count, shift.to(flat.dtype))
