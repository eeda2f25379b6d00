"""DFAD: the generator maximises the mean absolute difference of teacher's and student's logits, the student minimises it, and there is
nothing else. variant=zju is the form in which later code bases compare it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastkd import losses
from fastkd.method import Count, Share, Step, Weight
from fastkd.methods._card import Card
from fastkd.methods._novel import Game, GeneratorName, Mode, Schedule, by_variant

CARD = Card(
    paper="Fang et al., Data-Free Adversarial Distillation (arXiv 1912.11006)",
    venue="arXiv",
    year=2019,
    basis="code",
    source="VainF/Data-Free-Adversarial-Distillation; variant=zju: zju-vipa/CMI",
    needs=(),
    terms=("adv", "gap"),
)


@dataclass
class DfadZju(Game):
    """Defaults: DFAD's rows in the zju benchmark tables [code]."""

    per_pixel: ClassVar[bool] = True

    variant: Literal["original", "zju"] = "zju"
    """original: five student steps, then a generator step; zju: the other way round, as benchmark tables have it"""
    adv_form: Literal["l1", "log_l1"] = "l1"
    """generator loss -D, or -log(D + 1), which is for dense prediction"""

    def gap(self, teacher: Tensor, student: Tensor) -> Tensor:
        return losses.l1_logit(teacher, student)

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        adversary = losses.adv_l1 if self.adv_form == "l1" else losses.adv_log_l1
        return {"adv": adversary(self.teacher(x).logits, self.opponent(x))}


@dataclass
class Dfad(DfadZju):
    """Defaults: ResNet-34 → ResNet-18 on CIFAR-10/100 [code]. Its recipes for MNIST and for Caltech-101 at 128 px say what differs there;
    segmentation is the recipe dfad-nyuv2. The images are normalised with the teacher's own constants."""

    variant: Literal["original", "zju"] = "original"
    epochs: Count = 500
    iterations: Count = 50
    generator_name: GeneratorName = "g_dfad_a"
    beta1_g: Share = 0.9
    weight_decay: Weight = 5e-4
    schedule: Schedule = "steps"
    schedule_g: Schedule = "steps"
    milestones: tuple[Count, ...] = (100, 200)
    sched_step: Literal["after", "before"] = "after"
    """learning rates move after an epoch, or, as released, before it, so that each is one epoch early"""
    student_mode_in_g: Mode = "train"

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.anneal, e + (self.sched_step == "before")
        for _ in range(self.iterations):
            for _ in range(self.s_steps):
                yield self.learn
            for _ in range(self.g_steps):
                yield self.generate


choose = by_variant(original=Dfad, zju=DfadZju)
