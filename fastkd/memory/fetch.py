"""Rows on their way: from the tier where a store keeps its images, and from the ranks that hold them."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import ranks
from fastkd.memory import host
from fastkd.memory.shard import Wanted, onto


class Fetch:
    """A batch of a store whose images are not simply here. Picking begins at once, the exchange between ranks with `send`.

    `send` and `wait` are called in the same order on all ranks, from the thread of the run: a collective has no other name than its turn.

    Args:
      images: [N, H, W, C], this rank's. wanted: rows to pick and to exchange. device: where the batch is wanted.
      hosted: whether the images are in host memory, to be picked by another thread.
    """

    def __init__(self, images: Tensor, wanted: Wanted, device: torch.device, hosted: bool):
        self.wanted, self.device = wanted, device
        self.bringing: Future[host.Arriving] | None = host.bring(images, wanted.pick, device) if hosted else None
        self.picked = None if hosted else torch.index_select(images, 0, onto(wanted.pick, device))
        self.arrived: torch.cuda.Event | None = None
        self.work: dist.Work | None = None
        self.out: Tensor | None = None

    def send(self) -> None:
        """Begin the exchange; the host waits for rows that are still being picked, not for the device."""
        if self.out is not None:
            return
        if self.bringing is not None:
            self.picked, self.arrived = self.bringing.result()
        assert self.picked is not None
        if not self.wanted.swapped:
            self.out = self.picked
            return
        behind = torch.cuda.stream(host.side(self.device)) if self.arrived is not None else contextlib.nullcontext()
        with behind:  # the exchange waits for the copy, the device's own work does not
            self.out, self.work = ranks.swap(self.picked, self.wanted.send, self.wanted.receive)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Images [n, H, W, C] and where in them the rows of the batch lie, int64 [b]; for use on the current stream, which waits."""
        self.send()
        assert self.out is not None
        if self.work is not None:
            self.work.wait()
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.arrived)
            for rows in (self.picked, self.out):  # made on the side stream: not to be overwritten there before this one is past them
                assert rows is not None
                rows.record_stream(stream)
        return self.out, self.wanted.at
