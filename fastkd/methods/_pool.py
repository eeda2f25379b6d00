"""What the methods that fill a pool by inversion share: pool, BN-statistic matching, one-hot and adversarial terms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd import losses
from fastkd.memory import Best, Store
from fastkd.memory.store import Quant
from fastkd.method import Share, Weight
from fastkd.methods._student import StudentPhase
from fastkd.nn import BnEma, Trace

DROWNS = 1e5
"""`bn` over `oh`, times the norms of a teacher's statistics, from which the class hardly counts. The published weights and a CIFAR
ResNet-20 come to 8e3; with 4e5 (EfficientNet-Lite0 and the same weights) next to no image was named as meant, with 400 a fifth:
docs/methods.md."""
FITS = 400.0


def statistics_norm(teacher: Any) -> float:
    """Σ_l ‖running mean‖ + ‖running variance‖ over the BN layers: how large the BN-statistics term of images can be that match nothing."""
    return sum(float(part.norm()) for row in teacher.target for part in row.split([b - a for a, b in pairwise(teacher.split)]))


class Call:
    """What one generator keeps between the steps of a synthesis call: labels, best batch, BN averages, and its pool.

    `image` and `y` are this rank's rows of the batch; `image_y` are the labels that the kept images were made for.
    """

    def __init__(self, y: Tensor, image: Tensor, ema: BnEma, pool: Store):
        self.y, self.image, self.ema, self.pool = y, image, ema, pool
        self.image_y = y.clone()
        self.image_y.per_sample = True  # type: ignore[attr-defined]
        self.best = Best(x=image, y=self.image_y)


@dataclass
class PoolMethod(StudentPhase):
    """Inversion into an append-only pool of 8-bit images, then distillation on it."""

    oh: Weight = 0.5
    """weight of the one-hot loss CE(t, y)"""
    bn: Weight = 10.0
    """weight of the BN-statistics loss"""
    adv: Weight = 1.33
    """weight of the adversarial loss"""
    bn_mmt: Share = 0.9
    """momentum of the BN statistics over calls; 0: plain loss"""
    pool_select: Literal["best", "last"] = "best"
    """which iterate of a call is stored"""
    pool_quant: Quant = "floor"
    """how [0, 1] becomes 8 bits; none: stored as fp16"""

    def notes(self) -> list[str]:
        norm = statistics_norm(self.teacher) if self.bn and self.oh else 0.0
        if self.bn * norm <= DROWNS * self.oh:
            return super().notes()
        fits = FITS * self.oh / norm
        said = f"the norms of this teacher's BN statistics sum to {norm:,.0f}: with bn = {self.bn:g} their term drowns that of the class"
        return [*super().notes(), f"{said}; method.bn={fits:.2g} keeps both in sight"]

    def call(self, size: int, capacity: int) -> Call:
        """State of a generator of `size` × `size` images whose pool holds `capacity` of them."""
        c = self.shape[0]
        pool = self.new_pool(
            capacity, (c, size, size), torch.uint8 if self.pool_quant != "none" else torch.float16, quant=self.pool_quant, label=torch.int16
        )
        pool.reserve(self.kd_steps * self.kd_batch)
        y = self.buffer(self.batch, dtype=torch.int64)
        return Call(y, self.buffer(self.batch, c, size, size), self.place(BnEma(self.teacher.target.shape[1], self.bn_mmt)), pool)

    def new_pool(self, capacity: int, shape: tuple[int, int, int], dtype: torch.dtype, **kw: Any) -> Store:
        """An empty store of images; `kw` as in `Store`."""
        return Store(self.rng, capacity, shape, dtype, **kw)

    def inversion_terms(self, x: Tensor, call: Call, adversary: bool) -> dict[str, Tensor]:
        """L_G of a batch as the networks see it; `adversary`: the student takes part."""
        t = self.teacher(x, *self.asks())
        terms = {
            "bn": self.bn * call.ema.loss(t.bn, self.teacher.target, self.teacher.split),
            "oh": self.oh * self.one_hot(t, call),
        }
        s = None
        if adversary:
            with self.evaluating(self.student):
                s = self.student.trace(x)
            terms["adv"] = self.adv * self.adversarial(t, s)
        self.tell(agree=(t.logits.argmax(1) == self.wanted(t, call)).to(t.logits.dtype).mean())
        return terms | self.more_terms(x, t, s, call)

    def one_hot(self, t: Trace, call: Call) -> Tensor:
        """The loss of the classes that are wanted."""
        return losses.cross_entropy(t.logits, self.wanted(t, call))

    def adversarial(self, t: Trace, s: Trace) -> Tensor:
        """Low where the student disagrees with the teacher."""
        return losses.adv_masked_kl(t.logits, s.logits)

    def wanted(self, t: Trace, call: Call) -> Tensor:
        """The classes that the one-hot loss asks for: those that were drawn for the call."""
        return call.y

    def asks(self) -> tuple[str, ...]:
        """What the teacher is asked for beside logits, feature and map."""
        return ("bn",)

    def more_terms(self, x: Tensor, t: Trace, s: Trace | None, call: Call) -> dict[str, Tensor]:
        """Terms that a method adds to L_G; `s` is None while the adversary is off."""
        return {}

    def offer(self, call: Call, total: Tensor, x: Tensor) -> None:
        """Keep x, un-augmented, if its total is the lowest of the call: recorded before the update, judged on this step's view."""
        call.best.offer(total, always=self.pool_select == "last", x=x, y=call.y)

    def keep(self, call: Call) -> None:
        """End of a call: move the BN averages once, append the kept batch."""
        call.ema.update()
        call.pool.add(call.image, label=call.image_y)
