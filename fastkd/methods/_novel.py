"""What the methods share that store no image: one generator that lives for the whole run, and images made anew for every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Augmentation, Count, Method, Rate, Share, Step, Weight, step

GeneratorName = Literal["g_fast", "g_large", "g_dafl", "g_pre", "g_dfad_a", "g_dfad_b", "g_dfq", "g_zskt"]
"""The generators that make an image of one latent vector."""
UNIT = ("g_fast", "g_large")
"""Those of them that end in a sigmoid: images in [0, 1]. The others make images in the teacher's normalised space."""
Mode = Literal["train", "eval"]
Schedule = Literal["constant", "cosine", "steps"]


@dataclass
class Novel(Method):
    """A generator and a student with an optimiser each. Defaults: the rows of these methods in the zju benchmark tables [code]."""

    needs: ClassVar[frozenset[str]] = frozenset()

    epochs: Count = 200
    """all epochs"""
    iterations: Count = 80
    """rounds an epoch"""
    batch: Count = 256
    """images of a step, over all ranks"""
    aug: Augmentation = "none"
    """augmentation between generator and networks; only for images in [0, 1]"""
    generator_name: GeneratorName = "g_fast"
    """g_fast and g_large make images in [0, 1], the others in the teacher's normalised space"""
    nz: Count = 256
    """latent size"""
    lr_g: Rate = 1e-3
    """generator learning rate (Adam)"""
    beta1_g: Share = 0.5
    """Adam's first beta for the generator"""
    schedule_g: Schedule = "constant"
    """generator learning rate over the run, as schedule"""
    lr: Rate = 0.1
    """student learning rate"""
    schedule: Schedule = "cosine"
    """student learning rate over the run: constant, cosine to 0, or steps: times gamma at each milestone"""
    milestones: tuple[Count, ...] = ()
    """epochs after which steps lowers a learning rate"""
    gamma: Rate = 0.1
    """factor of a milestone"""
    optimiser: Literal["sgd", "nesterov", "adam"] = "sgd"
    """of the student"""
    momentum: Share = 0.9
    """student SGD momentum"""
    weight_decay: Weight = 1e-4
    """student SGD weight decay"""

    @property
    def space(self) -> Literal["unit", "normalised"]:  # type: ignore[override]
        return "unit" if self.generator_name in UNIT else "normalised"

    def check(self) -> None:
        if self.space == "normalised" and self.aug != "none":
            raise ConfigError(
                f"aug is {self.aug}, but {self.generator_name} makes images in normalised space, which are not augmented; "
                f"use --set method.aug=none, or --set method.generator_name={UNIT[0]}."
            )

    # State ----------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        self.G = self.generator(self.generator_name, self.nz, **self.generator_options())
        self.opt_g = self.adam(self.generator_parameters(), lr=self.lr_g, betas=(self.beta1_g, 0.999))
        self.opt_s = self.student_optimiser()
        self.student.train()

    def generator_options(self) -> dict[str, Any]:
        """Differences from the generator's published form."""
        return {}

    def generator_parameters(self) -> list[Tensor]:
        """What a generator step updates."""
        return list(self.G.parameters())

    def student_optimiser(self) -> torch.optim.Optimizer:
        weights = self.student.parameters()
        if self.optimiser == "adam":
            return self.adam(weights, lr=self.lr)
        nesterov = self.optimiser == "nesterov"
        return self.sgd(weights, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=nesterov)

    # Learning rates -------------------------------------------------------------------------------------------------

    @step("distillation", eager=True)
    def anneal(self, k: int) -> None:
        self.set_lr(self.opt_s, self.lr * self.factor(self.schedule, k))
        self.set_lr(self.opt_g, self.lr_g * self.factor(self.schedule_g, k))

    def period(self) -> int:
        """Where a cosine reaches 0, counted as `anneal` counts."""
        return self.epochs

    def factor(self, schedule: Schedule, k: int) -> float:
        """What a learning rate is multiplied with at position k of the run."""
        if schedule == "cosine":
            return (1 + math.cos(math.pi * k / self.period())) / 2
        return self.gamma ** sum(k >= m for m in self.milestones) if schedule == "steps" else 1.0

    # Parts of steps -------------------------------------------------------------------------------------------------

    def latents(self) -> Tensor:
        """z ~ N(0, I), this rank's rows [b, nz]."""
        return self.rng.normal(self.batch, self.nz)

    def gap(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The distance of logits that the student makes small."""
        return losses.kl_tau(teacher, student, 1.0)

    # What the engine shows ------------------------------------------------------------------------------------------

    def sample(self, n: int) -> Tensor:
        """Images of the generator as it is; a copy makes them, because its BatchNorm buffers must not move."""
        with torch.no_grad():
            return self.view(copy.deepcopy(self.G)(self.latents()), "none")[:n]

    def report(self) -> dict[str, float]:
        return {"replay_bytes": 0.0}


@dataclass
class Rounds(Novel):
    """Rounds of generator steps and student steps, each on new images."""

    g_steps: Count = 1
    """generator steps a round"""
    s_steps: Count = 5
    """student steps a round"""
    gen_mode_in_kd: Mode = "train"
    """mode of the generator in a student step; eval: its BatchNorm uses running statistics"""

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.anneal, e
        for _ in range(self.iterations):
            for _ in range(self.g_steps):
                yield self.generate
            for _ in range(self.s_steps):
                yield self.learn

    @step("synthesis")
    def generate(self) -> None:
        self.minimise(self.generator_terms(self.view(self.G(self.latents()))), self.opt_g)

    @step("distillation")
    def learn(self) -> None:
        self.learn_from(self.fresh())

    def learn_from(self, x: Tensor) -> None:
        """A student step on images [b, C, H, W] as the networks see them."""
        self.minimise_parts(lambda part: self.student_terms(x[part]), len(x), self.opt_s)

    def fresh(self) -> Tensor:
        """New images as the networks see them, without a gradient."""
        return self.images(self.G, self.latents(), self.gen_mode_in_kd)

    def images(self, net: nn.Module, z: Tensor, mode: Mode) -> Tensor:
        """Images of a generator as the networks see them, without a gradient."""
        with torch.no_grad(), self.evaluating(net) if mode == "eval" else nullcontext():
            return self.view(net(z))

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        """L_G of a batch as the networks see it."""
        raise NotImplementedError

    def student_terms(self, x: Tensor) -> dict[str, Tensor]:
        """L_S of a batch as the networks see it; the teacher answers without a gradient."""
        with torch.no_grad():
            t = self.teacher(x).logits
        return {"gap": self.gap(t, self.student(x))}


@dataclass
class Game(Rounds):
    """Rounds in which the generator looks for images on which the student is wrong."""

    student_mode_in_g: Mode = "eval"
    """mode of the student in a generator step; train: its BatchNorm uses the batch, and its running statistics move"""

    def opponent(self, x: Tensor) -> Tensor:
        """The student's logits in a generator step: a gradient for the images, none for its weights."""
        with self.evaluating(self.student) if self.student_mode_in_g == "eval" else self.frozen(self.student):
            return self.student(x)  # type: ignore[no-any-return]


def by_variant(**classes: type[Novel]) -> Callable[[dict[str, Any]], type[Novel]]:
    """An entry of the table of methods: the class of the table's `variant`, the first one where it names none."""

    def choose(table: dict[str, Any]) -> type[Novel]:
        return classes.get(str(table.get("variant")), next(iter(classes.values())))

    return choose
