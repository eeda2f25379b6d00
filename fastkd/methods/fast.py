"""FastDFKD: a meta-learned generator that is adapted for 2-10 steps a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastkd.memory import Store
from fastkd.method import Count, Rate, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._pool import Call, PoolMethod
from fastkd.nn import Trace, copy_

CARD = Card(
    paper="Fang et al., Up to 100x Faster Data-free Knowledge Distillation",
    venue="AAAI",
    year=2022,
    basis="code",
    source="zju-vipa/Fast-Datafree",
    needs=("bn",),
    terms=("bn", "oh", "adv", "kl"),
)


@dataclass
class Fast(PoolMethod):
    """Defaults: Fast-5, ResNet-34 → ResNet-18 on CIFAR-10/100 [code].

    The ImageNet form is the recipe fast-imagenet, segmentation fast-nyuv2. A teacher of dense predictions (logits [B, C, H, W]) is
    distilled per pixel: the one-hot loss then asks for the class that the teacher itself names at each pixel, as no label map is known.
    """

    per_pixel: ClassVar[bool] = True

    generator_name: Literal["g_fast", "g_deep"] = "g_fast"
    """g_deep: a latent map on an H/16 grid, for 224 px"""
    segmentation: Literal["g_dfad_b", "generator_name"] = "g_dfad_b"
    """generator for a dense teacher: g_dfad_b with a Sigmoid head (Fast's NYUv2 form is not fully published), or generator_name"""
    nz: Count = 256
    """latent size"""
    g_steps: Count = 5
    """inner steps a call"""
    loops: Count = 1
    """synthesis calls a round"""
    rounds: Count = 1
    """rounds an epoch: each makes its images, then takes its share of the student steps (ImageNet: 10)"""
    imagenet_init: Literal["run", "none"] = "run"
    """g_deep only, what is in the pool before the first epoch; run: images that we make without student steps (the published set was
    never released); none: nothing (users report a collapse)"""
    init_images: Count = 140_000
    """images of imagenet_init=run, in whole batches"""
    lr_g: Rate = 3e-3
    """inner learning rate of the generator"""
    lr_z: Rate = 0.01
    """inner learning rate of the latents"""
    meta: Literal["fomaml", "reptile", "none"] = "fomaml"
    """update rule of the meta-generator; none: the generator is used on sequentially"""
    lr_meta: Weight | None = None
    """meta learning rate; none: lr_g · g_steps"""
    meta_grad_reduce: Literal["sum", "mean"] = "sum"
    """how FOMAML combines the gradients of the inner steps"""
    reptile: Rate = 67.0
    """factor of theta - theta' (ImageNet: 1)"""
    meta_latent: bool = False
    """latents start from a meta-learned z0 (ImageNet); Adam of theta and z0"""
    lr_z_meta: Rate = 5e-3
    """meta learning rate of z0"""
    redraw_every: Annotated[int, Field(ge=0)] = 0
    """calls after which z0 is drawn anew and the meta optimiser is fresh (ImageNet: 50); 0: never"""
    reset_l0_at: int | None = -1
    """1-based call at which the first layer and BN are re-initialised once; none: never; -1: the first call of the 120th epoch after
    warm-up with g_fast, never with g_deep and g_dfad_b"""
    adv_start: int | None = None
    """1-based call from which the adversary takes part; none: the number of calls until warm-up ends, as released
    (one epoch before the student's first step)"""

    def check(self) -> None:
        super().check()
        self.check_rounds(self.rounds)

    @property
    def dcgan(self) -> bool:
        """Whether images are made by `g_dfad_b`, whatever `generator_name` says."""
        return self.dense and self.segmentation == "g_dfad_b"

    def build(self) -> None:
        self.build_student()
        self.dense = self.teacher(self.blank()).logits.dim() > 2
        name = "g_dfad_b" if self.dcgan else self.generator_name
        self.theta, self.clone = (self.generator(name, self.nz, out="sigmoid") for _ in range(2))
        self.latent = self.theta.latent
        self.z, self.z0 = self.per_sample(self.batch, *self.latent), self.per_sample(self.batch, *self.latent)
        lr_meta = self.lr_g * self.g_steps if self.lr_meta is None else self.lr_meta
        slow = [{"params": [self.z0], "lr": self.lr_z_meta}] if self.meta_latent else []
        self.meta_opt = self.adam(self.theta.parameters(), *slow, lr=lr_meta, betas=(0.5, 0.999))
        self.inner = self.adam(self.clone.parameters(), {"params": [self.z], "lr": self.lr_z}, lr=self.lr_g, betas=(0.5, 0.999))
        self.meta_grad = [torch.zeros_like(p) for p in self.fast_weights()]
        for own, p in zip(self.meta_grad, self.fast_weights(), strict=True):
            own.per_sample = getattr(p, "per_sample", False)  # type: ignore[attr-defined]
        self.task = self.call(self.shape[-1], self.calls(self.epochs) * self.batch)
        self.pool = self.task.pool

    def stores(self) -> list[Store]:
        return [self.pool]

    def slow_weights(self) -> list[nn.Parameter]:
        return [*self.theta.parameters(), *([self.z0] if self.meta_latent else [])]

    def fast_weights(self) -> list[nn.Parameter]:
        return [*self.clone.parameters(), *([self.z] if self.meta_latent else [])]

    def calls(self, e: int) -> int:
        """Synthesis calls before epoch `e`, those of `imagenet_init` included."""
        first = self.generator_name == "g_deep" and self.imagenet_init == "run"
        return first * math.ceil(self.init_images / self.batch) + e * self.rounds * self.loops

    def epoch(self, e: int) -> Iterator[Step]:
        made = self.calls(e)
        if e == 0:
            yield from self.synthesis(0, made)
        for _ in range(self.rounds):
            yield from self.synthesis(made, made + self.loops)
            yield from self.student_round(e, self.rounds)
            made += self.loops

    def synthesis(self, made: int, until: int) -> Iterator[Step]:
        """The calls after the first `made`, up to the one numbered `until`."""
        reset = self.reset_l0_at
        if reset == -1:
            reset = self.calls(119 + self.warmup) + 1 if self.generator_name == "g_fast" and not self.dcgan else None
        for call in range(made + 1, until + 1):
            if call == reset:
                yield self.reset_first_layer
            if self.meta_latent and (call == 1 or (self.redraw_every and call % self.redraw_every == 0)):
                yield self.redraw_latents
            yield self.start
            for _ in range(self.g_steps):
                yield self.adapt, call >= self.first_adversary()
            yield self.meta_update
            yield self.remember

    def first_adversary(self) -> int:
        """The 1-based call from which the adversary takes part."""
        return self.calls(self.warmup) if self.adv_start is None else self.adv_start

    def wanted(self, t: Trace, call: Call) -> Tensor:
        return t.logits.detach().argmax(1) if self.dense else super().wanted(t, call)

    @step("synthesis", eager=True)
    def reset_first_layer(self) -> None:
        for m in (self.theta.l0, self.theta.bn0):
            nn.init.normal_(m.weight, 0, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    @step("synthesis", eager=True)
    def redraw_latents(self) -> None:
        self.z0.data.copy_(self.rng.normal(self.batch, *self.latent))
        self.reset(self.meta_opt)

    @step("synthesis")
    def start(self) -> None:
        self.z.data.copy_(self.z0 if self.meta_latent else self.rng.normal(self.batch, *self.latent))
        self.task.y.copy_(self.rng.labels(self.batch, self.classes))
        copy_(self.clone, self.theta)
        self.reset(self.inner)
        self.task.best.reset()
        torch._foreach_zero_(self.meta_grad)

    @step("synthesis")
    def adapt(self, adversary: bool) -> None:
        x = self.clone(self.z)
        total = self.minimise(self.inversion_terms(self.view(x), self.task, adversary), self.inner)
        torch._foreach_add_(self.meta_grad, self.applied(self.fast_weights()))
        self.offer(self.task, total, x)

    @step("synthesis")
    def meta_update(self) -> None:
        if self.meta == "none":
            copy_(self.theta, self.clone)
        elif self.meta == "fomaml":
            self.apply(self.meta_opt, [g / self.g_steps if self.meta_grad_reduce == "mean" else g.clone() for g in self.meta_grad])
        else:
            moved = zip(self.slow_weights(), self.fast_weights(), strict=True)
            self.apply(self.meta_opt, [self.reptile * (p - q).detach() for p, q in moved])

    @step("memory", eager=True)
    def remember(self) -> None:
        self.keep(self.task)
