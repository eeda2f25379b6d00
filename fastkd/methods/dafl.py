"""DAFL: the teacher's responses train a generator, and generator and student learn in one joint step. variant=zju is the form in which the
tables of CMI and FastDFKD list it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Count, Rate, Share, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._novel import GeneratorName, Novel, Rounds, Schedule, by_variant
from fastkd.nn import Trace

CARD = Card(
    paper="Chen et al., Data-Free Learning of Student Networks",
    venue="ICCV",
    year=2019,
    basis="code",
    source="huawei-noah/Data-Efficient-Model-Compression; variant=zju: zju-vipa/CMI and zju-vipa/Fast-Datafree",
    needs=(),
    terms=("oh", "ie", "a: generator: strong features of the teacher", "gap"),
    also="a: a teacher that ends in a linear layer",
)

Variant = Literal["original", "zju"]


@dataclass
class Responses(Novel):
    """What a generator step asks of the teacher: confident, class-balanced, strong responses."""

    variant: Variant = "original"
    """original: joint steps; zju: rounds of one generator and five student steps, with the other defaults of the benchmark tables"""
    oh: Weight = 0.05
    """weight of the one-hot loss CE(t, argmax t)"""
    ie: Weight = 5.0
    """weight of the class balance"""
    a: Weight = 0.01
    """weight of the activation loss"""
    entropy_log: Literal["log10", "ln"] = "log10"
    """logarithm of the class balance; with ln it weighs 2.3 times as much"""

    def check(self) -> None:
        super().check()
        if self.a and self.teacher(self.blank()).feature is None:
            raise ConfigError(
                "the activation loss needs a teacher that ends in a linear layer, and none was found in this one; use --set method.a=0."
            )

    def response_terms(self, t: Trace) -> dict[str, Tensor]:
        balance = losses.balance_log10 if self.entropy_log == "log10" else losses.balance_ln
        terms = {"oh": self.oh * losses.pseudo_label(t.logits), "ie": self.ie * balance(t.logits)}
        if self.a:
            assert t.feature is not None  # `check` refused what has none
            terms["a"] = self.a * losses.act(t.feature)
        return terms


@dataclass
class Dafl(Responses):
    """Defaults: ResNet-34 → ResNet-18 on CIFAR-10 [code]. CIFAR-100: oh=0.5, ie=20, a=0.1; MNIST: epochs=200, batch=512, nz=100, lr_g=0.2,
    optimiser=adam, lr=2e-3, schedule=constant, oh=1, a=0.1. The images are normalised with the teacher's own constants. Known to be
    unstable over seeds and small batches."""

    epochs: Count = 2000
    iterations: Count = 120
    """joint steps an epoch"""
    batch: Count = 1024
    generator_name: GeneratorName = "g_dafl"
    bn_eps: Rate = 0.8
    """epsilon of the two inner BatchNorms of g_dafl: 0.8 as published, probably a momentum in its place; clean: 1e-5"""
    nz: Count = 1000
    lr_g: Rate = 0.02
    beta1_g: Share = 0.9
    weight_decay: Weight = 5e-4
    schedule: Schedule = "steps"
    milestones: tuple[Count, ...] = (800, 1600)

    def generator_options(self) -> dict[str, Any]:
        return {"eps": self.bn_eps} if self.generator_name == "g_dafl" else {}

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.anneal, e
        for _ in range(self.iterations):
            yield self.joint

    @step("distillation")
    def joint(self) -> None:
        """One update of both: the generator by the teacher's responses, the student by the same logits on the detached images."""
        x = self.view(self.G(self.latents()))
        t = self.teacher(x)
        gap = self.gap(t.logits.detach(), self.student(x.detach()))
        self.minimise({**self.response_terms(t), "gap": gap}, self.opt_g, self.opt_s)


@dataclass
class DaflZju(Responses, Rounds):
    """Defaults: DAFL's rows in the tables of FastDFKD [code]."""

    variant: Variant = "zju"
    nz: Count = 512
    oh: Weight = 1.0
    ie: Weight = 20.0
    a: Weight = 1e-3
    entropy_log: Literal["log10", "ln"] = "ln"

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        return self.response_terms(self.teacher(x))


choose = by_variant(original=Dafl, zju=DaflZju)
