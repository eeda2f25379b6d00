"""A preallocated store of images on the device: append or ring, replicated on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd import ranks
from fastkd.memory.host import Staged, stage
from fastkd.ops import replay_gather
from fastkd.rng import Rng

Quant = Literal["floor", "round", "none"]
Tier = Literal["device", "host"]


@dataclass(frozen=True)
class Rows:
    """Some rows of a store: what `Method.view` gathers, augments and normalises in one pass.

    `index` is int64 [b], this rank's rows of the batch; columns are read by attribute name through `column`. `staged` are the images
    on their way, where the store is in host memory and the rows are wanted on a GPU.
    """

    store: Store
    index: Tensor
    staged: Staged | None = None

    def gather(self, **options: Any) -> Tensor:
        """The images as a network's input, [b, C, H, W]; `options` as in `ops.replay_gather`."""
        if self.staged is None:
            return replay_gather(self.store.images, self.index, **options)
        images = self.staged.wait()
        return replay_gather(images, torch.arange(len(images), device=images.device), **options)

    def column(self, name: str) -> Tensor:
        """A column's values at these rows, [b]."""
        return self.store.columns[name][self.index]


class Store:
    """Images [N, H, W, C] with named columns of one number a row.

    uint8 stores hold images of [0, 1] (quantised by `quant`); floating stores hold images as they are (normalised space).
    Every rank holds all images; `add` gathers them. The fill level has a device and a host form, so reads need no synchronisation.

    Args:
      rng: where `deal` draws its order.
      capacity: most rows that are kept; a row beyond it is an error, or with `ring` overwrites the oldest.
      shape: (c, h, w) of an image.
      dtype: torch.uint8 or a floating type.
      tier: where the images live: on the device, or in host memory (pinned where there is a GPU), from where a batch is brought over
        beside the device's work. Columns are on the device in both.
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
        tier: Tier = "device",
        **columns: torch.dtype,
    ):
        c, h, w = shape
        self.rng, self.capacity, self.ring, self.quant = rng, capacity, ring, quant
        pinned = tier == "host" and rng.device.type == "cuda"
        place = rng.device if tier == "device" else torch.device("cpu")
        self.images = torch.zeros(capacity, h, w, c, dtype=dtype, device=place, pin_memory=pinned)
        self.columns = {k: torch.zeros(capacity, dtype=d, device=rng.device) for k, d in columns.items()}
        self.fill, self.written = 0, 0
        self.order = torch.zeros(0, dtype=torch.int64, device=rng.device)
        self.cursor = torch.zeros((), dtype=torch.int64, device=rng.device)

    @classmethod
    def of(cls, rng: Rng, images: Tensor, **columns: Tensor) -> Store:
        """A full store of images [N, H, W, C] that are there already, equal on all ranks; nothing is copied."""
        n, h, w, c = images.shape
        store = cls(rng, 0, (c, h, w), images.dtype)
        store.images, store.columns = images, dict(columns)
        store.capacity = store.fill = store.written = n
        return store

    def __len__(self) -> int:
        return self.fill

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
        return self.put(ranks.gather(self._encode(x)), **{k: ranks.gather(v) for k, v in columns.items()})

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
        self.images[at.to(self.images.device)] = images.to(self.images.device)
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

    def _encode(self, x: Tensor) -> Tensor:
        x = x.detach().permute(0, 2, 3, 1)
        if self.images.dtype == torch.uint8 and x.dtype != torch.uint8:
            x = x.clamp(0, 1) * 255
            x = x.floor() if self.quant == "floor" else x.round()
        return x.to(self.images.dtype).contiguous()

    def as_stored(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] as they would be read back if they were added: clamped and quantised in a uint8 store."""
        images = self._encode(x)
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

    def next(self, batch: int) -> Rows:
        """This rank's rows of the next `batch` of the dealt order (no host read; past its end the order begins again)."""
        own = ranks.rows(batch)
        at = self.cursor + torch.arange(own.start, own.stop, own.step, device=self.order.device)
        index = self.order[at % self.order.numel()]
        self.cursor += batch
        return self.rows(index)

    def rows(self, index: Tensor) -> Rows:
        """Rows by their numbers [b] int64, on the device; images in host memory begin to move there."""
        moving = self.images.device != index.device
        return Rows(self, index, stage(self.images, index) if moving else None)

    def read(self, index: Tensor) -> Tensor:
        """Images [b, C, H, W] at `index`, in [0, 1] for a uint8 store, as they are stored otherwise; torch's default dtype."""
        return self.rows(index).gather()

    def newest(self, n: int) -> Tensor:
        """Row numbers of the `n` newest images, newest last, int64."""
        n = min(n, self.fill)
        return (torch.arange(self.written - n, self.written, device=self.cursor.device)) % self.capacity

    @property
    def bytes(self) -> int:
        """Bytes held by images and columns."""
        return sum(t.numel() * t.element_size() for t in (self.images, *self.columns.values()))
