"""The moving average of batch statistics that FastDFKD and NAYER mix into the BN loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd import ops
from fastkd.ops.bn_match.reference import blend


class BnEma(nn.Module):
    """Batch statistics mixed with their moving average over synthesis calls (the momentum rule of FastDFKD, AAAI 2022).

    In the first call the statistics are used as they are; from the second on `(1 - m) bn + m average`, whose gradient is
    (1 - m) times the plain one. `update`, once after the last step of a call, moves the average. Everything stays on the device.

    Args:
      channels: sum of the channels of all BN layers, `teacher.split[-1]`.
      momentum: m, in [0, 1); 0 is the plain loss.

    Buffers: mean_var [2, C] the average; last [2, C] the statistics that `mix` saw last; calls [] int64.
    """

    mean_var: Tensor
    last: Tensor
    calls: Tensor

    def __init__(self, channels: int, momentum: float = 0.9):
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"BnEma momentum is {momentum}; expected a number in [0, 1)")
        self.momentum = momentum
        self.register_buffer("mean_var", torch.zeros(2, channels))
        self.register_buffer("last", torch.zeros(2, channels))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def mix(self, bn: Tensor) -> Tensor:
        """[2, C] mean and variance of the batch → what the loss compares with the teacher's; remembers the batch's."""
        self._remember(bn)
        return blend(bn, self.mean_var, self.calls, self.momentum)

    def loss(self, bn: Tensor, target: Tensor, split: tuple[int, ...], *, first: float = 1.0, kind: str = "l2") -> Tensor:
        """`ops.bn_match_loss(self.mix(bn), target, split, …)` in one launch; remembers the batch's statistics as `mix` does."""
        self._remember(bn)
        return ops.bn_match_loss(bn, target, split, average=self.mean_var, momentum=self.momentum, calls=self.calls, first=first, kind=kind)

    @torch.no_grad()
    def _remember(self, bn: Tensor) -> None:
        self.last.copy_(bn)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average by the statistics that `mix` saw last: they become the average in the first call. Statistics that are not
        finite (their step was skipped) move nothing, or every later loss would be lost with them."""
        moved = torch.where(self.calls > 0, torch.lerp(self.last, self.mean_var, self.momentum), self.last)
        finite = self.last.isfinite().all()
        self.mean_var.copy_(torch.where(finite, moved, self.mean_var))
        self.calls += finite

    def extra_repr(self) -> str:
        return f"channels={self.last.shape[1]}, momentum={self.momentum}"
