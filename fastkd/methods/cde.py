"""CDE: a few condensed images a class, or a few real ones, steer the inversion of a host (fast, cmi, pre) through a class-conditional
discriminator on the teacher's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastkd import losses
from fastkd.data import CondensedSet, ImageSet
from fastkd.errors import ConfigError
from fastkd.method import Augmentation, Count, Method, Rate, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._pool import Call, PoolMethod
from fastkd.methods.cmi import Cmi
from fastkd.methods.fast import Fast
from fastkd.methods.pre import Pre
from fastkd.models.discriminator import Condition, FeatureDiscriminator
from fastkd.nn import Trace, diff_augment

CARD = Card(
    paper="Condensed Data Expansion Using Model Inversion for Knowledge Distillation (arXiv 2408.13850)",
    venue="arXiv",
    year=2024,
    basis="reconstructed",
    source="abstract, figure captions and notes; no code is known, so sizes and rates of the discriminator are ours",
    needs=("bn",),
    terms=(
        "bn",
        "oh",
        "adv",
        "cr",
        "ie",
        "act",
        "dis",
        "fa: generator: features that the discriminator takes for condensed ones of their class",
        "disc: discriminator: condensed and synthetic features told apart",
        "disc_class: discriminator: classes of both named (cond=acgan)",
        "synthetic: student: the host's loss of synthetic images",
        "condensed: student: the host's loss of condensed images",
        "kl",
        "pixels",
        "logits",
        "feature",
        "kld",
        "leak",
    ),
    also="a condensed set (condensed) or a few real images (real), unless lambda_fa=0; a teacher that ends in a linear layer; "
    "host=pre: no BatchNorm; without a set the terms are the host's own",
)

FEW = 10
"""Real images of each class where their number is left open."""


@dataclass
class Expansion(Method):
    """What CDE adds to a host: the discriminator, the feature-alignment term, and condensed images in the student's batches."""

    host: Literal["fast", "cmi", "pre"] = "fast"
    """the inversion that is steered; the other fields are that method's"""
    lambda_fa: Weight = 1.0
    """weight of the feature-alignment loss; 0: no discriminator, condensed images are only pooled"""
    cond: Condition = "proj"
    """how the discriminator judges the class: projection, an auxiliary classifier, or not at all"""
    lr_d: Rate = 2e-4
    """discriminator learning rate (Adam, betas .5 and .999), one step a generator step"""
    disc_aug: Literal["host", "strong"] = "host"
    """what the discriminator's images go through; host: the host's augmentation, the teacher's pass is shared; strong: colour, translation
    and cutout on top (DiffAugment), a second pass of the teacher"""
    kd_mix: Literal["halves", "union"] = "halves"
    """a student's batch; halves: one synthetic and one condensed half, their losses summed; union: drawn from both stores as one"""
    condensed_aug: Augmentation = "crop_flip"
    """augmentation of condensed images in a student step"""
    spc: Count | None = None
    """images of each class that are used: the first of a condensed set (none: all), or real ones drawn by spc_seed (none: 10)"""
    spc_seed: Annotated[int, Field(ge=0)] = 0
    """seed of the real images that are drawn, apart from the run's; a larger spc holds the smaller one's images"""

    # What it is given -----------------------------------------------------------------------------------------------

    def uses_real(self) -> bool:
        return True

    def uses_condensed(self) -> bool:
        return True

    def choose_real(self, found: Any, classes: int) -> CondensedSet:
        if isinstance(found, ImageSet):
            return CondensedSet.of_real(found, classes, FEW if self.spc is None else self.spc, self.spc_seed)
        return found if self.spc is None else found.per_class(self.spc)  # type: ignore[no-any-return]

    def check(self) -> None:
        super().check()
        if getattr(self, "preinverted", False):
            raise ConfigError("method.preinverted and CDE both take the given images; use --set method.preinverted=false.")
        if self.real is None and self.lambda_fa:
            raise ConfigError(
                "method 'cde' needs a condensed set, and none is given; expected --condensed FILE (`fastkd condense` makes one), "
                "a few real images (--set real=SPEC --set method.spc=10), or method.lambda_fa=0, which is the host alone."
            )
        feature = self.teacher(self.blank()).feature
        if self.lambda_fa and (feature is None or feature.dim() != 2):
            raise ConfigError(
                "CDE needs a classifier that ends in a linear layer as its teacher, and none was found in this one; "
                "without its discriminator it runs too (--set method.lambda_fa=0)."
            )
        if self.real is not None and self.kd_mix == "halves" and self.student_batch() % 2:
            n = self.student_batch()
            raise ConfigError(f"a student's batch of {n} has no halves; expected an even number (nearest: {n + 1}).")

    def student_batch(self) -> int:
        """Images of a student step that the halves share, over all ranks."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        if self.real is None:
            return [*super().notes(), f"no condensed set and method.lambda_fa=0: this is {self.host}"]
        kind = "real" if self.real.method == "real" else f"condensed ({self.real.method or 'method not stated'})"
        per_class = " to ".join(map(str, sorted({int(self.real.counts.min()), int(self.real.counts.max())})))
        why = "few-shot" if kind == "real" else "made from real ones"
        return [*super().notes(), f"learns from {len(self.real)} {kind} images, {per_class} a class: {why}, so not free of data"]

    # Discriminator --------------------------------------------------------------------------------------------------

    def build(self) -> None:
        super().build()
        if self.lambda_fa:
            feature = self.teacher(self.blank()).feature
            assert feature is not None  # `check` refused what has none
            self.D = self.place(FeatureDiscriminator(feature.shape[1], self.classes, self.cond))
            self.opt_d = self.adam(self.D.parameters(), lr=self.lr_d, betas=(0.5, 0.999))

    def align(self, x: Tensor, t: Trace, y: Tensor) -> dict[str, Tensor]:
        """One step of the discriminator, then L_FA of the generator against it.

        Args:
          x: [b, C, H, W] synthetic images as the networks see them; t: what the teacher says of them.
          y: int64 [b], their classes; each is set beside one condensed image of the same class, drawn with replacement.
        """
        index = self.real.starts[y] + self.rng.among(self.real.counts[y], name="condensed")
        seen = self.condensed(index, self.aug, "condensed")
        with torch.no_grad():
            f_c = self.teacher(self.strong(seen, "strong")).feature
        f = t.feature if self.disc_aug == "host" else self.teacher(self.strong(x, "strong.synthetic")).feature
        assert f is not None and f_c is not None
        self.minimise(self.discriminator_terms(f_c, f.detach(), y), self.opt_d)
        with self.evaluating(self.D):
            return {"fa": self.lambda_fa * self.alignment(f, y)}

    def discriminator_terms(self, condensed: Tensor, synthetic: Tensor, y: Tensor) -> dict[str, Tensor]:
        """L_D of features [b, d]: condensed ones against synthetic ones of the same classes y."""
        logit, named = self.D(torch.cat([condensed, synthetic]), torch.cat([y, y]))
        real, fake = logit.chunk(2)
        self.tell(disc_accuracy=torch.cat([real > 0, fake < 0]).to(logit.dtype).mean())
        terms = {"disc": losses.gan_real(real) + losses.gan_fake(fake)}
        if named is not None:
            terms["disc_class"] = losses.cross_entropy(named[: len(y)], y) + losses.cross_entropy(named[len(y) :], y)
        return terms

    def alignment(self, f: Tensor, y: Tensor) -> Tensor:
        """L_FA of synthetic features [b, d] (non-saturating), with the class loss of acgan."""
        logit, named = self.D(f, y)
        loss = losses.gan_real(logit)
        return loss if named is None else loss + losses.cross_entropy(named, y)

    def strong(self, x: Tensor, name: str) -> Tensor:
        """What disc_aug=strong puts on top of the host's view."""
        if self.disc_aug == "host":
            return x
        return diff_augment.strong(x, self.rng.uniform(x, 3, diff_augment.DRAWS, name=name))

    # Student --------------------------------------------------------------------------------------------------------

    def condensed(self, index: Tensor, kind: str, name: str) -> Tensor:
        """Condensed images [b, C, H, W] as the networks see them: [0, 1] unclipped → augmented → the teacher's normalised space."""
        return self.unit_view(self.real.images[index].to(self.mean.dtype), kind, name)

    def half(self, batch: int) -> Tensor:
        """Condensed images for `batch` places of a student step, uniform over the set."""
        return self.condensed(self.rng.integers(len(self.real), batch, name="condensed"), self.condensed_aug, "condensed")

    def distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        """The host's loss of a student's logits."""
        raise NotImplementedError

    def both(self, x: Tensor, c: Tensor) -> dict[str, Tensor]:
        """L_S of a synthetic and a condensed half: each with its own mean, weighted alike; one pass of each network."""
        together = torch.cat([x, c])
        with torch.no_grad():
            t = self.teacher(together).logits
        (t, t_c), (s, s_c) = t.split([len(x), len(c)]), self.student(together).split([len(x), len(c)])
        return {"synthetic": self.distance(t, s), "condensed": self.distance(t_c, s_c)}

    def report(self) -> dict[str, float]:
        return super().report() | ({} if self.real is None else {"condensed_images": float(len(self.real))})


class PoolExpansion(Expansion, PoolMethod):  # no dataclass: its copy of PoolMethod's defaults would overrule those of the host
    """On a host with a pool and labels that are drawn."""

    def build(self) -> None:
        super().build()
        if self.real is not None and self.kd_mix == "union":
            self.share = torch.zeros((), device=self.device)  # of the condensed images among all

    def student_batch(self) -> int:
        return self.kd_batch

    def more_terms(self, x: Tensor, t: Trace, s: Trace | None, call: Call) -> dict[str, Tensor]:
        terms = super().more_terms(x, t, s, call)
        return terms | self.align(x, t, self.wanted(t, call)) if self.lambda_fa else terms

    @property
    def dealt(self) -> int:
        return self.kd_batch if self.real is None or self.kd_mix == "union" else self.kd_batch // 2

    @step("memory", eager=True)
    def deal(self) -> None:
        super().deal()
        if self.real is not None and self.kd_mix == "union":
            self.share.fill_(len(self.real) / (len(self.real) + sum(len(s) for s in self.stores())))

    @step("distillation")
    def learn(self) -> None:
        if self.real is None:
            return super().learn()
        x = self.view(self.stores()[0].next(self.dealt), self.kd_aug, name="kd", scale=self.kd_scale)
        self.minimise(self.mixed(x), self.opt_s)

    def mixed(self, x: Tensor) -> dict[str, Tensor]:
        """L_S of a student step with `dealt` images of the pool."""
        c = self.half(self.dealt)
        if self.kd_mix == "halves":
            return self.both(x, c)
        chosen = self.rng.uniform(x, name="union") < self.share
        x = torch.where(chosen[:, None, None, None], c, x)
        with torch.no_grad():
            t = self.teacher(x).logits
        return {"kl": self.distance(t, self.student(x))}

    def distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        return losses.kl_tau(teacher, student, self.tau)


@dataclass
class CdeFast(PoolExpansion, Fast):
    """Defaults: on Fast-10, ResNet-34 → ResNet-18 on CIFAR-10/100; the discriminator's are ours, none are published."""

    per_pixel_with: ClassVar[str] = "method.lambda_fa=0"
    g_steps: Count = 10
    lr_g: Rate = 2e-3


@dataclass
class CdeCmi(PoolExpansion, Cmi):
    """Defaults: on CMI's recipe "scratch"; the discriminator's are ours, none are published."""

    host: Literal["fast", "cmi", "pre"] = "cmi"


@dataclass
class CdePre(Expansion, Pre):
    """Defaults: on PRE-DFKD; a generator without labels is judged by the classes that the teacher names."""

    host: Literal["fast", "cmi", "pre"] = "pre"

    def check(self) -> None:
        super().check()
        if self.kd_mix == "union":
            raise ConfigError("method.kd_mix=union needs a pool, and PRE-DFKD stores no image; use --set method.kd_mix=halves.")

    def student_batch(self) -> int:
        return self.batch

    def more_terms(self, x: Tensor, t: Trace) -> dict[str, Tensor]:
        terms = super().more_terms(x, t)
        return terms | self.align(x, t, t.logits.detach().argmax(1)) if self.lambda_fa else terms

    def update(self, x: Tensor, old: Tensor | None) -> None:
        if self.real is None:
            return super().update(x, old)
        n = self.batch // 2
        x = self.first(x, n)
        self.minimise(self.both(x if old is None else torch.cat([x, old]), self.half(n)), self.opt_s)

    def distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        return self.gap(teacher, student)


def host(table: dict[str, Any]) -> type[Expansion]:
    """The class for a table of fields."""
    classes: dict[str, type[Expansion]] = {"cmi": CdeCmi, "pre": CdePre}
    return classes.get(str(table.get("host")), CdeFast)
