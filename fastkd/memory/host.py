"""Rows of a store in host memory on their way to a GPU: picked on the host, copied on a side stream."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Staged:
    """Images [b, H, W, C] that a side stream copies to the device; `arrived` is recorded behind the copy."""

    images: Tensor
    arrived: torch.cuda.Event

    def wait(self) -> Tensor:
        """The images, for use on the current stream, which waits for them; the host does not."""
        stream = torch.cuda.current_stream(self.images.device)
        stream.wait_event(self.arrived)
        self.images.record_stream(stream)
        return self.images


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def stage(images: Tensor, index: Tensor) -> Staged:
    """Begin to bring rows of a pinned store to the device of `index`.

    The host waits until `index` is known, not for what is queued later; picking and copying run beside the device's own work.

    Args:
      images: [N, H, W, C] in pinned host memory. index: [b] int64 on a CUDA device.
    """
    side = _side(index.device)
    side.wait_stream(torch.cuda.current_stream(index.device))
    with torch.cuda.stream(side):
        rows = index.to("cpu", non_blocking=True)
        index.record_stream(side)
        side.synchronize()
        picked = torch.empty((len(rows), *images.shape[1:]), dtype=images.dtype, pin_memory=True)
        torch.index_select(images, 0, rows, out=picked)
        arriving = picked.to(index.device, non_blocking=True)
        return Staged(arriving, side.record_event())
