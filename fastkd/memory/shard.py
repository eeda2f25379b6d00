"""Rows of a store that are dealt to the ranks like cards (rank r holds rows r, r + W, …): who holds what, and how a batch travels.

A batch travels by one all-to-all of bytes: it moves each row once, which a reduce-scatter or an all-gather of whole batches does not.
Where the host knows the batch, each rank sends exactly the rows that another one wants. Where only the device knows it, each sends as
many rows to every rank as that rank wants in all, so that no size depends on a value and nobody waits; the receiver takes what counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd import ranks

CHUNK = 1 << 26
"""Bytes that are read at once when rows are dealt anew."""


def held(n: int, rank: int, world: int) -> int:
    """How many of rows 0 … n - 1 a rank holds."""
    return len(range(rank, n, world))


@dataclass(frozen=True)
class Wanted:
    """What a rank contributes to a batch, and where its own rows lie in what it then has.

    Attributes:
      pick: [m] int64, the rows that it takes from its own images, in the order of their receivers.
      at: [b] int64 on the device, where the rows of its part of the batch lie among what arrives.
      send, receive: rows for and from each rank, None: equally many. swapped: whether rows go to other ranks at all.
    """

    pick: Tensor
    at: Tensor
    send: list[int] | None = None
    receive: list[int] | None = None
    swapped: bool = True


def known(batch: np.ndarray[Any, Any], device: torch.device, sharded: bool) -> Wanted:
    """For a global batch of row numbers [B] that the host knows; `pick` is on the host."""
    rank, world = ranks.rank(), ranks.world()
    own = batch[rank::world]
    if not sharded:
        return Wanted(torch.from_numpy(own.copy()), torch.arange(len(own), device=device), swapped=False)
    parts = [part[part % world == rank] // world for part in (batch[r::world] for r in range(world))]
    order = np.argsort(own % world, kind="stable")  # rows arrive rank by rank
    at = np.empty_like(order)
    at[order] = np.arange(len(own))
    receive = np.bincount(own % world, minlength=world).tolist()
    return Wanted(torch.from_numpy(np.concatenate(parts)), onto(torch.from_numpy(at), device), [len(p) for p in parts], receive)


def unknown(batch: Tensor) -> Wanted:
    """For a global batch of row numbers [B] that only the device knows; nothing waits for it."""
    world, b = ranks.world(), len(batch) // ranks.world()
    own = ranks.local(batch)
    pick = batch.view(b, world).T.reshape(-1) // world  # not all of them are this rank's rows: those are not looked at
    return Wanted(pick, own % world * b + torch.arange(b, device=batch.device))


def onto(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device, if it is still on the host; which does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x


def deal(parts: Sequence[Any], into: Tensor, rank: int, world: int) -> None:
    """Write a rank's rows of a store that was dealt to `len(parts)` ranks into its images.

    Args:
      parts: the rows [n, H, W, C] that each of those ranks held; tensors, or what has their length, shape, dtype and slices.
      into: [m, H, W, C], with room for the rows of `rank` of `world`.
    Raises:
      ValueError: the parts are not those of one store, or do not fit.
    """
    before, n = len(parts), sum(map(len, parts))
    for r, part in enumerate(parts):
        if len(part) != held(n, r, before):
            raise ValueError(f"part {r} of {before} has {len(part)} rows; expected {held(n, r, before)} of {n}")
        if tuple(part.shape[1:]) != tuple(into.shape[1:]) or part.dtype != into.dtype:
            raise ValueError(f"rows are {tuple(into.shape[1:])} {into.dtype}, saved as {tuple(part.shape[1:])} {part.dtype}")
    if held(n, rank, world) > len(into):
        raise ValueError(f"{held(n, rank, world)} rows are saved for this rank, there is room for {len(into)}")
    step = max(1, CHUNK // max(1, into[:1].nbytes))
    for r, part in enumerate(parts):
        if (r - rank) % math.gcd(before, world):
            continue  # no row of it is this rank's
        for start in range(0, len(part), step):
            rows = part[start : start + step]
            number = r + before * torch.arange(start, start + len(rows))
            mine = number % world == rank
            into[(number[mine] // world).to(into.device)] = rows[mine.to(rows.device)].to(into.device)
