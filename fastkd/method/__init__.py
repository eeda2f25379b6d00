"""What a method is, and the toolbox it gets.

A method is a dataclass in one file: its fields are the hyper-parameters, `build()` makes everything that lives longer than a
step, and `epoch(e)` yields the steps of one published epoch in order: it is the paper's algorithm box. The engine walks the
steps; it needs nothing else to seed, time, guard and checkpoint any method at any step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fastkd import models, optim, ranks
from fastkd.errors import MethodAttributeError, MethodTypeError
from fastkd.log import Log
from fastkd.memory import Places
from fastkd.method.updates import Pace, Updates
from fastkd.method.views import Augment, Augmentation, Views
from fastkd.nn import Student, Teacher, evaluating, frozen, fuse_generator
from fastkd.rng import Rng

__all__ = [
    "GIVEN", "OWN", "Augment", "Augmentation", "Count", "Given", "Method", "Pace", "Phase", "Rate", "Share", "Step", "Weight", "step",
    "steps",
]  # fmt: skip

Net = TypeVar("Net", bound=nn.Module)
Count = Annotated[int, Field(ge=1)]
"""A field that counts something of which there is at least one."""
Rate = Annotated[float, Field(gt=0)]
"""A field that must be positive: learning rates, temperatures, widths."""
Weight = Annotated[float, Field(ge=0)]
"""A field that weighs a term; 0 switches it off."""
Share = Annotated[float, Field(ge=0, lt=1)]
"""A field in [0, 1), such as a momentum."""
Phase = Literal["synthesis", "distillation", "memory"]
Step = Callable[..., Any] | tuple[Any, ...]


def step(phase: Phase, *, eager: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a function of a method as a step: the unit of resume, seeding, timing and guards.

    Args:
      phase: what its time is booked under.
      eager: its host code must run each time (filling a memory, re-initialising, learning rates). Any other step may be captured in a
        CUDA graph (`engine.graphs`) and replayed without it.
    """

    def mark(fn: Callable[..., None]) -> Callable[..., None]:
        fn.phase, fn.eager = phase, eager  # type: ignore[attr-defined]
        return fn

    return mark


@dataclass
class Given:
    """What `assemble` hands to a method before `build`.

    Attributes:
      teacher: frozen network (`nn.instrument`), None where a task needs none. student: network to train (`nn.Student`).
      shape: (c, h, w) of the teacher's nominal input. classes: number of classes.
      mean, std: [c] tensors, the teacher's normalisation constants.
      embeddings: [C, d_e] label-text embeddings, or None. real: a data set, or None.
      seed: root seed. rng, log: the run's own.
      augmentation: what the images allow. device: where everything lives. places: where the images of its stores live; None: there, too.
      pace: see `Pace`.
    """

    teacher: Teacher | None
    student: Student
    shape: tuple[int, int, int]
    classes: int
    mean: Tensor
    std: Tensor
    seed: int
    rng: Rng
    log: Log
    device: torch.device
    embeddings: Tensor | None = None
    real: Any = None
    augmentation: Augment = field(default_factory=Augment)
    places: Places | None = None
    pace: Pace = field(default_factory=Pace)


GIVEN = tuple(f.name for f in dataclasses.fields(Given))
OWN = frozenset({"_life", *inspect.get_annotations(Updates)} - {*GIVEN})
"""Attributes in which the toolbox keeps what is forgotten when a step ends."""


class Method(Updates, Views):
    """Base of all methods. Subclasses are dataclasses with at least `epochs`, `batch` and `aug` among their fields.

    Life: fields → `bind` → `build` → sealed. After the seal no attribute is set any more: what changes is changed in place, which
    is what makes resume exact, and lets steps be captured in CUDA graphs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"bn"})
    """What must be there before the first step: bn (a teacher with BatchNorm), embeddings (made where they are missing), data (real
    images). What depends on fields is for `check` to refuse."""
    per_pixel: ClassVar[bool] = False
    """Whether it distils networks that answer for each pixel (logits [B, C, H, W])."""
    per_pixel_with: ClassVar[str] = ""
    """The setting that it then needs, as `--set` takes it; empty: none."""

    # Fields that every method has.
    epochs: int
    batch: int
    aug: str

    # Given before `build`.
    teacher: Teacher
    student: Student
    shape: tuple[int, int, int]
    classes: int
    mean: Tensor
    std: Tensor
    seed: int
    rng: Rng
    log: Log
    device: torch.device
    embeddings: Tensor | None
    real: Any
    augmentation: Augment
    places: Places | None
    pace: Pace

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name in inspect.get_annotations(cls):
            if name in _TOOLBOX or name in GIVEN:
                raise MethodTypeError(f"{cls.__name__}.{name} would hide '{name}' of the toolbox; choose another field name")
        for name, fn in list(vars(cls).items()):
            inherited = next((vars(b)[name] for b in cls.__mro__[1:] if name in vars(b)), None)
            if callable(fn) and hasattr(inherited, "phase") and not hasattr(fn, "phase"):
                fn.phase, fn.eager = inherited.phase, inherited.eager  # type: ignore[union-attr]

    def __setattr__(self, name: str, value: Any) -> None:
        life = self.__dict__.get("_life", "fields")
        fields = getattr(type(self), "__dataclass_fields__", {})
        if life == "sealed":
            raise MethodAttributeError(f"{type(self).__name__}.{name} is set after build(); state that changes is written in place")
        if life != "fields" and name in fields:
            raise MethodAttributeError(f"{type(self).__name__}.{name} is a hyper-parameter and is not set after __init__")
        if life != "fields" and (name in OWN or name in GIVEN):
            whose = "the toolbox's own" if name in OWN else "given by the run"
            raise MethodAttributeError(f"{type(self).__name__}.{name} is {whose} and is not set by a method; choose another name")
        if name not in fields and name not in GIVEN and hasattr(type(self), name):
            raise MethodAttributeError(f"{type(self).__name__}.{name} is a function of the method and cannot be overwritten")
        object.__setattr__(self, name, value)

    def bind(self, given: Given) -> None:
        """Take what the run gives; afterwards `build` may be called."""
        for name in GIVEN:
            object.__setattr__(self, name, getattr(given, name))
        object.__setattr__(self, "_touched", [])
        object.__setattr__(self, "_rows", 0)
        object.__setattr__(self, "_bad", torch.zeros((), device=given.device, dtype=torch.float32))
        object.__setattr__(self, "_life", "building")

    def seal(self) -> None:
        """No attribute is set from here on."""
        object.__setattr__(self, "_life", "sealed")

    # What a method defines ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse, before anything is built, settings that cannot work with what was given (`ConfigError`)."""

    def build(self) -> None:
        """Make networks, optimisers, memories and buffers: everything that outlives a step."""
        raise NotImplementedError

    def epoch(self, e: int) -> Iterator[Step]:
        """The steps of epoch `e`, in order. Pure: depends on fields, what is given and `e` only and changes nothing.

        An item is a step, or (step, *args); args of a step that is not eager select a variant, they are never data.
        """
        raise NotImplementedError

    def uses_real(self) -> bool:
        """Whether real images are opened for it; what it cannot do without is in `needs`, or `check` refuses."""
        return "data" in self.needs

    def uses_condensed(self) -> bool:
        """Whether a condensed set may take the place of real images."""
        return False

    def choose_real(self, found: Any, classes: int) -> Any:
        """What of the opened real images (an `ImageSet`, or a `CondensedSet`) becomes `real`; called before `bind`, and may refuse them
        (`ConfigError`).

        Args:
          classes: number of classes of the teacher.
        """
        return found

    def trains_student(self, e: int) -> bool:
        """Whether the student is trained in epoch `e`; epochs where it is not are left out of means over epochs."""
        return True

    def images_of(self, phase: Phase) -> int:
        """Images that a step of this phase passes through the networks, over all ranks; for the rate that progress shows."""
        return self.batch

    def sample(self, n: int) -> Tensor | None:
        """Up to `n` of the newest synthetic images as the networks see them [n, C, H, W], or None where there are none yet."""
        return None

    def notes(self) -> list[str]:
        """Sentences to say before the first step: settings that work but may not mean what the user thinks."""
        return []

    def report(self) -> dict[str, float]:
        """Numbers for the summary, such as bytes held for rehearsal; read on the host at the end of a run."""
        return {}

    # Making state ---------------------------------------------------------------------------------------------------

    def generator(self, name: str, nz: int, shape: tuple[int, int, int] | None = None, **kw: Any) -> Any:
        """A generator of `models` on the run's device, for the given or the nominal image shape; layers joined (`fuse_generator`)."""
        return self.place(fuse_generator(models.generator(name, nz, shape or self.shape, **kw)))

    def encoder(self, name: str, nz: int, **kw: Any) -> Any:
        """An encoder of `models` on the run's device."""
        return self.place(models.encoder(name, nz, self.shape, **kw))

    def place(self, net: Net) -> Net:
        """A new network on the run's device, channels_last."""
        if any(isinstance(p, FakeTensor) for p in net.parameters()):
            return net  # a dry run: nothing is anywhere
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def per_sample(self, batch: int, *shape: int) -> nn.Parameter:
        """A trainable tensor with one row a sample of the global `batch` (latents, pixels); this rank holds its rows."""
        p = nn.Parameter(torch.zeros(len(ranks.rows(batch)), *shape, device=self.device))
        p.per_sample = True  # type: ignore[attr-defined]
        return p

    def buffer(self, batch: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """As `per_sample`, but not trainable (labels, kept images, features)."""
        x = torch.zeros(len(ranks.rows(batch)), *shape, dtype=dtype, device=self.device)
        x.per_sample = True  # type: ignore[attr-defined]
        return x

    def blank(self) -> Tensor:
        """A black image [1, c, h, w] of the nominal shape: what a network gives for it shows widths, and what is there at all."""
        return torch.zeros(1, *self.shape, device=self.device)

    adam = staticmethod(optim.adam)
    sgd = staticmethod(optim.sgd)
    reset = staticmethod(optim.reset)

    def set_lr(self, opt: torch.optim.Optimizer, *values: float) -> None:
        """Write the learning rate of each group (one value: of all groups) into its tensor, times the run's `pace.rate`."""
        optim.set_lr(opt, *(v * self.pace.rate for v in values))

    # Small words ----------------------------------------------------------------------------------------------------

    @staticmethod
    def frozen(*nets: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context: the networks' parameters require no gradient, so none is computed."""
        return frozen(*nets)

    @staticmethod
    def evaluating(*nets: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context: as `frozen`, and in eval mode."""
        return evaluating(*nets)

    def rows(self, batch: int) -> Tensor:
        """Row numbers of the global `batch` that this rank holds, int64 [b]."""
        own = ranks.rows(batch)
        return torch.arange(own.start, own.stop, own.step, device=self.device)

    @staticmethod
    def first(x: Tensor, n: int) -> Tensor:
        """The first `n` rows of the global batch, as far as this rank holds them."""
        return x[: len(ranks.rows(n))]


_TOOLBOX = frozenset(
    name
    for part in (Method, Updates, Views)
    for name, v in vars(part).items()
    if not name.startswith("__") and (callable(v) or isinstance(v, staticmethod))
)


def steps(method: Method, epoch: int) -> Iterator[tuple[int, Callable[..., Any], tuple[Any, ...], int]]:
    """Walk an epoch: (number of the step, its function, its arguments, how often its name came before in this epoch)."""
    seen: dict[str, int] = {}
    for i, item in enumerate(method.epoch(epoch)):
        fn, *args = item if isinstance(item, tuple) else (item,)
        name = fn.__name__
        yield i, fn, tuple(args), seen.setdefault(name, 0)
        seen[name] += 1
