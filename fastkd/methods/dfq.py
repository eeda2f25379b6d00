"""DFQ: an adversarial generator held near the training data by BatchNorm statistics and entropies. variant=zju is the form in which the
tables of CMI and FastDFKD list it, variant=original that of a re-implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastkd import losses
from fastkd.method import Count, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._novel import Game, GeneratorName, Mode, Schedule, by_variant
from fastkd.ops import bn_match_loss

CARD = Card(
    paper="Choi et al., Data-Free Network Quantization With Adversarial Knowledge Distillation",
    venue="CVPR Workshops",
    year=2020,
    basis="re-implementation",
    source="variant=zju: zju-vipa/CMI and zju-vipa/Fast-Datafree; original: a repository of da2so named after the paper",
    needs=("bn",),
    terms=(
        "bn",
        "oh",
        "balance",
        "adv",
        "h_inst: generator: a confident teacher (original)",
        "h_batch: generator: all classes equally frequent (original)",
        "gap",
    ),
)

Variant = Literal["zju", "original"]


@dataclass
class Dfq(Game):
    """Defaults: DFQ's rows in the tables of FastDFKD [code]; one of their scripts has lr=0.05."""

    needs: ClassVar[frozenset[str]] = frozenset(CARD.needs)

    variant: Variant = "zju"
    """zju: as in the benchmark tables; original: the paper's regulariser and warm-up, with its other defaults"""
    iterations: Count = 40
    s_steps: Count = 10
    bn: Weight = 1.0
    """weight of the BN-statistics loss"""
    oh: Weight = 1.0
    """weight of the one-hot loss CE(t, argmax t)"""
    balance: Weight = 20.0
    """weight of the class balance"""
    adv: Weight = 1.0
    """weight of the adversarial loss"""

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        t = self.teacher(x, "bn")
        return {
            "bn": self.bn * bn_match_loss(t.bn, self.teacher.target, self.teacher.split),
            "oh": self.oh * losses.pseudo_label(t.logits),
            "balance": self.balance * losses.balance_ln(t.logits),
            "adv": self.adv * losses.adv_kl(t.logits, self.opponent(x)),
        }


@dataclass
class DfqOriginal(Game):
    """Defaults: the re-implementation's, but the student's weight decay is 1e-4 (there: 0)."""

    needs: ClassVar[frozenset[str]] = frozenset(CARD.needs)

    variant: Variant = "original"
    """zju: as in the benchmark tables; original: the paper's regulariser and warm-up, with its other defaults"""
    epochs: Count = 250
    """all epochs, warm-up included"""
    warmup: Annotated[int, Field(ge=0)] = 50
    """first epochs, in which the generator learns without adversary and the student rests"""
    cosine_in_warmup: bool = False
    """the generator's cosine begins with the warm-up, as in the re-implementation: it reaches 0 before the end and rises again"""
    iterations: Count = 400
    s_steps: Count = 10
    generator_name: GeneratorName = "g_dfq"
    nz: Count = 512
    optimiser: Literal["sgd", "nesterov", "adam"] = "nesterov"
    schedule_g: Schedule = "cosine"
    gen_mode_in_kd: Mode = "eval"
    alpha: Weight = 0.01
    """weight of the regulariser"""
    alpha_schedule: Literal["constant", "linear"] = "constant"
    """linear: falls to 0 over the epochs after warm-up"""
    eps_dn: Annotated[float, Field(ge=1e-8)] = 1e-8
    """least variance in the Gaussian KL of the BN statistics"""

    def build(self) -> None:
        super().build()
        self.weight = torch.tensor(self.alpha, device=self.device)

    def trains_student(self, e: int) -> bool:
        return e >= self.warmup

    def period(self) -> int:
        return self.epochs - self.warmup

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.anneal, e
        for _ in range(self.iterations):
            for _ in range(self.g_steps):
                yield self.generate, self.trains_student(e)
            for _ in range(self.s_steps if self.trains_student(e) else 0):
                yield self.learn

    @step("distillation", eager=True)
    def anneal(self, k: int) -> None:
        after = max(0, k - self.warmup)
        self.set_lr(self.opt_s, self.lr * self.factor(self.schedule, after))
        self.set_lr(self.opt_g, self.lr_g * self.factor(self.schedule_g, k if self.cosine_in_warmup else after))
        self.weight.fill_(self.alpha * (1 - after / self.period() if self.alpha_schedule == "linear" else 1.0))

    @step("synthesis")
    def generate(self, adversary: bool = True) -> None:
        self.minimise(self.generator_terms(self.view(self.G(self.latents())), adversary), self.opt_g)

    def generator_terms(self, x: Tensor, adversary: bool = True) -> dict[str, Tensor]:
        t = self.teacher(x, "bn")
        found, wanted = (torch.stack([mean, var.clamp_min(self.eps_dn)]) for mean, var in (t.bn, self.teacher.target))
        terms = {
            "bn": self.weight * bn_match_loss(found, wanted, self.teacher.split, kind="gauss_kl"),
            "h_inst": self.weight * losses.h_inst(t.logits),
            "h_batch": self.weight * losses.balance_ln(t.logits),
        }
        if adversary:
            terms["adv"] = losses.adv_kl(t.logits, self.opponent(x))
        return terms


choose = by_variant(zju=Dfq, original=DfqOriginal)
