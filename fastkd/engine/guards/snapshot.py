"""Copies of what a step may move before its update: to put it back, or to keep it where the step was not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.engine import state
from fastkd.engine.attributes import hanging
from fastkd.method import Method

LIMIT = 1 << 16
"""Bytes of a tensor (cursors, sums, not buffers of networks) above which it is not copied: a step writes it anew before it reads it."""


class Flat:
    """Tensors with a copy of each, in one flat buffer a dtype. Their addresses must not change."""

    def __init__(self, tensors: Sequence[Tensor]):
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in tensors:
            if t.numel():
                groups.setdefault((t.dtype, t.device), []).append(t.detach())
        self.groups = [(group, [t.numel() for t in group], _flat(group)) for group in groups.values()]

    def take(self) -> None:
        """Copy the tensors."""
        for group, _, kept in self.groups:
            torch.cat([t.reshape(-1) for t in group], out=kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the copies back."""
        for group, sizes, kept in self.groups:
            _write(group, sizes, kept)

    @torch.no_grad()
    def mask(self, skip: Tensor) -> None:
        """Copy them back where `skip` ([], on the device) is not 0; nothing is read by the host."""
        for group, sizes, kept in self.groups:
            now = _flat(group)
            _write(group, sizes, torch.where(skip.to(now.device) > 0, kept, now))


def _flat(group: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in group])


def _write(group: list[Tensor], sizes: list[int], flat: Tensor) -> None:
    torch._foreach_copy_(group, [piece.view(t.shape) for t, piece in zip(group, flat.split(sizes), strict=True)])


class Snapshot:
    """What a step may move before its update: buffers of networks (running statistics), cursors, sums of the log, other small tensors.

    Larger buffers of a method (labels, images) are what the step itself makes: done again, it makes them again. What optimisers own moves
    in the update; that it did is noticed (`changed`).
    """

    def __init__(self, method: Method):
        self.method = method
        self._numbers: list[tuple[state.NumberItem, Any]] = []
        self._versions: list[int] = []
        self._find()

    def _find(self) -> None:
        self._known = set(self.method.log.sums)
        owned, nets = _of_optimisers(self.method), _buffers(self.method)
        tensors = [i.tensor for i in state.walk(self.method) if isinstance(i, state.TensorItem)]
        self.owned = [t for t in tensors if id(t) in owned]
        rest = [t for t in tensors if id(t) not in owned]
        self.buffers = Flat([t for t in rest if id(t) in nets])
        self.small = Flat([t for t in rest if id(t) not in nets and t.numel() * t.element_size() <= LIMIT])

    @property
    def bytes(self) -> int:
        """Bytes of the copies."""
        return sum(kept.numel() * kept.element_size() for flat in (self.buffers, self.small) for _, _, kept in flat.groups)

    def layout(self) -> object:
        """Stands for the addresses of the copies: another object once they have moved, because the log has new sums."""
        if self._known != self.method.log.sums.keys():
            self._find()
        return self.buffers

    def take(self, *, numbers: bool) -> None:
        """Copy what the next step may move. `numbers`: host numbers as well (steps that run host code)."""
        self.layout()
        self.buffers.take()
        self.small.take()
        self._versions = [t._version for t in self.owned]
        found = [i for i in state.walk(self.method) if isinstance(i, state.NumberItem)] if numbers else []
        self._numbers = [(i, i.value) for i in found]

    def forget_numbers(self) -> None:
        """A replayed step moves none, and takes no copy: those of an earlier step are not to be put back."""
        self._numbers = []

    def changed(self) -> bool:
        """Whether an update has begun since."""
        return self._versions != [t._version for t in self.owned]

    def restore(self) -> None:
        """Put back what was copied."""
        self.buffers.restore()
        self.small.restore()
        for item, value in self._numbers:
            item.restore(value)
        for name, slot in self.method.log.sums.items():
            if name not in self._known:
                slot.zero_()

    def mask(self, skip: Tensor) -> None:
        """Put the networks' buffers back where the step was skipped."""
        self.buffers.mask(skip)


def _of_optimisers(method: Method) -> set[int]:
    """Parameters that optimisers update, and their state."""
    found: set[int] = set()
    for opt in optimisers(method):
        found |= {id(p) for g in opt.param_groups for p in g["params"]}
        found |= {id(t) for s in opt.state.values() for t in s.values() if isinstance(t, Tensor)}
    return found


def optimisers(method: Method) -> list[torch.optim.Optimizer]:
    """Every optimiser that hangs on a method."""
    return hanging(method, torch.optim.Optimizer)


def _buffers(method: Method) -> set[int]:
    return {id(b) for net in hanging(method, nn.Module) for b in net.buffers()}
