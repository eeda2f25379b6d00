"""What a method is, and the toolbox it gets.

A method is a dataclass in one file: its fields are the hyper-parameters, `build()` makes everything that lives longer than a
step, and `epoch(e)` yields the steps of one published epoch in order: it is the paper's algorithm box. The engine walks the
steps; it needs nothing else to seed, time, guard and checkpoint any method at any step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import typing
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
from fastkd.memory import Places, Rows
from fastkd.nn import Student, Teacher, augment, evaluating, frozen, fuse_generator
from fastkd.rng import Rng

Net = TypeVar("Net", bound=nn.Module)
Augmentation = Literal["none", "crop", "crop_flip", "resized_crop", "roll_flip"]
"""How a batch is changed before a network sees it; see `Method.view`."""
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
      eager: its host code must run each time (filling a memory, re-initialising, learning rates). Any other step could be captured in a
        CUDA graph. The engine does not do that yet; tests record each such step, replay it and compare the bits.
    """

    def mark(fn: Callable[..., None]) -> Callable[..., None]:
        fn.phase, fn.eager = phase, eager  # type: ignore[attr-defined]
        return fn

    return mark


@dataclass(frozen=True)
class Augment:
    """What the images of a data set allow: a horizontal flip, and how many pixels a crop is padded."""

    flip: bool = True
    pad: int = 4


@dataclass
class Pace:
    """How the engine has steps done; state of the run.

    Attributes:
      parts: micro-batches of a step that can be split (`minimise_parts`); raised when memory runs out.
      rate: factor of every learning rate; lowered when a run is rolled back. rolled_back: whether it was.
    """

    parts: int = 1
    rate: float = 1.0
    rolled_back: bool = False


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
    augmentation: Augment = Augment()
    places: Places | None = None
    pace: Pace = field(default_factory=Pace)


GIVEN = tuple(f.name for f in dataclasses.fields(Given))


class Method:
    """Base of all methods. Subclasses are dataclasses with at least `epochs`, `batch` and `aug` among their fields.

    Life: fields → `bind` → `build` → sealed. After the seal no attribute is set any more: what changes is changed in place, which
    is what makes resume exact, and would let steps be captured in CUDA graphs.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"bn"})
    """What must be there before the first step: bn (a teacher with BatchNorm), embeddings (made where they are missing), data (real
    images). What depends on fields is for `check` to refuse."""
    per_pixel: ClassVar[bool] = False
    """Whether it distils networks that answer for each pixel (logits [B, C, H, W])."""
    per_pixel_with: ClassVar[str] = ""
    """The setting that it then needs, as `--set` takes it; empty: none."""
    space: ClassVar[Literal["unit", "normalised"]] = "unit"
    """Where its images live: [0, 1] and seen through `view`, or the teacher's normalised space."""

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
    _touched: list[Tensor]
    _bad: Tensor
    _rows: int

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
        """The steps of epoch `e`, in order. Pure: depends on fields, `seed` and `e` only and changes nothing.

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

    adam = staticmethod(optim.adam)
    sgd = staticmethod(optim.sgd)
    reset = staticmethod(optim.reset)

    def set_lr(self, opt: torch.optim.Optimizer, *values: float) -> None:
        """Write the learning rate of each group (one value: of all groups) into its tensor, times the run's `pace.rate`."""
        optim.set_lr(opt, *(v * self.pace.rate for v in values))

    # One update -----------------------------------------------------------------------------------------------------

    def minimise(self, terms: dict[str, Tensor], *opts: torch.optim.Optimizer, clip: float = 0.0) -> Tensor:
        """One step of `opts` on the sum of `terms`.

        Gradients are taken with respect to exactly the parameters of `opts`, reduced over ranks in one flat all-reduce together
        with the term values, clipped to global norm `clip` (0: not), and applied. A step that is not finite is skipped on the
        device and counted. The gradients stay in `p.grad` until the step ends.

        Args:
          terms: name → [] tensor, already weighted; each one's mean over ranks is the term of the global batch.
        Returns:
          [] the total of the global batch, equal on all ranks, detached.
        """
        params = optim.parameters(*opts)
        values, grads = self._valued(terms, params)
        return self._update(list(terms), values, params, grads, opts, clip)

    def minimise_parts(
        self, terms: Callable[[slice], dict[str, Tensor]], rows: int, *opts: torch.optim.Optimizer, clip: float = 0.0
    ) -> Tensor:
        """As `minimise`, of terms that are means over samples: where memory is short they are taken in micro-batches and added up.

        One part is all rows, and then this is `minimise`. In more parts the gradient is the same to rounding, but for what couples
        samples inside the networks: BatchNorm in training sees a part (of all ranks) at a time. Terms that couple samples
        themselves (balance, contrast, a hinge over the batch) belong into `minimise`.

        Args:
          terms: called with the slice of this rank's rows that a part holds; name → [] tensor, each a mean over those rows.
          rows: how many rows this rank has.
        Returns:
          [] the total of the global batch, equal on all ranks, detached.
        """
        params = optim.parameters(*opts)
        object.__setattr__(self, "_rows", rows)
        names: list[str] = []
        values, grads = torch.zeros(()), list[Tensor]()
        for part in _cut(rows, self.pace.parts):
            found = terms(part)
            share = 1.0 if part == slice(0, rows) else (part.stop - part.start) / rows
            v, g = self._valued(found, params, share)
            names, values = list(found), v if not grads else values + v
            if grads:
                torch._foreach_add_(grads, g)
            else:
                grads = g
        return self._update(names, values, params, grads, opts, clip)

    def _valued(self, terms: dict[str, Tensor], params: list[Tensor], share: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        """This rank's term values [n] and gradients of their sum, times `share`."""
        scaled = list(terms.values()) if share == 1.0 else [share * t for t in terms.values()]
        total = torch.stack([t.reshape(()) for t in scaled]).sum()
        grads = self._grads(total, params)
        return torch.stack([t.detach().reshape(()).to(total.dtype) for t in scaled]), grads

    def _update(
        self,
        names: list[str],
        values: Tensor,
        params: list[Tensor],
        grads: list[Tensor],
        opts: tuple[torch.optim.Optimizer, ...],
        clip: float,
    ) -> Tensor:
        """Reduce over ranks, clip, step, log; returns the global total."""
        values, finite = self._reduce(values, params, grads)
        if clip:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_mul_(grads, torch.clamp(clip / (norm + 1e-6), max=1.0))
        self._step(opts, params, grads, finite)
        self.log.add(**dict(zip(names, values, strict=True)))
        return values.sum()

    def apply(self, opt: torch.optim.Optimizer, grads: list[Tensor]) -> None:
        """A step of `opt` with gradients of one's own (meta updates); they are global already and are not reduced."""
        params = optim.parameters(opt)
        self._step((opt,), params, grads, self._finite(grads))

    def gradients(self, loss: Tensor, params: list[Tensor], create_graph: bool = False, retain_graph: bool | None = None) -> list[Tensor]:
        """Gradients of a local loss for `params`, without a step (latent tuning, inner steps); differentiable with `create_graph`.

        Those of shared parameters are reduced over ranks, in one flat all-reduce.
        """
        grads = self._grads(loss, params, create_graph, retain_graph)
        shared = [g for p, g in zip(params, grads, strict=True) if not _own_rows(p)]
        if ranks.world() == 1 or not shared:
            return grads
        flat = ranks.total(torch.cat([g.reshape(-1) for g in shared]))
        pieces = iter(flat.split([g.numel() for g in shared]))
        return [g if _own_rows(p) else next(pieces).view_as(g).to(g.dtype) for p, g in zip(params, grads, strict=True)]

    @staticmethod
    def _grads(loss: Tensor, params: list[Tensor], create_graph: bool = False, retain_graph: bool | None = None) -> list[Tensor]:
        found = torch.autograd.grad(loss / ranks.world(), params, allow_unused=True, create_graph=create_graph, retain_graph=retain_graph)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    @staticmethod
    def _finite(tensors: list[Tensor]) -> Tensor:
        return torch.stack([n.isfinite() for n in torch._foreach_norm(tensors, torch.inf)]).all() if tensors else torch.tensor(True)

    def _reduce(self, values: Tensor, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All-reduce shared gradients and term values in place; returns global values and whether everything is finite everywhere."""
        finite = self._finite([*grads, values])
        if ranks.world() == 1:
            return values, finite
        shared = [g for p, g in zip(params, grads, strict=True) if not _own_rows(p)]
        flat = torch.cat([values / ranks.world(), (~finite).to(values.dtype)[None], *(g.reshape(-1).to(values.dtype) for g in shared)])
        flat = ranks.total(flat)
        n = values.numel()
        for g, piece in zip(shared, flat[n + 1 :].split([g.numel() for g in shared]), strict=True):
            g.copy_(piece.view_as(g))
        return flat[:n], flat[n] == 0

    def _step(self, opts: tuple[torch.optim.Optimizer, ...], params: list[Tensor], grads: list[Tensor], finite: Tensor) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p, memory_format=torch.preserve_format).copy_(g)
        skip = (~finite).to(torch.float32)
        for opt in opts:
            opt.found_inf = skip  # type: ignore[attr-defined]
            opt.step()
        for p in params:
            p.grad = torch.where(finite, p.grad, torch.zeros_like(p.grad))  # type: ignore[arg-type]
        self._touched.extend(params)
        self._bad.copy_(torch.maximum(self._bad, skip))
        self.log.add(skipped=skip)

    def updated(self) -> bool:
        """Whether the running step has updated anything yet."""
        return bool(self._touched)

    def rows_to_split(self) -> int:
        """How many rows of this rank the running step can take in parts; 0 where it cannot, or has not come so far."""
        return self._rows

    def not_finite(self) -> Tensor:
        """[] 1 where an update of the running step was skipped because it was not finite, else 0; on the device, the same on all ranks."""
        return self._bad

    def step_ends(self) -> None:
        """Called by the engine after each step: gradients do not outlive it."""
        for p in self._touched:
            p.grad = None
        if self._touched:
            self._bad.zero_()
        self._touched.clear()
        object.__setattr__(self, "_rows", 0)

    def tell(self, **values: Tensor) -> None:
        """Log [] values without optimising them; their mean over ranks is what is logged."""
        self.log.add(**{name: ranks.mean(value.detach()) for name, value in values.items()})

    # Small words ----------------------------------------------------------------------------------------------------

    @staticmethod
    def frozen(*nets: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context: the networks' parameters require no gradient, so none is computed."""
        return frozen(*nets)

    @staticmethod
    def evaluating(*nets: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Context: as `frozen`, and in eval mode."""
        return evaluating(*nets)

    @staticmethod
    def rows(batch: int) -> Tensor:
        """Row numbers of the global `batch` that this rank holds, int64 [b]."""
        own = ranks.rows(batch)
        return torch.arange(own.start, own.stop, own.step)

    @staticmethod
    def first(x: Tensor, n: int) -> Tensor:
        """The first `n` rows of the global batch, as far as this rank holds them."""
        return x[: len(ranks.rows(n))]

    def view(self, images: Tensor | Rows, kind: str | None = None, name: str = "aug", scale: float = 0.75) -> Tensor:
        """The door of every network: gather (rows of a store), augment, normalise. Normalising comes last: padding is black.

        Args:
          images: [b, C, H, W] in the method's space, or rows of a store.
          kind: none | crop | crop_flip | resized_crop | roll_flip; None: the method's `aug`. In normalised space nothing is done.
          name: stream of the draws.
          scale: smallest share of the area that resized_crop keeps.
        Returns:
          [b, C, H, W] in the teacher's normalised space; differentiable in `images`.
        """
        if self.space == "normalised":
            return images.read() if isinstance(images, Rows) else images
        return self.unit_view(images, self.aug if kind is None else kind, name, scale)

    def unit_view(self, images: Tensor | Rows, kind: str, name: str = "aug", scale: float = 0.75) -> Tensor:
        """`view` of images in [0, 1], also in a method whose own are in normalised space."""
        if kind not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation '{kind}'; expected one of {', '.join(AUGMENTATIONS)}")
        flips = kind.endswith("flip") or kind == "resized_crop"
        if kind in ("none", "crop", "crop_flip"):
            b = images.index if isinstance(images, Rows) else images
            pad = 0 if kind == "none" else self.augmentation.pad
            dy, dx, flip = (self._shift(b, pad, f"{name}.y"), self._shift(b, pad, f"{name}.x"), self._flip(b, flips, f"{name}.flip"))
            if isinstance(images, Rows):
                return images.gather(dy=dy, dx=dx, flip=flip, pad=pad, mean=self.mean, std=self.std)
            return augment.normalise(augment.crop_flip(images, dy, dx, flip, pad) if pad or flips else images, self.mean, self.std)
        x = images.read() if isinstance(images, Rows) else images
        x = self._resized(x, scale, name) if kind == "resized_crop" else self._rolled(x, name)
        return augment.normalise(x, self.mean, self.std)

    def _shift(self, b: Tensor, pad: int, name: str) -> Tensor:
        return self.rng.integers(2 * pad + 1, b, name=name)

    def _flip(self, b: Tensor, allowed: bool, name: str) -> Tensor:
        flip = self.rng.integers(2, b, name=name) == 1
        return flip if allowed and self.augmentation.flip else torch.zeros_like(flip)

    def _resized(self, x: Tensor, scale: float, name: str) -> Tensor:
        """Area U[scale, 1], aspect log-uniform in [3/4, 4/3], place uniform; sides are clamped to the image."""
        h, w = x.shape[-2:]
        u = self.rng.uniform(x, 4, name=name)
        area = h * w * (scale + (1 - scale) * u[:, 0])
        aspect = torch.exp((2 * u[:, 1] - 1) * math.log(4 / 3))
        width, height = torch.sqrt(area * aspect).clamp(max=w), torch.sqrt(area / aspect).clamp(max=h)
        top, left = u[:, 2] * (h - height), u[:, 3] * (w - width)
        return augment.resized_crop(x, top, left, height, width, self._flip(x, True, f"{name}.flip"))

    def _rolled(self, x: Tensor, name: str) -> Tensor:
        """One roll of ± an eighth of the size and one flip for the whole batch, equal on all ranks."""
        h, w = x.shape[-2] // 8, x.shape[-1] // 8
        dy, dx = self.rng.pick(2 * h + 1, name=f"{name}.y") - h, self.rng.pick(2 * w + 1, name=f"{name}.x") - w
        flip = self.rng.pick(2, name=f"{name}.flip") == 1
        return augment.roll_flip(x, dy, dx, flip & self.augmentation.flip)


AUGMENTATIONS = typing.get_args(Augmentation)
_TOOLBOX = frozenset(n for n, v in vars(Method).items() if not n.startswith("__") and (callable(v) or isinstance(v, staticmethod)))


def steps(method: Method, epoch: int) -> Iterator[tuple[int, Callable[..., Any], tuple[Any, ...], int]]:
    """Walk an epoch: (number of the step, its function, its arguments, how often its name came before in this epoch)."""
    seen: dict[str, int] = {}
    for i, item in enumerate(method.epoch(epoch)):
        fn, *args = item if isinstance(item, tuple) else (item,)
        name = fn.__name__
        yield i, fn, tuple(args), seen.setdefault(name, 0)
        seen[name] += 1


def _cut(rows: int, parts: int) -> list[slice]:
    """`rows` in at most `parts` pieces of equal size, the last perhaps smaller."""
    size = max(1, math.ceil(rows / parts))
    return [slice(at, min(at + size, rows)) for at in range(0, rows, size)]


def _own_rows(p: Tensor) -> bool:
    return getattr(p, "per_sample", False)
