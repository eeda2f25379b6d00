"""ZSKT: the generator looks for images on which the student disagrees with the teacher; the student matches beliefs and attention maps on
them. variant=zju is the form in which the tables of CMI and FastDFKD list it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Count, Phase, Rate, Share, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._novel import Game, GeneratorName, Mode, Schedule, by_variant
from fastkd.nn import Trace

CARD = Card(
    paper="Micaelli & Storkey, Zero-shot Knowledge Transfer via Adversarial Belief Matching",
    venue="NeurIPS",
    year=2019,
    basis="code",
    source="polo5/ZeroShotKnowledgeTransfer, with switches for the paper's and the replication's form; variant=zju: zju-vipa/CMI",
    needs=(),
    terms=("adv", "gap", "at"),
    also="beta: teacher and student whose stages end in maps of the same sizes",
)


@dataclass
class ZsktZju(Game):
    """Defaults: ZSKT's rows in the tables of FastDFKD [code]: no attention, no clipping, SGD."""

    variant: Literal["original", "zju"] = "zju"
    """original: one latent batch for the student steps of a round, attention transfer; zju: as in the benchmark tables"""
    adv: Weight = 1.0
    """weight of the adversarial loss"""

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        return {"adv": self.adv * losses.adv_kl(self.teacher(x).logits, self.opponent(x))}


@dataclass
class Zskt(Game):
    """Defaults: WideResNets on CIFAR-10 [code]; an epoch is 1 % of the run. SVHN: iterations=500. The images are normalised with the
    teacher's own constants."""

    variant: Literal["original", "zju"] = "original"
    """original: one latent batch for the student steps of a round, attention transfer; zju: as in the benchmark tables"""
    epochs: Count = 100
    iterations: Count = 800
    s_steps: Count = 10
    batch: Count = 128
    generator_name: GeneratorName = "g_zskt"
    nz: Count = 100
    beta1_g: Share = 0.9
    schedule_g: Schedule = "cosine"
    lr: Rate = 2e-3
    optimiser: Literal["sgd", "nesterov", "adam"] = "adam"
    student_mode_in_g: Mode = "train"
    grad_clip: Weight = 5.0
    """largest norm of all gradients of a step; 0: not clipped"""
    beta: Weight = 250.0
    """weight of attention transfer"""
    tau: Rate = 1.0
    """temperature of the divergence, which is not scaled by its square"""
    kl_reduction: Literal["elem", "batchmean"] = "elem"
    """the divergence's mean over batch and classes, or over the batch; the weight of attention then grows by the number of classes too"""
    at_form: Literal["squares", "norms"] = "squares"
    """difference of attention maps: mean square (code) or length (paper)"""
    s_batch: Literal["same_z", "fresh", "before_g"] = "same_z"
    """images of the student steps: the round's latents through the updated generator (code), new latents for each (replication), or
    the round's latents before the update (paper)"""

    def check(self) -> None:
        super().check()
        if self.beta:
            with torch.no_grad(), self.evaluating(self.student):
                x = self.blank()
                sizes = [[tuple(m.shape[2:]) for m in stages(t)] for t in (self.teacher(x, "groups"), self.student.trace(x, "groups"))]
            if sizes[0] != sizes[1] or not sizes[0]:
                found = [", ".join(f"{h} x {w}" for h, w in s) or "none" for s in sizes]
                raise ConfigError(
                    "attention transfer needs teacher and student whose stages end in maps of the same sizes, "
                    f"found {found[0]} and {found[1]}; use --set method.beta=0."
                )

    def build(self) -> None:
        super().build()
        n = self.student_batch()
        self.z = self.buffer(self.batch, self.nz)
        self.x, self.answers = self.buffer(n, *self.shape), self.buffer(n, self.classes)
        with torch.no_grad():
            maps = stages(self.teacher(self.x[:1], *self.asks()))
        self.attentions = [self.buffer(n, m[0, 0].numel()) for m in maps]

    def student_batch(self) -> int:
        """Images of a student step."""
        return self.batch

    def images_of(self, phase: Phase) -> int:
        return self.student_batch() if phase == "distillation" else self.batch

    def asks(self) -> tuple[str, ...]:
        return ("groups",) if self.beta else ()

    def period(self) -> int:
        return self.epochs * self.iterations

    def epoch(self, e: int) -> Iterator[Step]:
        for i in range(e * self.iterations, (e + 1) * self.iterations):
            yield self.anneal, i
            yield self.draw
            if self.s_batch == "before_g":
                yield self.answer
            for _ in range(self.g_steps):
                yield self.generate
            for n in range(self.s_steps):
                if self.s_batch == "fresh":
                    yield self.draw
                if self.s_batch == "fresh" or (self.s_batch == "same_z" and n == 0):
                    yield self.answer
                yield self.learn

    def factor(self, schedule: Schedule, k: int) -> float:
        return super().factor(schedule, k // self.iterations if schedule == "steps" else k)

    @step("synthesis")
    def draw(self) -> None:
        self.z.copy_(self.rng.normal(self.batch, self.nz))

    def latents(self) -> Tensor:
        return self.z

    @step("synthesis")
    def generate(self) -> None:
        self.minimise(self.generator_terms(self.view(self.G(self.latents()))), self.opt_g, clip=self.grad_clip)

    @step("distillation")
    def answer(self) -> None:
        """The images of the next student steps, and what the teacher says to them, once."""
        self.x.copy_(self.fresh())
        with torch.no_grad():
            t = self.teacher(self.x, *self.asks())
            self.answers.copy_(t.logits)
            for kept, m in zip(self.attentions, stages(t), strict=True):
                kept.copy_(losses.attention(m))

    @step("distillation")
    def learn(self) -> None:
        self.minimise(self.student_terms(self.x), self.opt_s, clip=self.grad_clip)

    def scale(self) -> float:
        return float(self.classes) if self.kl_reduction == "batchmean" else 1.0

    def gap(self, teacher: Tensor, student: Tensor) -> Tensor:
        return self.scale() * losses.kl_elem(teacher, student, self.tau)

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        return {"adv": -self.gap(self.teacher(x).logits, self.opponent(x))}

    def student_terms(self, x: Tensor) -> dict[str, Tensor]:
        s = self.student.trace(x, *self.asks())
        terms = self.belief_terms(s.logits)
        if self.beta:
            differ = losses.at if self.at_form == "squares" else losses.at_norm
            apart = [differ(kept, losses.attention(m)) for kept, m in zip(self.attentions, stages(s), strict=True)]
            terms["at"] = self.beta * self.scale() * torch.stack(apart).sum()
        return terms

    def belief_terms(self, student: Tensor) -> dict[str, Tensor]:
        """The divergence of a student step from the teacher's kept answers."""
        return {"gap": self.gap(self.answers, student)}


def stages(t: Trace) -> list[Tensor]:
    """The last map of each resolution."""
    return list({m.shape[2:]: m for m in t.groups or ()}.values())


choose = by_variant(original=Zskt, zju=ZsktZju)
