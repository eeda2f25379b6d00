"""Rows of a store in host memory: picked by a thread of their own and copied to the device on a side stream."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Arriving = tuple[Tensor, "torch.cuda.Event | None"]
"""Rows, and on a GPU the event behind their copy."""


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fastkd-rows")  # one: picks are taken in turn, and `settle` waits for all of them


@functools.cache
def side(device: torch.device) -> torch.cuda.Stream:
    """The stream on which rows arrive."""
    return torch.cuda.Stream(device)


def bring(images: Tensor, pick: Tensor, device: torch.device) -> Future[Arriving]:
    """Begin to bring rows to `device`; the caller waits for nothing.

    Args:
      images: [N, H, W, C] in host memory, pinned where the device is a GPU. pick: [n] int64, on the host or on the device.
    """
    ready = None
    if device.type == "cuda":
        side(device)  # made here: a device without a number is the current one of this thread
    if pick.is_cuda:  # the thread waits until the numbers are there, the caller does not
        ready = torch.cuda.current_stream(device).record_event()
        pick.record_stream(side(device))
    if isinstance(images, FakeTensor):  # a dry run: its tensors live in one thread
        done: Future[Arriving] = Future()
        done.set_result(_pick(images, pick, device, ready))
        return done
    return _thread().submit(_pick, images, pick, device, ready)


def settle() -> None:
    """Wait until no row is being picked, so that images may be overwritten."""
    _thread().submit(lambda: None).result()


def _pick(images: Tensor, pick: Tensor, device: torch.device, ready: torch.cuda.Event | None) -> Arriving:
    if device.type != "cuda":
        return torch.index_select(images, 0, pick), None
    with torch.cuda.stream(side(device)):
        if ready is not None:
            side(device).wait_event(ready)
            pick = pick.to("cpu", non_blocking=True)
            side(device).record_event().synchronize()
        picked = torch.empty((len(pick), *images.shape[1:]), dtype=images.dtype, pin_memory=True)
        torch.index_select(images, 0, pick, out=picked)
        return picked.to(device, non_blocking=True), side(device).record_event()
