"""NAYER: a generator fed with label-text embeddings through a noisy layer that is drawn anew every loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastkd.errors import ConfigError
from fastkd.memory import Store
from fastkd.method import Count, Rate, Step, step
from fastkd.methods._card import Card
from fastkd.methods._pool import PoolMethod
from fastkd.rng import derive

CARD = Card(
    paper="Tran et al., NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge Distillation",
    venue="CVPR",
    year=2024,
    basis="code",
    source="tmtuan1307/nayer; its ImageNet path is a debug state, so labels and sizes there are ours",
    needs=("bn", "embeddings"),
    terms=("bn", "oh", "adv", "kl"),
)


@dataclass
class Nayer(PoolMethod):
    """Defaults: NAYER-100 on CIFAR-10 [code]."""

    needs: ClassVar[frozenset[str]] = frozenset(CARD.needs)

    epochs: Count = 120
    batch: Count = 400
    kd_batch: Count = 512
    g_steps: Count = 30
    """generator steps a loop"""
    g_loops: Count = 2
    """loops an epoch after warm-up"""
    gwp_loops: Count = 10
    """loops an epoch during warm-up"""
    g_life: Count = 10
    """epochs after which the generator is re-created"""
    lr_g: Rate = 4e-3
    """generator learning rate; a fresh Adam every loop"""
    hidden: Count = 1000
    """outputs of a noisy linear layer"""
    redraw_noise: bool = True
    """noisy layers are drawn anew every loop; false: drawn once a generator and trained on (the paper's ablation)"""

    def check(self) -> None:
        if self.embeddings is None:
            raise ConfigError(
                "label-text embeddings are missing; expected a table with one row a class (--set embeddings.source=random makes one)."
            )

    def sizes(self) -> tuple[int, ...]:
        """Resolutions at which images are made."""
        return (self.shape[-1],)

    def loops(self, e: int) -> list[int]:
        """The resolution of each synthesis loop of epoch e."""
        return [self.shape[-1]] * (self.gwp_loops if e < self.warmup else self.g_loops)

    def build(self) -> None:
        self.build_student()
        made = [size for e in range(self.epochs) for size in self.loops(e)]
        self.G, self.opt_g, self.at = {}, {}, {}
        for size in self.sizes():
            self.G[size] = self.generator(
                "g_nl" if size <= 64 else "g_nl_deep",
                self.hidden,
                (self.shape[0], size, size),
                embeddings=self.embeddings,
                batch=self.batch,
            )
            self.opt_g[size] = self.adam(self.G[size].parameters(), lr=self.lr_g, betas=(0.5, 0.999))
            self.at[size] = self.call(size, made.count(size) * self.batch)
        self.pool = self.at[self.sizes()[0]].pool

    def stores(self) -> list[Store]:
        return [c.pool for c in self.at.values()]

    def epoch(self, e: int) -> Iterator[Step]:
        if e % self.g_life == 0 or (e - self.warmup) % self.g_life == 0:
            yield self.recreate
        done = sum(len(self.loops(before)) for before in range(e))
        for k, size in enumerate(self.loops(e), done):
            yield self.redraw, size, k
            for _ in range(self.g_steps):
                yield self.invert, size, e >= self.warmup
            yield self.remember, size
        yield from self.student_epoch(e)

    @step("synthesis", eager=True)
    def recreate(self) -> None:
        for net in self.G.values():
            net.reinit()
            if not self.redraw_noise:  # else every loop does
                net.redraw(self.rng.whole("noisy"))

    @step("synthesis", eager=True)
    def redraw(self, size: int, k: int) -> None:
        if self.redraw_noise:
            self.G[size].redraw(self.rng.whole("noisy"))
        self.at[size].y.copy_(self.balanced(k))
        self.reset(self.opt_g[size])
        self.at[size].best.reset()

    def balanced(self, k: int) -> Tensor:
        """Labels of loop k, this rank's rows: floor(B / C) copies of 0 … C - 1, then random ones at the end. A batch smaller than C is
        the next slice of shuffled class lists, so that consecutive loops make every class equally often."""
        rows = self.rows(self.batch)
        if self.batch < self.classes:
            first, last = k * self.batch // self.classes, (k * self.batch + self.batch - 1) // self.classes
            lists = torch.cat([self.shuffled(p) for p in range(first, last + 1)])
            return lists.to(self.device)[rows + (k * self.batch - first * self.classes)]
        whole = self.batch // self.classes * self.classes
        return torch.where(rows < whole, rows % self.classes, self.rng.labels(self.batch, self.classes))

    def shuffled(self, p: int) -> Tensor:
        """The p-th shuffled list of all classes, equal on all ranks."""
        return torch.randperm(self.classes, generator=torch.Generator().manual_seed(derive(self.seed, "classes", p)))

    @step("synthesis")
    def invert(self, size: int, adversary: bool) -> None:
        x = self.G[size](self.at[size].y)
        terms = self.inversion_terms(self.view(x, self.aug_at(size)), self.at[size], adversary)
        if len(self.at) > 1:  # values of different resolutions say nothing about each other
            self.tell(**{f"{name}_{size}": value for name, value in terms.items()})
        total = self.minimise(terms, self.opt_g[size])
        self.offer(self.at[size], total, x)

    def aug_at(self, size: int) -> str:
        return self.aug

    @step("memory", eager=True)
    def remember(self, size: int) -> None:
        self.keep(self.at[size])
