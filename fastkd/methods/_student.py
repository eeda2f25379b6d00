"""The student phase that all methods with a store of images share: shuffled passes, teacher logits, KL, SGD with cosine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.memory import Rows, Store
from fastkd.method import Augmentation, Count, Method, Phase, Rate, Share, Step, Weight, step

Distance = Literal["kl", "l1"]
"""Distance of the student's answers from the teacher's: temperature-scaled KL, or L1 of the logits."""


def distance(kind: Distance, teacher: Tensor, student: Tensor, tau: float) -> dict[str, Tensor]:
    """That distance of logits [b, C] or [b, C, H, W], as a term by the name that it has in logs; `tau` is the KL's temperature."""
    return {"kl": losses.kl_tau(teacher, student, tau)} if kind == "kl" else {"gap": losses.l1_logit(teacher, student)}


@dataclass
class StudentPhase(Method):
    """Distils the student on the rows of `stores()`. `build` of a subclass makes them and calls `build_student`."""

    epochs: Count = 220
    """all epochs, warm-up included"""
    warmup: Annotated[int, Field(ge=0)] = 20
    """first epochs, in which only images are made"""
    batch: Count = 256
    """images of a synthesis batch, over all ranks"""
    aug: Augmentation = "crop_flip"
    """augmentation between generator and networks"""
    kd_batch: Count = 256
    """images of a student step, over all ranks"""
    kd_steps: Count = 400
    """student steps an epoch"""
    kd_aug: Augmentation = "crop_flip"
    """augmentation of a student step"""
    kd_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """smallest share of the area that a resized crop keeps in a student step"""
    tau: Rate = 20.0
    """temperature"""
    lr: Rate = 0.2
    """student learning rate; cosine to eta_min over the epochs after warm-up"""
    momentum: Share = 0.9
    """student SGD momentum"""
    weight_decay: Weight = 1e-4
    """student SGD weight decay"""
    eta_min: Weight = 2e-4
    """final student learning rate"""

    def build_student(self) -> None:
        self.opt_s = self.sgd(self.student_parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        self.student.train()

    def student_parameters(self) -> list[Tensor]:
        return list(self.student.parameters())

    def stores(self) -> list[Store]:
        """The stores that a student phase deals from."""
        raise NotImplementedError

    def images_of(self, phase: Phase) -> int:
        return self.kd_batch if phase == "distillation" else self.batch

    def trains_student(self, e: int) -> bool:
        return e >= self.warmup

    def student_epoch(self, e: int) -> Iterator[Step]:
        """The student phase of epoch `e` in one piece."""
        yield from self.student_round(e, 1)

    def student_round(self, e: int, rounds: int) -> Iterator[Step]:
        """One of `rounds` equal parts of it: learning rate, order of the images, `kd_steps / rounds` steps; nothing during warm-up."""
        if self.trains_student(e):
            yield self.anneal, e - self.warmup
            yield self.deal
            for _ in range(self.kd_steps // rounds):
                yield self.learn

    def check_rounds(self, rounds: int) -> None:
        """Refuse a number of rounds that does not share the student steps of an epoch equally (`ConfigError`)."""
        if self.kd_steps % rounds:
            near = max(1, round(self.kd_steps / rounds)) * rounds
            raise ConfigError(f"method.kd_steps is {self.kd_steps}; expected a multiple of the {rounds} rounds an epoch (nearest: {near}).")

    @step("distillation", eager=True)
    def anneal(self, k: int) -> None:
        cosine = (1 + math.cos(math.pi * k / max(1, self.epochs - self.warmup))) / 2
        self.set_lr(self.opt_s, self.eta_min + (self.lr - self.eta_min) * cosine)

    @step("memory", eager=True)
    def deal(self) -> None:
        for store in self.stores():
            if len(store):
                store.deal()

    @step("distillation")
    def learn(self) -> None:
        rows = self.stores()[0].next(self.dealt)
        self.learn_from(self.view(rows, self.kd_aug, name="kd", scale=self.kd_scale), rows)

    def learn_from(self, x: Tensor, rows: Rows) -> None:
        """A student step on images [b, C, H, W] as the networks see them, which are those of `rows`."""

        def terms(part: slice) -> dict[str, Tensor]:
            with torch.no_grad():
                t = self.teacher(x[part]).logits
            return self.student_terms(x[part], t, Rows(rows.store, rows.index[part]))

        if self.couples():
            self.minimise(terms(slice(None)), self.opt_s)
        else:
            self.minimise_parts(terms, len(x), self.opt_s)

    def couples(self) -> bool:
        """Whether a term of L_S couples the samples of a batch, so that a student step cannot be taken in parts."""
        return False

    @property
    def dealt(self) -> int:
        """Stored images of a student step, over all ranks."""
        return self.kd_batch

    def student_terms(self, x: Tensor, t: Tensor, rows: Rows) -> dict[str, Tensor]:
        """L_S: the temperature-scaled KL; add-ons extend it."""
        return {"kl": losses.kl_tau(t, self.student(x), self.tau)}

    def sample(self, n: int) -> Tensor | None:
        store = self.stores()[0]
        return self.view(Rows(store, store.newest(n)), "none") if len(store) else None

    def report(self) -> dict[str, float]:
        return {"images": float(sum(len(s) for s in self.stores())), "replay_bytes": float(sum(s.bytes for s in self.stores()))}
