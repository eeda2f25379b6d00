"""DeepInversion: pixels are optimised until the teacher names a chosen class and its BatchNorm statistics match; adaptive (ADI): and until
the student disagrees. variant=zju is the benchmark's form, official the authors'."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.memory import Store
from fastkd.method import Count, Rate, Share, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._pool import Call, PoolMethod
from fastkd.nn import augment
from fastkd.ops import bn_match_loss

CARD = Card(
    paper="Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion",
    venue="CVPR",
    year=2020,
    basis="code",
    source="variant=zju: zju-vipa/CMI and zju-vipa/Fast-Datafree; official: NVlabs/DeepInversion, which has no distillation",
    needs=("bn",),
    terms=(
        "bn",
        "bn_student: pixels: BatchNorm statistics away from the student's",
        "oh",
        "adv",
        "tv1: pixels: total variation, absolute differences",
        "tv2: pixels: total variation, norms of differences",
        "l2: pixels: their norm",
        "kl",
    ),
)


@dataclass
class DeepInversion(PoolMethod):
    """Defaults: the benchmark rows (zju) [code]; the tables' DeepInv-2k has g_steps=2000. The authors' own settings are the recipes
    deepinversion-official-cifar and deepinversion-official-imagenet.

    Pixels, their start, learning rate and clip are in normalised coordinates; the pool holds [0, 1]. `aug` is not used: one roll and one
    flip for the whole batch stand in its place.
    """

    epochs: Count = 200
    warmup: Annotated[int, Field(ge=0)] = 0
    lr: Rate = 0.1
    eta_min: Weight = 0.0
    oh: Weight = 1.0
    adv: Weight = 1.0
    bn_mmt: Share = 0.0
    pool_select: Literal["best", "last"] = "last"
    variant: Literal["zju", "official"] = "zju"
    """zju: rolls of an eighth of the size and a flip, the student enters as -JSD, a call an epoch; official: rolls of `jitter` pixels,
    1 - clip(JSD, 0, 1), a call every `adi_period` student steps"""
    g_steps: Count = 1000
    """iterations of a call at full resolution"""
    half_steps: Annotated[int, Field(ge=0)] = 0
    """iterations before them at half resolution: the teacher sees 2 x 2 averages of the same pixels (official, ImageNet: 2000)"""
    lr_x: Rate = 0.1
    """learning rate of the pixels; a fresh Adam for every stage"""
    betas: tuple[Share, Share] = (0.5, 0.99)
    """Adam betas of the pixels (official: 0.9, 0.999 on CIFAR; 0.5, 0.9 on ImageNet)"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: within each stage a linear warm-up, then cosine to 0 (official, ImageNet)"""
    lr_warmup: Annotated[int, Field(ge=0)] = 100
    """iterations of that warm-up"""
    clip: bool = True
    """keep pixels in the valid range after each iteration (official, CIFAR: false)"""
    first_bn: Rate = 1.0
    """factor of the first BN layer in the BN term (official, ImageNet: 10)"""
    bn_student_sub: Weight = 0.0
    """share of the student's own BN distance that is taken off the teacher's (0.001 in the Fast code base)"""
    tv1: Weight = 0.0
    """weight of the total variation of absolute differences (0.001 in the CMI code base)"""
    tv2: Weight = 0.0
    """weight of the total variation of norms (official: 2.5e-5 on CIFAR, 1e-4 on ImageNet)"""
    l2: Weight = 0.0
    """weight of the norm of the pixels"""
    l2_norm: Literal["batch", "image"] = "batch"
    """one norm of the whole batch (CIFAR), or the mean of each image's (ImageNet)"""
    jsd: Literal["coded", "textbook"] = "coded"
    """Jensen-Shannon divergence of the adaptive term as the code has it, or the textbook's"""
    labels: Literal["uniform", "balanced"] = "uniform"
    """target classes: drawn, or 0 … C - 1 over and over"""
    jitter: Annotated[int, Field(ge=0)] = 2
    """official: largest roll in pixels, half of it at half resolution (ImageNet: 30)"""
    flip: bool = False
    """official: flip the whole batch in half of the iterations (ImageNet: true)"""
    adi_period: Count = 50
    """official: student steps after a call"""

    def check(self) -> None:
        super().check()
        if self.variant == "official" and self.kd_steps % self.adi_period:
            near = max(1, round(self.kd_steps / self.adi_period)) * self.adi_period
            raise ConfigError(f"method.kd_steps is {self.kd_steps}; expected a multiple of adi_period {self.adi_period} (nearest: {near}).")
        if self.half_steps:
            try:
                self.teacher(torch.zeros(1, self.shape[0], self.shape[1] // 2, self.shape[2] // 2, device=self.device))
            except (RuntimeError, ValueError):
                raise ConfigError("this teacher takes no images of half its size; use --set method.half_steps=0.") from None
        if self.bn_student_sub and len(self.student.split) == 1:
            raise ConfigError("bn_student_sub needs a student with BatchNorm that can be traced; use --set method.bn_student_sub=0.")

    def rounds(self) -> int:
        """Calls an epoch."""
        return 1 if self.variant == "zju" else self.kd_steps // self.adi_period

    def stages(self) -> tuple[tuple[int, int], ...]:
        """(how much smaller the teacher sees the pixels, iterations) of the stages of a call."""
        return ((2, self.half_steps), (1, self.g_steps)) if self.half_steps else ((1, self.g_steps),)

    def build(self) -> None:
        self.build_student()
        self.x = self.per_sample(self.batch, *self.shape)
        self.opt_x = self.adam([self.x], lr=self.lr_x, betas=self.betas)
        one = torch.ones(1, self.shape[0], 1, 1, device=self.device)
        self.low, self.high = (augment.normalise(v * one, self.mean, self.std) for v in (0, 1))
        self.task = self.call(self.shape[-1], self.epochs * self.rounds() * self.batch)
        self.pool = self.task.pool

    def stores(self) -> list[Store]:
        return [self.pool]

    def epoch(self, e: int) -> Iterator[Step]:
        for _ in range(self.rounds()):
            yield self.start
            for shrink, n in self.stages():
                yield self.fresh
                for k in range(n):
                    if self.lr_schedule == "cosine":
                        yield self.rate, k, n
                    yield self.invert, shrink
            yield self.remember
            yield from self.student_round(e, self.rounds())

    @step("synthesis")
    def start(self) -> None:
        self.x.data.copy_(self.rng.normal(self.batch, *self.shape))
        own = self.rows(self.batch) % self.classes
        self.task.y.copy_(own if self.labels == "balanced" else self.rng.labels(self.batch, self.classes))

    @step("synthesis")
    def fresh(self) -> None:
        self.reset(self.opt_x)
        self.task.best.reset()  # totals of two resolutions are not compared

    @step("synthesis", eager=True)
    def rate(self, k: int, n: int) -> None:
        rise = self.lr_warmup
        self.set_lr(self.opt_x, self.lr_x * ((k + 1) / rise if k < rise else (1 + math.cos(math.pi * (k - rise) / max(1, n - rise))) / 2))

    @step("synthesis")
    def invert(self, shrink: int) -> None:
        before = self.image() if self.pool_select == "best" else None
        seen = self.x if shrink == 1 else F.avg_pool2d(self.x, shrink)
        view = self.jittered(seen, shrink)
        terms = self.inversion_terms(view, self.task, self.adv > 0) | self.priors(seen if self.variant == "zju" else view)
        total = self.minimise(terms, self.opt_x)
        if self.clip:
            self.x.data.copy_(self.x.data.clamp(self.low, self.high))
        if before is not None:
            self.offer(self.task, total, before)

    def image(self) -> Tensor:
        """The pixels in [0, 1] coordinates."""
        return self.x.detach() * self.std[:, None, None] + self.mean[:, None, None]

    def jittered(self, x: Tensor, shrink: int) -> Tensor:
        """One roll, and one flip where it is allowed, of the whole batch; equal on all ranks."""
        zju = self.variant == "zju"
        reach = [side // 8 if zju else self.jitter // shrink for side in x.shape[-2:]]
        dy, dx = (self.rng.pick(2 * r + 1, name=f"jitter.{axis}") - r for r, axis in zip(reach, "yx", strict=True))
        flip = self.rng.pick(2, name="jitter.flip") == 1
        return augment.roll_flip(x, dy, dx, flip & ((zju or self.flip) and self.augmentation.flip))

    def inversion_terms(self, x: Tensor, call: Call, adversary: bool) -> dict[str, Tensor]:
        t = self.teacher(x, "bn")
        distance = bn_match_loss(call.ema.mix(t.bn), self.teacher.target, self.teacher.split, first=self.first_bn)
        terms = {"oh": self.oh * losses.cross_entropy(t.logits, call.y), "bn": self.bn * distance}
        if adversary or self.bn_student_sub:
            with self.evaluating(self.student):
                s = self.student.trace(x, *(("bn",) if self.bn_student_sub else ()))
        if adversary:
            zju = self.variant == "zju"
            divergence = -losses.jsd(t.logits, s.logits, form=self.jsd) if zju else losses.adv_compete(t.logits, s.logits, form=self.jsd)
            terms["adv"] = self.adv * divergence
        if self.bn_student_sub:
            assert s.bn is not None  # it was asked for
            own = bn_match_loss(s.bn, self.student.target, self.student.split)
            terms["bn_student"] = -self.bn * self.bn_student_sub * own
        self.tell(agree=(t.logits.argmax(1) == call.y).to(t.logits.dtype).mean())
        return terms

    def priors(self, x: Tensor) -> dict[str, Tensor]:
        """The image terms: of the pixels before the roll (zju), or of what the teacher sees, with the seam of the roll (official)."""
        norm = losses.l2_batch if self.l2_norm == "batch" else losses.l2_image
        terms = (("tv1", self.tv1, losses.tv1), ("tv2", self.tv2, losses.tv2), ("l2", self.l2, norm))
        return {name: weight * loss(x) for name, weight, loss in terms if weight}

    @step("memory", eager=True)
    def remember(self) -> None:
        if self.pool_select == "last":
            self.offer(self.task, self.task.best.total, self.image())
        self.keep(self.task)
