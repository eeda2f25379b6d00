"""What PRE-DFKD, MB-DFKD and LRA share: one generator under the teacher's priors, and an L1 student that may rehearse old images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.method import Count, Phase, Rate, Share, Weight
from fastkd.methods._novel import Game, Mode
from fastkd.nn import Trace

Replayed = Annotated[int, Field(ge=0)] | None
"""Replayed images of a step over all ranks; none: an eighth of the batch, 0: no replay."""


@dataclass
class Prior(Game):
    """`generate` trains the generator once, `fresh` makes novel images, `update` is one student step on them and on replayed ones."""

    epochs: Count = 400
    iterations: Count = 36
    s_steps: Count = 10
    batch: Count = 1024
    generator_name: Literal["g_pre", "g_dafl"] = "g_pre"
    """g_dafl: without spectral norm, PyTorch's initialisation"""
    nz: Count = 1000
    lr_g: Rate = 0.02
    beta1_g: Share = 0.9
    weight_decay: Weight = 5e-4
    student_mode_in_g: Mode = "train"
    tau: Rate = 3.0
    """temperature of the adversarial loss"""
    oh: Weight = 1.0
    """weight of the one-hot loss CE(t, argmax t)"""
    ie: Weight = 5.0
    """weight of the information-entropy loss: classes equally frequent in a batch"""
    act: Weight = 0.1
    """weight of the activation loss"""
    dis: Weight = 1.0
    """weight of the adversarial loss"""
    jsd: Literal["coded", "textbook"] = "coded"
    """divergence of the adversarial loss: as released (reversed, clamped to [.01, .99]), or Jensen-Shannon's"""
    bn_eps: Rate = 0.8
    """epsilon of the inner BatchNorms of generators and encoder: 0.8 as published, probably a momentum in its place; clean: 1e-5"""
    tiny_generator: Literal["h8", "h4"] = "h8"
    """first map of generator and encoder where images have 64 px or more: H/8 (re-implementation), or H/4 as below 64 px"""

    def check(self) -> None:
        super().check()
        for loss, off in self.on_features().items():
            if self.teacher(self.blank()).feature is None:
                raise ConfigError(
                    f"{loss} needs a teacher that ends in a linear layer, and none was found in this one; use --set method.{off}."
                )

    def on_features(self) -> dict[str, str]:
        """Losses on the teacher's penultimate feature that are on, and the setting that switches each off."""
        return {"the activation loss": "act=0"} if self.act else {}

    def notes(self) -> list[str]:
        none = f"nothing is replayed: a batch of {self.batch} has no eighth; 8 images and more have one"
        return [*super().notes(), *([none] if self.batch < 8 and not self.replayed else [])]

    def build(self) -> None:
        super().build()
        self.x = self.buffer(self.batch, *self.shape)  # the novel images of the newest student step

    @property
    def small_start(self) -> bool:
        """Whether generator and encoder have the 64 px form."""
        return self.tiny_generator == "h8" and min(self.shape[1:]) >= 64

    def generator_options(self) -> dict[str, Any]:
        return {"eps": self.bn_eps, "small_start": self.small_start}

    # Generator ------------------------------------------------------------------------------------------------------

    def generator_terms(self, x: Tensor) -> dict[str, Tensor]:
        t = self.teacher(x, *self.asks())
        terms = self.confident(t) | {"dis": self.dis * losses.adv_jsd_elem(t.logits, self.opponent(x), self.tau, self.jsd)}
        if self.act:
            assert t.feature is not None  # `check` refused what has none
            terms["act"] = self.act * losses.act(t.feature)
        return terms | self.more_terms(x, t)

    def confident(self, t: Trace) -> dict[str, Tensor]:
        """Images that the teacher is sure of, and a batch of all classes."""
        return {"oh": self.oh * losses.pseudo_label(t.logits), "ie": self.ie * losses.balance_log10(t.logits)}

    def asks(self) -> tuple[str, ...]:
        """What the teacher is asked for in a generator step beside logits and feature."""
        return ()

    def more_terms(self, x: Tensor, t: Trace) -> dict[str, Tensor]:
        """Terms that a method adds to L_G of images `x`, of which the teacher says `t`."""
        return {}

    # Student --------------------------------------------------------------------------------------------------------

    @property
    def replayed(self) -> int:
        """Replayed images of a student step, over all ranks."""
        return 0

    def or_eighth(self, replayed: int | None) -> int:
        """A number of replayed images, by default the published share B / 8."""
        return self.batch // 8 if replayed is None else replayed

    def fresh(self) -> Tensor:
        return self.x.copy_(super().fresh())

    def update(self, x: Tensor, old: Tensor | None) -> None:
        """One student step on novel images and, where there are any, replayed ones."""
        self.learn_from(x if old is None else torch.cat([x, old]))

    def gap(self, teacher: Tensor, student: Tensor) -> Tensor:
        return losses.l1_logit(teacher, student)

    def images_of(self, phase: Phase) -> int:
        return self.batch + (self.replayed if phase == "distillation" else 0)
