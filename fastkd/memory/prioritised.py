"""A store whose rows are drawn in proportion to a priority that is written back after use: prioritised replay."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkd import ranks
from fastkd.errors import unknown
from fastkd.memory.evict import RULES
from fastkd.memory.place import Sharing, Tier
from fastkd.memory.store import Quant, Rows, Store
from fastkd.ops import philox_uniform, replay_sample, replay_sums, replay_update
from fastkd.rng import Rng

Rule = Literal["frequent", "lowest", "fifo"]
Duplicates = Literal["last", "max", "mean"]


class Drawn(NamedTuple):
    """This rank's rows of a drawn batch: the rows for `Method.view`, their numbers [b] int64, their probabilities [b]."""

    rows: Rows
    i: Tensor
    p: Tensor


class Prioritised(Store):
    """A store with a priority a row. Row i is drawn with probability P_i = q_i / sum(q), where q_i = (|priority_i| + eps)^alpha.

    Priorities are equal on all ranks, and so are the draws, without communication; each rank keeps its own rows of a batch. When it
    is full, new rows replace those that `leaving` names. All of its tensors are state: nothing else is saved. A loop of one's own:

        for n in range(steps):
            rng.at(seed, 0, "learn", n)                       # draws depend on this key alone: a resumed loop goes on exactly
            rows, i, p = store.draw(256)
            weight = (len(store) * p) ** -beta                # importance weights are the caller's
            loss = …                                          # rows.gather(dy=…, dx=…, flip=…, mean=…, std=…) are the images
            store.write(i, loss.detach())

    Args:
      rng, capacity, shape, dtype, quant, images, tier, columns: as in `Store`.
      classes: number of classes, if the column `label` is to be counted (`share`, and the rule "frequent").
      rule: who leaves a full store: "frequent", the lowest priority of what is then the most frequent class; "lowest" priority; "fifo".
      alpha: exponent of the priority. eps: keeps a row with priority 0 drawable.
    Raises:
      ValueError: an unknown rule, or one that counts classes without `classes` and a column `label`.
    """

    def __init__(
        self,
        rng: Rng,
        capacity: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.uint8,
        *,
        classes: int = 0,
        rule: Rule = "frequent",
        alpha: float = 1.0,
        eps: float = 1e-6,
        quant: Quant = "floor",
        images: Sharing | None = None,
        tier: Tier | None = None,
        **columns: torch.dtype,
    ):
        if rule not in RULES:
            raise ValueError(unknown("rule", rule, RULES))
        if (classes or rule == "frequent") and (not classes or "label" not in columns):
            raise ValueError(f"rule '{rule}' with {classes} classes: counting needs the number of classes and a column 'label'")
        super().__init__(rng, capacity, shape, dtype, quant=quant, images=images, tier=tier, **columns)  # type: ignore[arg-type]
        self.rule, self.alpha, self.eps = rule, alpha, eps
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.leaves = torch.zeros(capacity, dtype=wide, device=rng.device)
        self.sums = replay_sums(self.leaves)
        self.born = torch.zeros(capacity, dtype=torch.int64, device=rng.device)
        self.hist = torch.zeros(classes, dtype=torch.int64, device=rng.device)
        self.stored = torch.zeros((), dtype=torch.int64, device=rng.device)  # the fill, for steps that a graph replays
        self.refused = torch.zeros((), dtype=torch.int64, device=rng.device)

    def add(self, x: Tensor, priority: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Insert this rank's rows of a batch; a full store gives up as many rows as do not fit.

        Args:
          x: [b, C, H, W] as in `Store.add`.
          priority: [b], or None: the highest that is stored (1 in an empty store), so that new rows are drawn soon.
          columns: one [b] tensor for each of the store's columns.
        Returns:
          [b·W] int64, the rows that the global batch took.
        Raises:
          ValueError: more rows than the store holds, or columns that do not fit.
        """
        priority = None if priority is None else ranks.gather(priority.detach())
        return self.put(ranks.gather(self.encode(x)), priority, **{k: ranks.gather(v) for k, v in columns.items()})

    def put(self, images: Tensor, priority: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Insert rows that every rank holds: images [n, H, W, C] as in `Store.put`, `priority` [n] or None as in `add`."""
        if priority is not None and priority.shape != (len(images),):
            raise ValueError(f"priority must be of shape ({len(images)},), found {tuple(priority.shape)}")
        at = super().put(images, **columns)
        self._count(at, 1)
        self.stored.fill_(self.fill)
        self.born[at] = torch.arange(self.written - len(at), self.written, device=at.device)
        if priority is None:
            top = self.leaves.amax()
            self._write(at, torch.where(top > 0, top, torch.ones_like(top)).expand(len(at)))
        else:
            self._write(at, self._leaf(priority))
        return at

    def _slots(self, n: int) -> Tensor:
        if n > self.capacity:
            raise ValueError(f"the store holds {self.capacity} images; {n} at once do not fit")
        over = max(0, self.fill + n - self.capacity)
        free = torch.arange(self.fill, self.fill + n - over, device=self.born.device)
        if not over:
            return free
        leaving = self.leaving(over)
        self._count(leaving, -1)
        return torch.cat((free, leaving))

    def leaving(self, n: int) -> Tensor:
        """The `n` stored rows that are given up next, int64 [n], by `rule`; override it for a rule of one's own (`memory.evict`)."""
        label = self.columns.get("label", self.born)
        leaves, label, born = (v[: self.fill] for v in (self.leaves, label, self.born))
        return RULES[self.rule](leaves, label, born, n)

    def _count(self, at: Tensor, sign: int) -> None:
        if len(self.hist):
            self.hist.index_add_(0, self.columns["label"][at].to(torch.int64), torch.full_like(at, sign))

    def _leaf(self, priority: Tensor) -> Tensor:
        return (priority.to(self.leaves.dtype).abs() + self.eps) ** self.alpha

    def _write(self, at: Tensor, leaf: Tensor, duplicates: Duplicates = "last") -> None:
        self.refused += replay_update(self.leaves, self.sums, at, leaf, duplicates=duplicates)

    def draw(self, batch: int, name: str = "draw", *, uniform: bool = False) -> Drawn:
        """This rank's rows of a batch drawn with replacement (no host read; rows that are elsewhere are on their way when it returns).

        They are not brought over ahead of the draw: the next batch depends on the priorities that are written after this one.

        Args:
          batch: rows of the global batch. name: stream of the draws.
          uniform: every stored row is as likely, whatever its priority: the rows that equal priorities would give.
        Raises:
          ValueError: nothing is stored yet. ConfigError: a batch that cannot be dealt to the ranks.
        """
        if not self.fill:
            raise ValueError("nothing is stored yet, so no batch can be drawn")
        ranks.rows(batch)
        key = self.rng.counter(name)
        if uniform:
            index = (philox_uniform(key, batch) * self.stored).to(torch.int64)
            probability = (1 / self.stored.to(torch.float64)).to(self.leaves.dtype).expand(batch)
        else:
            index, probability, _ = replay_sample(self.leaves, self.sums, key=key, n=batch)
        key[1] += batch
        own = ranks.local(index)
        return Drawn(Rows(self, own, self.fetch(own, index)), own, ranks.local(probability))

    def write(self, index: Tensor, priority: Tensor, *, duplicates: Duplicates = "last", **columns: Tensor) -> None:
        """Write this rank's new priorities back; the same happens on all ranks.

        Args:
          index: [b] row numbers of `draw`. priority: [b]; its sign is dropped.
          duplicates: what a row that was drawn more than once gets: the "last" value, the largest ("max"), or the "mean" (of q).
          columns: [b] new values of these columns; they must agree where a row was drawn more than once.
        Raises:
          ValueError: on the CPU, a priority that is not finite. On a GPU it is left out and counted in `refused`.
        """
        index = ranks.gather(index)
        self._write(index, self._leaf(ranks.gather(priority.detach())), duplicates)
        for name, value in columns.items():
            self.columns[name][index] = ranks.gather(value.detach()).to(self.columns[name].dtype)

    def set_alpha(self, alpha: float) -> None:
        """Change the exponent of the priorities; stored ones are transformed. Both exponents must be positive."""
        if not (alpha > 0 and self.alpha > 0):
            raise ValueError(f"alpha goes from {self.alpha} to {alpha}; both must be positive")
        leaves = self.leaves ** (alpha / self.alpha)
        self.sums.copy_(replay_sums(leaves))  # on the CPU refuses what is too large, before anything is changed
        self.leaves.copy_(leaves)
        self.alpha = alpha

    def share(self) -> Tensor:
        """[classes] the share of each class among the stored images, in torch's default dtype; zeros in an empty store."""
        return self.hist / self.stored.clamp_min(1)

    def probabilities(self) -> Tensor:
        """[capacity] the probability of each row, 0 where nothing is stored."""
        return self.leaves / self.sums[0, -1].to(self.leaves.dtype)

    def least(self) -> Tensor:
        """[] the smallest probability of a stored row: importance weights divided by that row's are at most 1."""
        return (self.sums[1, -1] / self.sums[0, -1]).to(self.leaves.dtype)

    def newest(self, n: int) -> Tensor:
        return self.born[: self.fill].argsort()[max(0, self.fill - n) :]
