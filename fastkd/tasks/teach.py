"""Trains a teacher on real data: a Method like any other, so it resumes, logs and evaluates like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastkd import assemble, losses
from fastkd.config import TeachConfig
from fastkd.data.image_set import IGNORE
from fastkd.engine.events import Listener
from fastkd.errors import ConfigError
from fastkd.memory import Store
from fastkd.method import Method, Step, step
from fastkd.tasks.real_data import make_job, open_data


@dataclass
class Teach(Method):
    """Supervised training: SGD with Nesterov momentum, warm-up and cosine, crop and flip. With labels of pixels: on crops of the images."""

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    epochs: int = 200
    batch: int = 256
    aug: str = "crop_flip"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    label_smoothing: float = 0.0

    def build(self) -> None:
        # Maps of labels stay out of the store, and so out of checkpoints.
        self.images = Store.of(self.rng, self.real.images, **({} if self.real.dense else {"label": self.real.labels}))
        self.images.reserve(self.steps_an_epoch() * self.batch)
        self.opt = self.sgd(
            self.student.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
        )
        self.student.train()

    def steps_an_epoch(self) -> int:
        return max(1, len(self.real.labels) // self.batch)

    def epoch(self, e: int) -> Iterator[Step]:
        yield self.deal
        for i in range(n := self.steps_an_epoch()):
            yield self.anneal, e * n + i
            yield self.learn

    @step("memory", eager=True)
    def deal(self) -> None:
        self.images.deal()

    @step("distillation", eager=True)
    def anneal(self, k: int) -> None:
        total = self.epochs * self.steps_an_epoch()
        rise = max(1, round(self.warmup * total))
        self.set_lr(self.opt, self.lr * ((k + 1) / rise if k < rise else (1 + math.cos(math.pi * (k - rise) / max(1, total - rise))) / 2))

    @step("distillation")
    def learn(self) -> None:
        rows = self.images.next(self.batch)
        if self.real.dense:  # a mean over the pixels that have a label: not that of its parts
            x, y = self.crops(self.real.images, self.real.labels, rows.index, self.aug, "real")
            self.minimise({"ce": losses.pixel_cross_entropy(self.student(x), y, IGNORE, self.label_smoothing)}, self.opt)
            return
        x, y = self.view(rows, name="real"), rows.column("label")

        def terms(part: slice) -> dict[str, Tensor]:
            return {"ce": F.cross_entropy(self.student(x[part]), y[part], label_smoothing=self.label_smoothing)}

        self.minimise_parts(terms, len(x), self.opt)


def teach(config: TeachConfig, out: Path | None, *, resume: str = "no", listeners: Sequence[Listener] = ()) -> assemble.Outcome:
    """Train `config.model` on `config.data`; the folder then holds teacher.safetensors, ready for `fastkd run`.

    Raises:
      ConfigError, InputError, PlaceError: one sentence each, before the first step.
    """
    found = open_data(config.data, config.input_size, config.mean, config.std, "train a teacher")
    train = found.train
    if len(train.labels) < config.batch:
        raise ConfigError(f"batch is {config.batch}, the training set has {len(train.labels)} images; expected at most that many.")
    if train.dense and config.aug == "resized_crop":
        raise ConfigError(f"aug is resized_crop, which '{train.name}' with labels of pixels does not have; use --aug crop_flip.")
    method = Teach(
        **{k: getattr(config, k) for k in ("epochs", "batch", "aug", "lr", "momentum", "weight_decay", "warmup", "label_smoothing")}
    )
    job = make_job("teach", method, config.model, found, config, out_name="teacher.safetensors")
    return assemble.execute(job, out, resume=resume, listeners=listeners)
