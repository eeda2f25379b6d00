"""The best batch of a synthesis call, kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Best:
    """Keeps the tensors that came with the lowest total since the last `reset`, without a host read.

    Args:
      rows: named buffers (this rank's rows) that `offer` overwrites in place.
    """

    def __init__(self, **rows: Tensor):
        self.rows = rows
        some = next(iter(rows.values()))
        self.total = torch.full((), torch.inf, device=some.device)

    def reset(self) -> None:
        """Forget the total; the next offer is taken."""
        self.total.fill_(torch.inf)

    def offer(self, total: Tensor, always: bool = False, **rows: Tensor) -> None:
        """Take `rows` if `total` (a global scalar, equal on all ranks) is the lowest so far; a NaN is never taken.

        Args:
          total: [] loss of the call's current iterate.
          always: take them whatever the total is (methods that store the last iterate).
        """
        total = total.detach().to(self.total.dtype)
        better = torch.ones_like(total, dtype=torch.bool) if always else total < self.total
        self.total.copy_(torch.where(better, total, self.total))
        for name, x in rows.items():
            self.rows[name].copy_(torch.where(better, x.detach(), self.rows[name]))
