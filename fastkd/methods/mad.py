"""MAD: a moving average of the generator goes on making the images that the generator has left behind, and the student learns from both;
here on ZSKT without attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Count, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods.zskt import Zskt
from fastkd.nn import copy_

CARD = Card(
    paper="Do et al., Momentum Adversarial Distillation: Handling Large Distribution Shifts in Data-Free Knowledge Distillation",
    venue="NeurIPS",
    year=2022,
    basis="reconstructed",
    source="third-party notes, on top of ZSKT",
    needs=(),
    terms=(
        "adv",
        "oh: generator: the class it is to make (conditional)",
        "norm: generator: size of the latents (conditional)",
        "gap",
        "memory: student: the same on images of the averaged generator",
        "at",
    ),
    also="beta: teacher and student whose stages end in maps of the same sizes",
)


@dataclass
class Mad(Zskt):
    """The schedule is ZSKT's. For 1000 classes the paper conditions the generator on a class: conditional."""

    variant: Literal["original"] = "original"
    """the form of ZSKT that it stands on"""
    beta: Weight = 0.0
    ema_alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    """how much of the average an update keeps"""
    ema_update: Count = 1
    """generator steps between two updates of the average"""
    ema_buffers: Literal["batch", "copy"] = "batch"
    """BatchNorm of the averaged generator: statistics of its batch, or the generator's running ones (eval mode)"""
    lambda_0: Weight = 1.0
    """weight of the loss on the generator's images"""
    lambda_1: Weight = 1.0
    """weight of the loss on the averaged generator's images; 0: none are made, the run is ZSKT's"""
    mix: Literal["half", "full"] = "half"
    """a student step sees half a batch of each, or a whole one"""
    z_shared: bool = False
    """both generators get the same latents"""
    conditional: bool = False
    """a learned embedding of a random class is added to each latent, and the teacher is to name that class"""
    oh: Weight = 1.0
    """weight of CE(t, y) in the conditional form"""
    norm: Weight = 0.0
    """weight of the mean square of the conditional latents; the paper's norm penalty, whose form and weight are not known"""

    def check(self) -> None:
        super().check()
        if self.lambda_1 and self.mix == "half" and self.batch % 2:
            raise ConfigError(f"batch is {self.batch}; expected an even number for two halves, or --set method.mix=full.")

    def build(self) -> None:
        if self.conditional:
            self.embed = self.place(nn.Embedding(self.classes, self.nz))
            self.y = self.buffer(self.batch, dtype=torch.int64)
        super().build()
        self.memory = [self.generator(self.generator_name, self.nz, **self.generator_options())]
        if self.conditional:
            self.memory.append(self.place(nn.Embedding(self.classes, self.nz)))
        for kept, net in zip(self.memory, self.averaged(), strict=True):
            copy_(kept.requires_grad_(False), net)

    def averaged(self) -> list[nn.Module]:
        """What has a moving average."""
        return [self.G, self.embed] if self.conditional else [self.G]

    def generator_parameters(self) -> list[Tensor]:
        return [p for net in self.averaged() for p in net.parameters()]

    def student_batch(self) -> int:
        return 2 * self.batch if self.lambda_1 and self.mix == "full" else self.batch

    def epoch(self, e: int) -> Iterator[Step]:
        made = e * self.iterations * self.g_steps
        for item in super().epoch(e):
            yield item
            if item == self.generate:
                made += 1
                if made % self.ema_update == 0:
                    yield self.average

    # The averaged generator -----------------------------------------------------------------------------------------

    @step("memory")
    def average(self) -> None:
        for kept, net in zip(self.memory, self.averaged(), strict=True):
            with torch.no_grad():
                torch._foreach_lerp_(list(kept.parameters()), list(net.parameters()), 1 - self.ema_alpha)
                if self.ema_buffers == "copy":
                    for mine, theirs in zip(kept.buffers(), net.buffers(), strict=True):
                        mine.copy_(theirs)

    def fresh(self) -> Tensor:
        if not self.lambda_1:
            return super().fresh()
        n = self.student_batch() // 2
        z = self.first(self.latents(), n)
        new = self.images(self.G, z, self.gen_mode_in_kd)
        return torch.cat([new, self.images(self.memory[0], self.memory_latents(n), "eval" if self.ema_buffers == "copy" else "train")])

    def memory_latents(self, n: int) -> Tensor:
        """What the averaged generator makes images of, [n, nz]: draws of its own stream, so that the host's stay as they are."""
        z = self.first(self.z, n) if self.z_shared else self.rng.normal(n, self.nz, name="memory")
        if not self.conditional:
            return z
        y = self.first(self.y, n) if self.z_shared else self.rng.labels(n, self.classes, name="memory")
        return z + self.memory[1](y)  # type: ignore[no-any-return]

    # Conditional form -----------------------------------------------------------------------------------------------

    @step("synthesis")
    def draw(self) -> None:
        super().draw()
        if self.conditional:
            self.y.copy_(self.rng.labels(self.batch, self.classes, name="labels"))

    def latents(self) -> Tensor:
        return self.z + self.embed(self.y) if self.conditional else self.z

    # Losses ---------------------------------------------------------------------------------------------------------

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        t = self.teacher(x).logits
        terms = {"adv": -self.gap(t, self.opponent(x))}
        if self.conditional:
            terms["oh"] = self.oh * losses.cross_entropy(t, self.y)
            terms["norm"] = self.norm * self.latents().square().mean()
        return terms

    def belief_terms(self, student: Tensor) -> dict[str, Tensor]:
        if not self.lambda_1:
            return {"gap": self.lambda_0 * self.gap(self.answers, student)}
        new, old = zip(self.answers.chunk(2), student.chunk(2), strict=True)
        return {"gap": self.lambda_0 * self.gap(*new), "memory": self.lambda_1 * self.gap(*old)}

    def report(self) -> dict[str, float]:
        kept = [t for net in self.memory for t in net.state_dict().values()] if self.lambda_1 else []  # else nothing is replayed
        return {"replay_bytes": float(sum(t.numel() * t.element_size() for t in kept))}
