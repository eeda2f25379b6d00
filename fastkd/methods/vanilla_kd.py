"""Vanilla knowledge distillation on real images: the reference rows of data-free distillation, and the way to distil from any fixed folder
of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastkd import losses
from fastkd.data import ImageSet
from fastkd.data.image_set import IGNORE
from fastkd.errors import ConfigError
from fastkd.memory import Rows, Store
from fastkd.method import Count, Rate, Step, Weight, step
from fastkd.method.views import CROPS
from fastkd.methods._card import Card
from fastkd.methods._student import Distance, StudentPhase, distance
from fastkd.nn import Trace

CARD = Card(
    paper="Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531)",
    venue="arXiv",
    year=2015,
    basis="re-implementation",
    source="loss and settings of zju-vipa/CMI and zju-vipa/Fast-Datafree",
    needs=("data",),
    terms=("kl", "gap", "ce: student: cross-entropy of the real labels", "at"),
    also="beta, subset: labels of the images; attention: teacher and student whose stages end in maps of the same sizes",
)

MILESTONES = (0.6, 0.75, 0.9)
"""Shares of the epochs after which the released schedule divides the learning rate by 10: 120, 150 and 180 of 200."""


@dataclass
class VanillaKd(StudentPhase):
    """Defaults: all real images, KL only, temperature 1 [code]; an epoch is as many steps as that of a synthetic run. The images are the
    training split of `data`, or those of `real`. Reference rows to report: beta 0 and 0.1, tau 1, 4 and 20, all images and subsets.

    Networks that answer for each pixel are distilled per pixel: on crops of a set with labels of pixels, or on a folder of pictures.
    """

    needs: ClassVar[frozenset[str]] = frozenset(CARD.needs)
    per_pixel: ClassVar[bool] = True

    epochs: Count = 200
    warmup: Annotated[int, Field(ge=0)] = 0
    kd_batch: Count = 128
    lr: Rate = 0.1
    eta_min: Weight = 0.0
    tau: Rate = 1.0
    loss: Distance = "kl"
    """distance of the answers: temperature-scaled KL, or L1 of the logits"""
    alpha: Weight = 1.0
    """weight of that distance"""
    beta: Weight = 0.0
    """weight of the cross-entropy of the real labels; above 0 the result is not comparable with data-free rows"""
    subset: Count | None = None
    """images of each class that are used, drawn by subset_seed (500: the 5,000 of CIFAR-10 that SSD-KD compares with); none: all. Of a set
    with labels of pixels, where no image belongs to one class: images in all"""
    subset_seed: Annotated[int, Field(ge=0)] = 0
    """seed of the subset, apart from the run's; with one seed a larger subset holds the smaller ones"""
    budget: Literal["run", "released"] = "run"
    """run: kd_steps steps an epoch and cosine, those of the synthetic run it is compared with, whatever the number of images;
    released: an epoch is a pass over the images, and the rate falls to a tenth after 60, 75 and 90 % of the epochs"""
    attention: Weight = 0.0
    """weight of attention transfer between the stages of teacher and student (ZSKT's rows: 250 with KL per class, so 2,500 here)"""
    cache_logits: bool = False
    """answers of the teacher computed once; exact only without augmentation (kd_aug=none)"""

    def choose_real(self, found: ImageSet, classes: int) -> ImageSet:
        if (self.beta or self.subset) and not found.dense and bool((found.labels < 0).any()):
            key, off = ("beta", "0") if self.beta else ("subset", "none")
            raise ConfigError(f"method.{key} needs labels, and '{found.name}' has none; use --set method.{key}={off}.")
        if self.beta and found.classes != classes:
            raise ConfigError(f"'{found.name}' has {found.classes} classes, the teacher {classes}; use --set method.beta=0.")
        if self.subset is None:
            return found
        if not found.dense:
            return found.per_class(self.subset, self.subset_seed)
        if self.subset > len(found):
            raise ConfigError(f"method.subset is {self.subset}, '{found.name}' has {len(found)} images; expected at most that many.")
        return found.subset(self.subset, self.subset_seed)

    def check(self) -> None:
        super().check()
        if not (self.alpha or self.beta or self.attention):
            raise ConfigError("method.alpha, beta and attention are all 0, so there is nothing to learn; use --set method.alpha=1.")
        if self.beta and self.teacher.dense and not self.real.dense:
            raise ConfigError(
                f"method.beta needs labels of pixels, and those of '{self.real.name}' are of whole images; use --set method.beta=0."
            )
        if self.real.dense and self.kd_aug not in CROPS:
            raise ConfigError(
                f"method.kd_aug is {self.kd_aug}, which a set with labels of pixels does not have; use --set method.kd_aug=crop_flip."
            )
        if self.cache_logits and self.kd_aug != "none":
            raise ConfigError(f"cached logits do not fit augmented images (kd_aug is {self.kd_aug}); use --set method.kd_aug=none.")
        if self.attention:
            if self.cache_logits:
                raise ConfigError("attention transfer needs the teacher's maps of every batch; use --set method.cache_logits=false.")
            x = self.blank()
            with self.evaluating(self.student):
                t, s = self.teacher(x, "groups"), self.student.trace(x, "groups")
            if [m.shape[2:] for m in t.groups or ()] != [m.shape[2:] for m in s.groups or ()] or len(t.groups or ()) < 2:
                raise ConfigError("the stages of teacher and student do not have the same sizes; use --set method.attention=0.")

    def notes(self) -> list[str]:
        labels = "their labels are used, so no data-free row is comparable" if self.beta else "no label is used"
        how = f"temperature {self.tau:g}" if self.loss == "kl" else "the L1 distance of logits"
        return [f"learns from {len(self.pool):,} real images at {how}; {labels}"]

    def build(self) -> None:
        self.build_student()
        # Maps of labels stay out of the store, and so out of checkpoints.
        self.pool = Store.of(self.rng, self.real.images, **({} if self.real.dense else {"label": self.real.labels}))
        self.pool.reserve(self.steps_an_epoch() * self.kd_batch)
        if self.cache_logits:
            rows = torch.arange(len(self.pool), device=self.device).split(self.kd_batch)
            with torch.no_grad():
                self.answers = torch.cat([self.teacher(self.seen(Rows(self.pool, r), "none")[0]).logits for r in rows])

    def seen(self, rows: Rows, kind: str) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] as the networks see them, and their labels: [b], or [b, H, W] of a set with labels of pixels."""
        if self.real.dense:
            return self.crops(self.real.images, self.real.labels, rows.index, kind, "kd")
        return self.view(rows, kind, name="kd", scale=self.kd_scale), rows.column("label")

    def sample(self, n: int) -> Tensor:
        return self.seen(Rows(self.pool, self.pool.newest(n)), "none")[0]

    def stores(self) -> list[Store]:
        return [self.pool]

    def steps_an_epoch(self) -> int:
        return self.kd_steps if self.budget == "run" else math.ceil(len(self.real.images) / self.kd_batch)

    def epoch(self, e: int) -> Iterator[Step]:
        if self.trains_student(e):
            yield self.anneal, e - self.warmup
            yield self.deal
            for _ in range(self.steps_an_epoch()):
                yield self.learn

    @step("distillation", eager=True)
    def anneal(self, k: int) -> None:
        if self.budget == "run":
            return super().anneal(k)
        past = sum(k >= round(share * (self.epochs - self.warmup)) for share in MILESTONES)
        self.set_lr(self.opt_s, self.lr * 0.1**past)

    @step("distillation")
    def learn(self) -> None:
        rows = self.pool.next(self.kd_batch)
        x, y = self.seen(rows, self.kd_aug)
        ask = ("groups",) if self.attention else ()

        def terms(part: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                t = Trace(self.answers[rows.index[part]], None, None) if self.cache_logits else self.teacher(x[part], *ask)
            s = self.student.trace(x[part], *ask) if self.attention else Trace(self.student(x[part]), None, None)
            return self.terms(t, s, y[part])

        if self.couples():
            self.minimise(terms(slice(None)), self.opt_s)
        else:
            self.minimise_parts(terms, len(x), self.opt_s)

    def couples(self) -> bool:
        return bool(self.beta and self.real.dense)  # a mean over the pixels that have a label is not that of its parts

    def terms(self, t: Trace, s: Trace, y: Tensor) -> dict[str, Tensor]:
        """L of a batch; y: its labels, [b] or [b, H, W]."""
        apart = distance(self.loss, t.logits, s.logits, self.tau) if self.alpha else {}
        terms = {name: self.alpha * term for name, term in apart.items()}
        if self.beta:
            ce = losses.pixel_cross_entropy(s.logits, y, IGNORE) if y.dim() > 1 else losses.cross_entropy(s.logits, y)
            terms["ce"] = self.beta * ce
        if self.attention:
            stages = list(zip(t.groups or (), s.groups or (), strict=True))[1:]  # without the stem
            distances = [losses.at(losses.attention(a), losses.attention(b)) for a, b in stages]
            terms["at"] = self.attention * torch.stack(distances).sum()
        return terms
