"""The real data of a task, with what must be known of them; and the job that learns from them without a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastkd import assemble, data, models
from fastkd.config import CondenseConfig, TeachConfig
from fastkd.data import ImageSet
from fastkd.engine import determinism
from fastkd.engine.settings import Settings
from fastkd.errors import ConfigError, InputError
from fastkd.log import Log
from fastkd.method import Augment, Given, Method
from fastkd.nn import Student
from fastkd.rng import Rng

Constants = tuple[float, ...]


@dataclass
class Opened:
    """Training and test images, their constants, the number of classes, (C, H, W) of what a network sees (of dense sets: crops)."""

    train: ImageSet
    test: ImageSet
    mean: Constants
    std: Constants
    classes: int
    shape: tuple[int, int, int]


def open_data(spec: str, size: int | None, mean: Constants | None, std: Constants | None, purpose: str) -> Opened:
    """Both splits of a data set; constants that are not given are the field's.

    Args:
      purpose: what cannot be done without images, such as "train a teacher".
    Raises:
      ConfigError, InputError: no data, constants that nobody knows, a single class.
    """
    train = data.open_set(spec, "train", size=size)
    side = None if train is None else min(train.images.shape[1:3]) // 2 if train.dense else train.images.shape[1]
    test = data.open_set(spec, "test", size=size or side)
    if train is None or test is None or side is None:
        raise ConfigError(f"data 'none' cannot {purpose}; expected a data set by name or a folder.")
    mean, std = mean or train.mean, std or train.std
    if mean is None or std is None:
        raise ConfigError(
            f"the normalisation constants of '{spec}' are not known; "
            "give --mean and --std (ImageNet: 0.485,0.456,0.406 and 0.229,0.224,0.225)."
        )
    channels = train.shape[0]
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(f"mean has {len(mean)} and std {len(std)} numbers; expected one for each of the {channels} channels.")
    classes = max(train.classes, test.classes)
    if classes < 2:
        raise InputError(f"'{spec}' has {classes} class; expected at least 2.")
    return Opened(train, test, mean, std, classes, (channels, side, side))


def make_job(
    task: str,
    method: Method,
    model: str,
    found: Opened,
    config: TeachConfig | CondenseConfig,
    *,
    out_name: str,
    resolved: dict[str, Any] | None = None,
) -> assemble.Job:
    """A method with a fresh network `model` as its student, the training images as its real ones, and the test images to measure by.

    Args:
      out_name: file of the network in the run folder. resolved: what the recorded configuration says in place of `config`'s own values.
    """
    determinism.ask(config.deterministic)
    device = assemble.resolve_device(config.device)
    train = found.train
    torch.manual_seed(config.seed)
    net = models.build(model, classes=found.classes, channels=found.shape[0], input_size=found.shape[1])
    student = Student(assemble.placed(net, device), shape=found.shape)
    if student.dense != train.dense:
        kind, near = ("pixels", "deeplabv3_mobilenet_v2") if train.dense else ("whole images", "resnet20")
        raise ConfigError(f"'{train.name}' has labels of {kind}, which '{model}' does not answer for; expected such as --model {near}.")
    given = Given(
        teacher=None,
        student=student,
        shape=found.shape,
        classes=found.classes,
        mean=torch.tensor(found.mean, device=device),
        std=torch.tensor(found.std, device=device),
        seed=config.seed,
        rng=Rng(device),
        log=Log(device),
        device=device,
        real=train.to(device),
        augmentation=Augment(train.flip, train.pad),
    )
    return assemble.Job(
        name=task,
        method=method,
        given=given,
        settings=Settings.of(
            config,
            precision=assemble.resolve_precision(config.precision, on_gpu=device.type == "cuda"),
            data=found.test.to(device),
            student_metadata=assemble.metadata(
                model, found.classes, found.shape, found.mean, found.std, train.class_names, data=train.name
            ),
        ),
        out_name=out_name,
        config={"task": task, **config.model_dump(mode="json"), **(resolved or {})},
        facts={"student": assemble.network_facts(model, net), "data": train.name},
        notes=[*train.notes],
    )
