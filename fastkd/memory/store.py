"""A preallocated store of images: append or ring; on the device or in host memory, on every rank or dealt to the ranks by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd import ranks
from fastkd.memory import host, shard
from fastkd.memory.ahead import Ahead
from fastkd.memory.fetch import Fetch
from fastkd.memory.place import Sharing, Tier, place
from fastkd.ops import replay_gather
from fastkd.rng import Rng

Quant = Literal["floor", "round", "none"]
APART = 1 << 30
"""Bytes of images from which a checkpoint keeps them in a file of their own, written without a copy of them in memory."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a store: what `Method.view` gathers, augments and normalises in one pass.

    `index` is int64 [b], this rank's rows of the batch; columns are read by attribute name through `column`. `fetch` are the images
    on their way, where the store's are in host memory or dealt to the ranks.
    """

    store: Store
    index: Tensor
    fetch: Fetch | None = None

    def gather(self, **options: Any) -> Tensor:
        """The images as a network's input, [b, C, H, W]; `options` as in `ops.replay_gather`. With sharded images a collective."""
        fetch = self.fetch or self.store.fetch(self.index)
        if fetch is None:
            return replay_gather(self.store.images, self.index, **options)
        images, at = fetch.wait()
        return replay_gather(images, at, **options)

    def read(self) -> Tensor:
        """The images [b, C, H, W] in [0, 1] for a uint8 store, as they are stored otherwise; torch's default dtype."""
        return self.gather()

    def column(self, name: str) -> Tensor:
        """A column's values at these rows, [b]."""
        return self.store.columns[name][self.index]


class Store:
    """Images [N, H, W, C] with named columns of one number a row.

    uint8 stores hold images of [0, 1] (quantised by `quant`); floating stores hold images as they are (normalised space).
    `add` gathers what all ranks made; columns are on the device of every rank, whole, so that all draw alike without a word. Batches
    are the same, to the bit, wherever the images are:

    - replicated (every rank holds all) or sharded (rank r of W holds rows r, r + W, …, and a batch travels as bytes);
    - on the device or in host memory (pinned where there is a GPU). From there, and from other ranks, the next batches of a dealt order
      are brought over while the current step runs; what is drawn by priority is fetched when it is drawn, because the draw depends on
      the priorities that the step before wrote. Fetching is host code, so a step with it cannot be captured in a graph.

    Args:
      rng: where `deal` draws its order.
      capacity: most rows that are kept; a row beyond it is an error, or with `ring` overwrites the oldest.
      shape: (c, h, w) of an image.
      dtype: torch.uint8 or a floating type.
      images: "replicated" or "sharded". tier: "device" or "host". None: as the run decides (`memory.place`), else replicated on the device.
      columns: name → dtype, e.g. label=torch.int16.
    """

    def __init__(
        self,
        rng: Rng,
        capacity: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.uint8,
        *,
        ring: bool = False,
        quant: Quant = "floor",
        images: Sharing | None = None,
        tier: Tier | None = None,
        **columns: torch.dtype,
    ):
        c, h, w = shape
        self.rng, self.capacity, self.ring, self.quant = rng, capacity, ring, quant
        self.sharing, self.tier = place(capacity * h * w * c * dtype.itemsize, images, tier)
        pinned = self.hosted and rng.device.type == "cuda"
        # Of the shards' rows one more, the last: it takes what other ranks hold, so that `put` needs no look at row numbers.
        rows = capacity if self.shards == 1 else shard.held(capacity, 0, self.shards) + 1
        where = torch.device("cpu") if self.hosted else rng.device
        self.images = torch.zeros(rows, h, w, c, dtype=dtype, device=where, pin_memory=pinned)
        self.ahead = Ahead() if self.hosted or self.shards > 1 else None
        self.columns = {k: torch.zeros(capacity, dtype=d, device=rng.device) for k, d in columns.items()}
        self.fill, self.written = 0, 0
        self.order = torch.zeros(0, dtype=torch.int64, device=rng.device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=rng.device)

    @classmethod
    def of(cls, rng: Rng, images: Tensor, **columns: Tensor) -> Store:
        """A full store of images [N, H, W, C] that are there already, equal on all ranks; nothing is copied."""
        n, h, w, c = images.shape
        tier: Tier = "device" if images.device.type == rng.device.type else "host"
        store = cls(rng, 0, (c, h, w), images.dtype, images="replicated", tier=tier)
        store.images, store.columns = images, dict(columns)
        store.capacity = store.fill = store.written = n
        return store

    def __len__(self) -> int:
        return self.fill

    @property
    def shards(self) -> int:
        """How many ranks the images are dealt to; 1: every rank holds them all."""
        return ranks.world() if self.sharing == "sharded" else 1

    @property
    def hosted(self) -> bool:
        """Whether the images are in host memory."""
        return self.tier == "host"

    def add(self, x: Tensor, **columns: Tensor) -> Tensor:
        """Append this rank's rows of a batch.

        Args:
          x: [b, C, H, W]; in [0, 1] for a uint8 store (values outside are clamped).
          columns: one [b] tensor for each of the store's columns.
        Returns:
          [b·W] int64, the rows that the global batch took.
        Raises:
          ValueError: the store is full and no ring, more rows at once than a ring holds, or images or columns that do not fit.
        """
        return self.put(ranks.gather(self.encode(x)), **{k: ranks.gather(v) for k, v in columns.items()})

    def put(self, images: Tensor, **columns: Tensor) -> Tensor:
        """Append rows that every rank holds.

        Args:
          images: [n, H, W, C], uint8 or of the store's dtype; uint8 images come into a floating store as [0, 1].
          columns: one [n] tensor for each of the store's columns.
        Returns:
          [n] int64, the rows that they took.
        Raises:
          ValueError: as `add`.
        """
        if columns.keys() != self.columns.keys():
            raise ValueError(f"the store has the columns {sorted(self.columns)}, got {sorted(columns)}")
        n = len(images)
        for name, v, shape in (("images", images, (n, *self.images.shape[1:])), *((k, v, (n,)) for k, v in columns.items())):
            if v.shape != shape:  # before anything is written, and nothing is broadcast
                raise ValueError(f"{name} must be of shape {shape}, found {tuple(v.shape)}")
        if images.dtype == torch.uint8 and self.images.dtype != torch.uint8:
            images = images.to(self.images.dtype) / 255
        at = self._slots(n)
        slot = at
        if self.shards > 1:
            slot = torch.where(at % self.shards == ranks.rank(), at // self.shards, len(self.images) - 1)
        self._settle()
        self.images[slot.to(self.images.device)] = images.to(self.images.device)
        for k, v in columns.items():
            self.columns[k][at] = v.to(self.columns[k].dtype)
        self.written += len(at)
        self.fill = min(self.written, self.capacity)
        return at

    def _slots(self, n: int) -> Tensor:
        """The rows that the next `n` images take, int64 [n]."""
        if not self.ring and self.written + n > self.capacity:
            raise ValueError(f"the store holds {self.capacity} images; {self.written} are written and {n} more do not fit")
        if n > self.capacity:  # two images for one row: which stays would be chance
            raise ValueError(f"the store holds {self.capacity} images; {n} at once do not fit")
        return (torch.arange(n, device=self.cursor.device) + self.written) % self.capacity

    def encode(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] as `put` takes them, [b, H, W, C] of the store's dtype; see `add`."""
        x = x.detach().permute(0, 2, 3, 1)
        if self.images.dtype == torch.uint8 and x.dtype != torch.uint8:
            x = x.clamp(0, 1) * 255
            x = x.floor() if self.quant == "floor" else x.round()
        return x.to(self.images.dtype).contiguous()

    def as_stored(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] as they would be read back if they were added: clamped and quantised in a uint8 store."""
        images = self.encode(x)
        return replay_gather(images, torch.arange(len(images), device=images.device))

    def reserve(self, n: int) -> None:
        """Room for the order of one phase of `n` rows; called once, while the method is built."""
        self.order = torch.zeros(n, dtype=torch.int64, device=self.rng.device)

    def deal(self, name: str = "deal") -> None:
        """Draw the order of a phase: whole passes over the stored rows, each a new permutation, equal on all ranks."""
        if not self.fill:
            raise ValueError("nothing is stored yet, so no batch can be dealt")
        n, done = self.order.numel(), 0
        while done < n:
            take = min(self.fill, n - done)
            self.order[done : done + take] = self.rng.permutation(self.fill, name)[:take]
            done += take
        self.cursor.zero_()
        if self.ahead is not None:
            self.ahead.look(self)

    def next(self, batch: int) -> Rows:
        """This rank's rows of the next `batch` of the dealt order (no host read; past its end the order begins again)."""
        own = ranks.rows(batch)
        fetch = self.ahead.next(self, batch) if self.ahead is not None else None
        at = self.cursor + torch.arange(own.start, own.stop, own.step, device=self.order.device)
        index = self.order[at % self.order.numel()]
        self.cursor += batch
        if self.ahead is not None:
            self.ahead.mark(self)
        return Rows(self, index, fetch)

    def rows(self, index: Tensor) -> Rows:
        """Rows by their numbers [b] int64, on the device; images that are not there begin to move. With sharded images a collective."""
        return Rows(self, index, self.fetch(index))

    def fetch(self, index: Tensor, batch: Tensor | None = None) -> Fetch | None:
        """The images of rows [b] of this rank on their way, or None where they need not move.

        Args:
          batch: [b·W] the rows of all ranks in the order of the global batch, where they are known; else they are gathered.
        """
        if self.ahead is None:
            return None
        if self.shards > 1:
            wanted = shard.unknown(ranks.gather(index) if batch is None else batch)
        else:
            wanted = shard.Wanted(index, torch.arange(len(index), device=index.device), swapped=False)
        fetch = Fetch(self.images, wanted, self.rng.device, self.hosted)
        if not self.hosted:
            fetch.send()  # from host memory it is sent when it is used: until then the host need not wait
        return fetch

    def _settle(self) -> None:
        """Before images are overwritten: nothing of them is under way."""
        if self.ahead is not None:
            self.ahead.forget()
        if self.hosted:
            host.settle()

    def read(self, index: Tensor) -> Tensor:
        """Images [b, C, H, W] at `index`, in [0, 1] for a uint8 store, as they are stored otherwise; torch's default dtype."""
        return self.rows(index).read()

    # What a checkpoint keeps apart --------------------------------------------------------------------------------------

    @property
    def apart(self) -> bool:
        """Whether a checkpoint keeps the images in files of their own: one a rank where they are sharded."""
        return self.hosted or self.sharing == "sharded" or self.images.nbytes > APART

    def held(self) -> Tensor:
        """This rank's stored images [n, H, W, C], not copied; without sharding those of every rank."""
        return self.images[: shard.held(self.fill, ranks.rank() if self.shards > 1 else 0, self.shards)]

    def load(self, parts: Sequence[Any]) -> None:
        """Take images that `len(parts)` ranks held; those of this rank are picked out.

        Raises:
          ValueError: they do not fit this store.
        """
        self._settle()
        if sum(map(len, parts)) > self.capacity:
            raise ValueError(f"{sum(map(len, parts))} images are saved, the store holds {self.capacity}")
        shard.deal(parts, self.images, ranks.rank() if self.shards > 1 else 0, self.shards)

    def newest(self, n: int) -> Tensor:
        """Row numbers of the `n` newest images, newest last, int64."""
        n = min(n, self.fill)
        return (torch.arange(self.written - n, self.written, device=self.cursor.device)) % self.capacity

    @property
    def bytes(self) -> int:
        """Bytes held by images and columns, those of sharded images over all ranks."""
        return self.capacity * self.images[:1].nbytes + sum(t.nbytes for t in self.columns.values())
