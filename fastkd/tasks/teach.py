"""Trains a teacher on real data: a Method like any other, so it resumes, logs and evaluates like any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from fastkd import assemble, data, models
from fastkd.config import TeachConfig
from fastkd.engine.events import Listener
from fastkd.errors import ConfigError, InputError
from fastkd.log import Log
from fastkd.memory import Store
from fastkd.method import Augment, Given, Method, Step, step
from fastkd.nn import Student
from fastkd.rng import Rng


@dataclass
class Teach(Method):
    """Supervised training: SGD with Nesterov momentum, warm-up and cosine, crop and flip."""

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
        self.images = Store.of(self.rng, self.real.images, label=self.real.labels)
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
        logits = self.student(self.view(rows, name="real"))
        self.minimise({"ce": F.cross_entropy(logits, rows.column("label"), label_smoothing=self.label_smoothing)}, self.opt)


def teach(config: TeachConfig, out: Path | None, *, resume: str = "no", listeners: Sequence[Listener] = ()) -> assemble.Outcome:
    """Train `config.model` on `config.data`; the folder then holds teacher.safetensors, ready for `fastkd run`.

    Raises:
      ConfigError, InputError, PlaceError: one sentence each, before the first step.
    """
    device = assemble.resolve_device(config.device)
    train = data.open_set(config.data, "train", size=config.input_size)
    test = data.open_set(config.data, "test", size=config.input_size or (train.images.shape[1] if train is not None else None))
    if train is None or test is None:
        raise ConfigError("data 'none' cannot train a teacher; expected a data set by name or a folder.")
    mean, std = config.mean or train.mean, config.std or train.std
    if mean is None or std is None:
        raise ConfigError(
            f"the normalisation constants of '{config.data}' are not known; "
            "give --mean and --std (ImageNet: 0.485,0.456,0.406 and 0.229,0.224,0.225)."
        )
    classes = int(max(train.labels.max(), test.labels.max())) + 1 if not train.class_names else len(train.class_names)
    if classes < 2:
        raise InputError(f"'{config.data}' has {classes} class; expected at least 2.")
    if len(train.labels) < config.batch:
        raise ConfigError(f"batch is {config.batch}, the training set has {len(train.labels)} images; expected at most that many.")
    shape = (train.images.shape[3], train.images.shape[1], train.images.shape[2])
    torch.manual_seed(config.seed)
    net = models.build(config.model, classes=classes, channels=shape[0], input_size=shape[1])
    method = Teach(
        **{k: getattr(config, k) for k in ("epochs", "batch", "aug", "lr", "momentum", "weight_decay", "warmup", "label_smoothing")}
    )
    metadata = assemble.metadata(config.model, classes, shape, mean, std, train.class_names, data=train.name)
    given = Given(
        teacher=None,
        student=Student(assemble.placed(net, device), shape=shape),
        shape=shape,
        classes=classes,
        mean=torch.tensor(mean, device=device),
        std=torch.tensor(std, device=device),
        seed=config.seed,
        rng=Rng(device),
        log=Log(device),
        device=device,
        real=train.to(device),
        augmentation=Augment(train.flip, train.pad),
    )
    job = assemble.Job(
        name="teach",
        method=method,
        given=given,
        test=test.to(device),
        metadata=metadata,
        out_name="teacher.safetensors",
        seed=config.seed,
        precision=assemble.resolve_precision(config.precision, device),
        poll=config.poll,
        checkpoint=config.checkpoint,
        config={"task": "teach", **config.model_dump(mode="json")},
        facts={"student": assemble.network_facts(config.model, net), "data": train.name},
        notes=[*train.notes],
    )
    return assemble.execute(job, out, resume=resume, listeners=listeners)
