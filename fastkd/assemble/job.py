"""Configuration → a method with everything it is given: checked, nothing written, no step taken."""

from __future__ import annotations

import copy
import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import pydantic
import torch
from torch import Tensor

from fastkd import data, methods, ops
from fastkd.assemble.device import resolve_device, resolve_precision
from fastkd.assemble.networks import Network, entry_of, load_network, make_student, metadata, network_facts, placed
from fastkd.assemble.real import real_images
from fastkd.assemble.target import Target
from fastkd.config import RunConfig
from fastkd.data import embeddings
from fastkd.engine import determinism
from fastkd.engine.settings import Settings
from fastkd.errors import ConfigError, InputError, nearest
from fastkd.log import Log
from fastkd.memory import Places
from fastkd.method import Augment, Given, Method
from fastkd.nn import Student, Teacher, instrument
from fastkd.rng import Rng


@dataclass
class Job:
    """A method with everything it is given, and what the engine and the run folder need to know."""

    name: str
    method: Method
    given: Given
    settings: Settings
    out_name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    notes: list[str]
    teacher_sha256: str = ""


def make_method(table: dict[str, Any]) -> Method:
    """A method from `method.*`: its name and its fields, each checked against its type.

    Raises:
      ConfigError: an unknown method or field, with the nearest; or a value of the wrong type.
    """
    name = table.get("name", "muse")
    if not isinstance(name, str):
        raise ConfigError(f"method.name is {name!r}; expected one of {', '.join(methods.names())}.")
    cls = methods.method_class(name, table)
    hints, known = typing.get_type_hints(cls, include_extras=True), {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "name":
            continue
        if key not in known:
            close = nearest(key, known)
            raise ConfigError(
                f"unknown key 'method.{key}' of method '{name}'{f'; did you mean method.{close}?' if close else '.'} "
                f"Known: {', '.join(sorted(known))}."
            )
        if value is None and "none" in typing.get_args(hints[key]):
            value = "none"  # `--set KEY=none` is None everywhere else
        try:
            values[key] = pydantic.TypeAdapter(hints[key], config=pydantic.ConfigDict(allow_inf_nan=False)).validate_python(value)
        except pydantic.ValidationError as e:
            first = e.errors()[0]
            raise ConfigError(f"method.{key} is {value!r}; {first['msg'][0].lower()}{first['msg'][1:]}.") from None
    method: Method = cls(**values)
    warmup = getattr(method, "warmup", 0)
    if warmup >= method.epochs:
        raise ConfigError(
            f"method.warmup is {warmup} of {method.epochs} epochs, so the student would never learn; expected less: "
            f"--set method.warmup={method.epochs - 1} at most, or --set method.epochs={warmup + 1} at least."
        )
    return method


def check_needs(method: Method, name: str, teacher: Teacher, has_real: bool) -> None:
    """Refuse, before the first step, what the method needs and is not there; name the methods that work without.

    A method whose BatchNorm term has a weight `bn` of 0 does not need BatchNorm.
    """
    weight = getattr(method, "bn", None)
    missing = {"bn": teacher.split == (0,) and weight != 0, "data": not has_real}
    words = {"bn": "a teacher with BatchNorm, and this one has none", "data": "real images, and none are given (--data, or --set real=DIR)"}
    for need, absent in missing.items():
        if need in method.needs and absent:
            without = [n for n in methods.names() if need not in methods.method_class(n).needs]
            off = "; without its BatchNorm term it runs too (--set method.bn=0)" if need == "bn" and weight is not None else ""
            raise ConfigError(f"method '{name}' needs {words[need]}; methods that work without: {', '.join(without) or 'none'}{off}.")


def check_answers(method: Method, name: str, classes: int, teacher: Teacher, student: Student, spec: str | None, test: Any) -> None:
    """Refuse, before the first step, networks that give another number of answers than there are `classes`, and a teacher that answers
    for each pixel where student, method or data (`test`) do not, or the reverse.

    Raises:
      ConfigError: one sentence.
    """
    kind = {True: "for each pixel", False: "once an image"}
    for what, found in (("teacher", teacher.classes), ("student", student.classes)):
        if found != classes:
            raise ConfigError(f"the {what} gives {found} answers an image, there are {classes} classes; expected one for each class.")
    if teacher.dense != student.dense:
        near = "deeplabv3_mobilenet_v2" if teacher.dense else "resnet18"
        raise ConfigError(
            f"the teacher answers {kind[teacher.dense]}, the student {kind[student.dense]}; expected the same, such as --student {near}."
        )
    if teacher.dense and not method.per_pixel:
        every = {n: methods.method_class(n) for n in methods.names()}
        able = [f"{n} with {c.per_pixel_with}" if c.per_pixel_with else n for n, c in every.items() if c.per_pixel]
        raise ConfigError(
            f"the teacher answers for each pixel, method '{name}' needs one that answers once an image; expected {', '.join(able)}."
        )
    if test is not None and test.dense != teacher.dense:
        labels = "labels of pixels" if test.dense else "one label an image"
        raise ConfigError(
            f"the teacher answers {kind[teacher.dense]}, '{spec}' has {labels}; expected the set it was trained on, or --data none."
        )


def label_embeddings(config: RunConfig, names: list[str] | None, classes: int, device: torch.device) -> tuple[Tensor, list[str]]:
    """The table of label-text embeddings [C, d_e] and what is to be said of it."""
    e = config.embeddings
    found = embeddings.table(e.source, names, classes, prompt=e.prompt, norm=e.norm, seed=e.seed)
    return found.values.to(device), [f"label embeddings: {found.source}", *found.notes]


def make_job(config: RunConfig, target: Target | None = None, *, fake: bool = False) -> Job:
    """Everything a run needs, made and checked; nothing is written.

    Args:
      target: where the run would be that is only asked about; None: it is to run, on `config.device`. What is made for it is here, and
        its images are placed as they would be there.
      fake: it is walked on tensors without memory, which need no GPU.
    """
    ops.use(config.ops.backend)
    determinism.ask(config.deterministic)
    device = torch.device("cpu") if fake else resolve_device(config.device) if target is None else target.stand_in
    on_gpu = device.type == "cuda" if target is None else target.on_gpu
    if config.teacher.spec is None and config.teacher.weights is None:
        raise ConfigError("no teacher is named; expected --teacher SPEC --teacher-weights FILE, or no options at all for the embedded one.")
    teacher = load_network(config.teacher, config.data)
    notes = [*(target.said if target is not None else ()), *(f"teacher: {n}" for n in teacher.notes)]
    test = None if config.data in (None, "none") else data.open_set(config.data, "test", size=teacher.shape[1], channels=teacher.shape[0])
    if test is not None:
        notes += test.notes
        seen = test.classes
        if teacher.class_names and test.class_names and teacher.class_names != test.class_names:
            notes.append(
                f"the class names of the teacher's weights are not those of '{config.data}'; accuracy means something only if the order is"
            )
        if seen != teacher.classes:
            raise InputError(
                f"the teacher has {teacher.classes} classes, '{config.data}' has {seen}; "
                "expected the set it was trained on, or --data none."
            )
    if config.ranks.bn == "rank":
        notes.append(
            "ranks.bn = rank: each rank normalises with its own rows, so several do not give the student of one; "
            "running statistics are each rank's own, and those of rank 0 are saved"
        )
    table = dict(config.method)
    name = str(table.get("name", "muse"))
    method = make_method(table)
    torch.manual_seed(config.seed)
    net, spec, said = make_student(config, teacher)
    notes += [f"student: {n}" for n in said]
    frozen = instrument(placed(copy.deepcopy(teacher.net), device, channels_last=config.channels_last), shape=teacher.shape)
    student = Student(placed(net, device, channels_last=config.channels_last), shape=teacher.shape)
    check_answers(method, name, teacher.classes, frozen, student, config.data, test)
    real = real_images(config, method, name, teacher, test, dense=frozen.dense)
    check_needs(method, name, frozen, real is not None)
    notes += [] if real is None else [f"real images: {n}" for n in real.notes]
    wishes = (config.memory.images, config.memory.tier)
    given = Given(
        teacher=frozen,
        student=student,
        shape=teacher.shape,
        classes=teacher.classes,
        mean=torch.tensor(teacher.mean, device=device),
        std=torch.tensor(teacher.std, device=device),
        seed=config.seed,
        rng=Rng(device),
        log=Log(device),
        device=device,
        real=None if real is None else real.to(device),
        augmentation=augmentation(test, teacher),
        places=Places.measured(device, *wishes) if target is None else target.places(*wishes),
    )
    names = teacher.class_names or (test.class_names if test is not None else None)
    if "embeddings" in method.needs:
        given.embeddings, said = label_embeddings(config, names, teacher.classes, device)
        notes += said
    full = {"name": name, **dataclasses.asdict(method)}  # type: ignore[call-overload]
    resolved = config.model_copy(update={"method": full}).model_dump(mode="json")
    resolved["precision"] = precision = resolve_precision(config.precision, on_gpu=on_gpu)
    return Job(
        name=name,
        method=method,
        given=given,
        settings=Settings.of(
            config,
            precision=precision,
            global_bn=config.ranks.bn == "global",
            data=None if test is None else test.to(device),
            student_metadata=metadata(
                spec, teacher.classes, teacher.shape, teacher.mean, teacher.std, names, method=name, teacher=teacher.spec
            ),
        ),
        out_name="student.safetensors",
        config=resolved,
        facts={"teacher": network_facts(teacher.spec, teacher.net), "student": network_facts(spec, net), "data": config.data},
        notes=notes,
        teacher_sha256=teacher.sha256,
    )


def augmentation(test: Any, teacher: Network) -> Augment:
    """What the images allow: of the evaluation data, else of the data the teacher's metadata names, else flip and an eighth's padding."""
    source = test if test is not None else entry_of(teacher.data)
    return Augment(source.flip, source.pad) if source is not None else Augment(True, teacher.shape[1] // 8)
