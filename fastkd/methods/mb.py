"""MB-DFKD: the student rehearses a ring of old synthetic batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastkd.errors import ConfigError
from fastkd.memory import Rows, Store
from fastkd.method import Count, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._prior import Prior, Replayed
from fastkd.nn import Trace
from fastkd.ops import bn_match_loss
from fastkd.rng import FAR

CARD = Card(
    paper="Binici et al., Preventing Catastrophic Forgetting and Distribution Mismatch in Knowledge Distillation via Synthetic Data",
    venue="WACV",
    year=2022,
    basis="re-implementation",
    source="gaurav104/LRA; whether the paper matches BatchNorm statistics is open (match)",
    needs=(),
    terms=("oh", "ie", "act", "dis", "bn", "gap"),
    also="act: a teacher that ends in a linear layer; match=prior+bn: a teacher with BatchNorm",
)


@dataclass
class Mb(Prior):
    """Defaults: ResNet-34 → ResNet-18 on CIFAR-10/100 [re-implementation]. A replay batch is read at once: in host memory
    (memory.tier) every student step would wait for it."""

    match: Literal["prior", "prior+bn"] = "prior"
    """what holds the generator near the real data: the teacher's priors, or also its BatchNorm statistics"""
    lambda_bn: Weight = 0.1
    """weight of the BatchNorm term with match=prior+bn; .1 and 1 are in use"""
    bn_form: Literal["l2", "gauss_kl"] = "l2"
    """distance of the statistics: norms per layer, or the Gaussian Kullback-Leibler divergence"""
    bank_slots: Annotated[int, Field(ge=0)] = 10
    """slots of the ring; 0: no bank"""
    bank_batch: Replayed = None
    """images of a slot and of a replay batch, over all ranks; none: an eighth of batch"""
    push_period: Count = 5
    """epochs between pushes: after epochs 0, 5, 10 and so on"""
    read: Literal["slot", "images"] = "slot"
    """a replay batch is one slot, or drawn from all stored images"""
    bank_dtype: Literal["fp16", "fp32"] = "fp16"
    """how images are stored"""

    def check(self) -> None:
        super().check()
        if self.match == "prior+bn" and self.teacher.split == (0,):
            raise ConfigError("match=prior+bn needs a teacher with BatchNorm, and this one has none; use --set method.match=prior.")
        if self.bank_slots and self.slot > self.batch:
            raise ConfigError(
                f"a slot of the bank has {self.slot} images of a batch of {self.batch}; expected at most as many as the batch has "
                f"(nearest: method.bank_batch={self.batch})."
            )

    def build(self) -> None:
        super().build()
        dtype = torch.float16 if self.bank_dtype == "fp16" else torch.float32
        self.bank = Store(self.rng, self.bank_slots * self.slot, self.shape, dtype, ring=True)
        self.filled = torch.zeros((), dtype=torch.int64, device=self.device)  # stored images, where a step can see them
        self.within = self.buffer(self.slot, dtype=torch.int64)
        self.within.copy_(self.rows(self.slot))

    @property
    def slot(self) -> int:
        return self.or_eighth(self.bank_batch)

    @property
    def replayed(self) -> int:
        return self.slot if self.bank_slots else 0

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.anneal, e
        for _ in range(self.iterations):
            for _ in range(self.g_steps):
                yield self.generate
            for _ in range(self.s_steps):
                yield self.learn, e > 0 and self.replayed > 0
        if e % self.push_period == 0 and self.replayed > 0:
            yield self.remember

    def asks(self) -> tuple[str, ...]:
        return ("bn",) if self.match == "prior+bn" and self.lambda_bn else ()

    def more_terms(self, x: Tensor, t: Trace) -> dict[str, Tensor]:
        if t.bn is None:
            return {}
        return {"bn": self.lambda_bn * bn_match_loss(t.bn, self.teacher.target, self.teacher.split, kind=self.bn_form)}

    @step("distillation")
    def learn(self, rehearse: bool) -> None:
        self.update(self.fresh(), self.recall() if rehearse else None)

    def recall(self) -> Tensor:
        """A replay batch [m, C, H, W]: one slot, uniform over those that are filled, or as many images of the whole bank."""
        if self.read == "slot":
            index = self.rng.pick(FAR, name="slot") % (self.filled // self.slot) * self.slot + self.within
        else:
            index = self.rng.integers(FAR, self.slot, name="slot") % self.filled
        return self.view(Rows(self.bank, index))

    @step("memory", eager=True)
    def remember(self) -> None:
        self.bank.add(self.first(self.x, self.slot))
        self.filled.fill_(len(self.bank))

    def report(self) -> dict[str, float]:
        return {"images": float(len(self.bank)), "replay_bytes": float(self.bank.bytes)}
