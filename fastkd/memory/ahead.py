"""The next batches of a dealt order, brought over while the current step runs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensor

from fastkd.memory import shard
from fastkd.memory.fetch import Fetch

if TYPE_CHECKING:
    from fastkd.memory.store import Store

DEPTH = 2
"""Batches under way: one is exchanged between the ranks while the one behind it is still being picked in host memory."""


class Ahead:
    """Knows on the host what a store will deal, and fetches it in time. It is no state: after a resume it looks again.

    What it knows holds as long as nobody wrote to the store's images, order or cursor; their version counters tell.
    """

    def __init__(self) -> None:
        self.order: np.ndarray[Any, Any] = np.zeros(0, dtype=np.int64)
        self.position = 0
        self.seen: tuple[int, ...] = ()
        self.coming: deque[tuple[int, int, Fetch]] = deque()

    def look(self, store: Store) -> None:
        """Read the dealt order and the cursor from the device: the only time the host waits, once a phase and after a resume."""
        self.forget()
        if not isinstance(store.order, FakeTensor):
            self.order, self.position = store.order.cpu().numpy().copy(), int(store.cursor)
        self.mark(store)

    def mark(self, store: Store) -> None:
        """What was written to the store until now is known."""
        self.seen = tuple(t._version for t in (store.images, store.order, store.cursor))

    def forget(self) -> None:
        """Drop what is under way; an exchange that has begun is waited for, since other ranks take part in it."""
        for _, _, fetch in self.coming:
            if fetch.out is not None:
                fetch.wait()
        self.coming.clear()

    def next(self, store: Store, batch: int) -> Fetch | None:
        """The fetch of the next `batch` rows, most often complete, while those behind it begin; None in a dry run."""
        if isinstance(store.order, FakeTensor):
            return None
        if self.seen != tuple(t._version for t in (store.images, store.order, store.cursor)):
            self.look(store)
        if self.coming and self.coming[0][:2] == (self.position, batch):
            found = self.coming.popleft()[2]
        else:
            self.forget()
            found = self._fetch(store, self.position, batch)
        found.send()
        self.position += batch
        while len(self.coming) < DEPTH:
            start = self.position + len(self.coming) * batch
            if start + batch > len(self.order):  # past its end the order begins again, but a phase seldom goes there
                break
            self.coming.append((start, batch, self._fetch(store, start, batch)))
        if self.coming:
            self.coming[0][2].send()
        return found

    def _fetch(self, store: Store, start: int, batch: int) -> Fetch:
        rows = self.order[np.arange(start, start + batch) % len(self.order)]
        return Fetch(store.images, shard.known(rows, store.rng.device, store.shards > 1), store.rng.device, store.hosted)
