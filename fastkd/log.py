"""Named values of a run, summed on the device and read once an interval."""

from __future__ import annotations

import torch
from torch import Tensor


class Log:
    """Sums of named scalars, kept on the device. `prefix` is the name of the running step.

    Its tensors are state of the run: a resumed run reports the same means.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device, self.prefix = torch.device(device), ""
        self.sums: dict[str, Tensor] = {}

    def slot(self, name: str) -> Tensor:
        """[2] fp64: sum and count of a name; made on first use, zeroed in place afterwards."""
        if name not in self.sums:
            self.sums[name] = torch.zeros(2, dtype=torch.float64, device=self.device)
        return self.sums[name]

    def add(self, **values: Tensor) -> None:
        """Add one observation of each value ([] tensors)."""
        for name, value in values.items():
            slot = self.slot(f"{self.prefix}.{name}" if self.prefix else name)
            slot[0] += value.detach()
            slot[1] += 1

    def read(self) -> dict[str, float]:
        """Means since the last `clear`, in one read from the device; names without an observation are left out."""
        if not self.sums:
            return {}
        rows = torch.stack(list(self.sums.values())).cpu().tolist()
        return {name: s / n for name, (s, n) in zip(self.sums, rows, strict=True) if n}

    def clear(self) -> None:
        """Zero all sums in place (their addresses stay, so recorded steps stay valid)."""
        for slot in self.sums.values():
            slot.zero_()
