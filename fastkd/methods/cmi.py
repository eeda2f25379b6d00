"""CMI: every batch is a fresh inversion whose images must be told apart, from a local view, among all images made before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.memory import Best, Store
from fastkd.method import Count, Rate, Share, Step, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._pool import Call, PoolMethod
from fastkd.nn import Trace
from fastkd.nn.trace import sample_means

CARD = Card(
    paper="Fang et al., Contrastive Model Inversion for Data-Free Knowledge Distillation",
    venue="IJCAI",
    year=2021,
    basis="code",
    source="zju-vipa/CMI",
    needs=("bn",),
    terms=("bn", "oh", "adv", "cr", "kl"),
    also="preinverted: images that were inverted before (real)",
)

RESNET34 = (36, 8512)
"""BatchNorm layers and channels of the one teacher that the published code taps at its stages."""


@dataclass
class Cmi(PoolMethod):
    """Defaults: the released recipe "scratch", WRN-40-2 → WRN-16-1 on CIFAR-10 [code]. The tables' CMI-500 has g_steps=500."""

    epochs: Count = 200
    warmup: Annotated[int, Field(ge=0)] = 0
    kd_batch: Count = 128
    lr: Rate = 0.1
    eta_min: Weight = 0.0
    oh: Weight = 1.0
    bn: Weight = 1.0
    adv: Weight = 0.5
    bn_mmt: Share = 0.0
    nz: Count = 256
    """latent size"""
    g_steps: Count = 200
    """steps of a call; each call starts with a new generator"""
    rounds: Count = 1
    """rounds an epoch: a call, then kd_steps / rounds student steps"""
    lr_g: Rate = 1e-3
    """learning rate of generator and latents; a fresh Adam every call"""
    lr_head: Rate = 1e-3
    """learning rate of the projection head, whose Adam lives as long as the run"""
    head_width: Count = 256
    """outputs of the projection head"""
    cr: Weight = 0.8
    """weight of the contrastive loss; 0: no head, no bank, no local view"""
    cr_T: Rate = 0.1
    """temperature of the contrastive loss (0.2 in one of the released scripts)"""
    local_scale: Annotated[float, Field(gt=0, le=1)] = 0.25
    """smallest share of the area that a local view keeps"""
    bank_rows: Count = 40_960
    """images whose features are kept; the oldest go first"""
    bank_draw: Count = 4096
    """rows of the bank that a step compares with"""
    bank_dtype: Literal["fp16", "fp32"] = "fp16"
    """how features are kept (fp32 in the release: 886 MB for WRN-40-2)"""
    bank_wrap: Literal["fixed", "released"] = "fixed"
    """released: no row is drawn in the call after exactly bank_rows were written (the published loss is undefined there; here it is
    that of an empty bank)"""
    feature_tap: Literal["auto", "bn_inputs", "stage_inputs", "stage_outputs"] = "auto"
    """what the features are spatial means of; auto: as released, BN inputs, and of a ResNet-34 stage inputs (a comment there intends
    outputs)"""
    preinverted: bool = False
    """the pool starts with the run's `real` images, such as a set that was inverted before"""

    def check(self) -> None:
        super().check()
        self.check_rounds(self.rounds)
        if self.preinverted and self.real is None:
            raise ConfigError("method.preinverted is on, and no images are given; expected --set real=DIR with the pre-inverted set.")
        if self.cr and self.bank_rows < max(self.batch, self.bank_draw):
            least = max(self.batch, self.bank_draw)
            raise ConfigError(f"method.bank_rows is {self.bank_rows}; expected at least batch and bank_draw (nearest: {least}).")
        # Without a global pooling the last stage has no end that is known, and the maps would be those of other stages.
        unknown = self.tap() != "bn_inputs" and self.teacher(self.blank(), "groups").map is None
        if self.cr and (unknown or not self.probe().shape[1]):
            found, other = ("BatchNorm", "stage_outputs") if self.tap() == "bn_inputs" else ("stages", "bn_inputs")
            raise ConfigError(
                f"the contrastive loss compares features at the teacher's {found}, and none are known in this one; "
                f"use --set method.feature_tap={other}, or --set method.cr=0."
            )

    def uses_real(self) -> bool:
        return self.preinverted

    def build(self) -> None:
        self.build_student()
        self.G = self.generator("g_fast", self.nz, init="normal")
        self.z = self.per_sample(self.batch, self.nz)
        self.opt_g = self.adam(self.G.parameters(), [self.z], lr=self.lr_g, betas=(0.5, 0.999))
        found = len(self.real) if self.preinverted else 0
        self.task = self.call(self.shape[-1], self.epochs * self.rounds * self.batch + found)
        self.pool = self.task.pool
        if found:
            self.pool.put(self.real.images, label=self.real.labels)
        if self.cr:
            self.build_contrast(self.probe().shape[1])

    def build_contrast(self, width: int) -> None:
        """Head, bank and the features of the current and of the kept batch, `width` numbers a view."""
        self.head = self.place(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.head_width)))
        self.opt_head = self.adam(self.head.parameters(), lr=self.lr_head)
        dtype = torch.float16 if self.bank_dtype == "fp16" else torch.float32
        # Features, read without `view`: on the device of every rank.
        self.bank = Store(self.rng, self.bank_rows, (2 * width, 1, 1), dtype, ring=True, images="replicated", tier="device")
        self.stored = torch.zeros((), dtype=torch.int64, device=self.device)  # the bank's fill, for steps that are replayed
        self.view_features = self.buffer(self.batch, width)
        self.kept = Best(local=self.buffer(self.batch, width), view=self.buffer(self.batch, width))

    def stores(self) -> list[Store]:
        return [self.pool]

    def epoch(self, e: int) -> Iterator[Step]:
        for _ in range(self.rounds):
            yield self.restart
            for _ in range(self.g_steps):
                yield self.invert
            yield self.remember
            yield from self.student_round(e, self.rounds)

    @step("synthesis", eager=True)
    def restart(self) -> None:
        self.G.reinit()
        self.z.data.copy_(self.rng.normal(self.batch, self.nz))
        self.task.y.copy_(self.rng.labels(self.batch, self.classes))
        self.reset(self.opt_g)
        self.task.best.reset()
        if self.cr:
            self.kept.reset()

    @step("synthesis")
    def invert(self) -> None:
        x = self.G(self.z)
        terms = self.inversion_terms(self.view(x), self.task, self.adv > 0)
        if self.cr:
            near = self.view(x, "resized_crop", name="local", scale=self.local_scale)
            local = self.features(self.teacher(near, *self.tap_asks()))
            terms["cr"] = self.cr * self.contrast(local, self.view_features)
        total = self.minimise(terms, self.opt_g, *([self.opt_head] if self.cr else []))
        self.offer(self.task, total, x)
        if self.cr:
            self.kept.offer(total, always=self.pool_select == "last", local=local, view=self.view_features)

    def contrast(self, local: Tensor, view: Tensor) -> Tensor:
        """L_cr of a batch's features [b, D] against a draw of the bank: unique filled rows, then places that are not filled."""
        order = torch.rand(self.bank_rows, generator=self.rng.whole("bank"), device=self.device)
        order = torch.where(torch.arange(self.bank_rows, device=self.device) < self.stored, order, 2.0)
        index = order.topk(self.bank_draw, largest=False, sorted=True).indices
        old_local, old_view = self.bank.images[index].flatten(1).to(local.dtype).chunk(2, 1)
        with torch.no_grad():
            view, old_view = self.project(view), self.project(old_view)
        return losses.contrast(self.project(local), view, self.project(old_local), old_view, index < self.stored, self.cr_T)

    def project(self, features: Tensor) -> Tensor:
        """Rows of unit length [b, head_width]."""
        return F.normalize(self.head(features), dim=1)

    @step("memory", eager=True)
    def remember(self) -> None:
        self.keep(self.task)
        if self.cr:
            self.bank.add(torch.cat([self.kept.rows["local"], self.kept.rows["view"]], 1)[:, :, None, None])
            lost = self.bank_wrap == "released" and self.bank.written == self.bank_rows
            self.stored.fill_(0 if lost else len(self.bank))

    # Features -------------------------------------------------------------------------------------------------------

    def tap(self) -> str:
        """`feature_tap` for this teacher."""
        if self.feature_tap != "auto":
            return self.feature_tap
        return "stage_inputs" if (len(self.teacher.split) - 1, self.teacher.split[-1]) == RESNET34 else "bn_inputs"

    def tap_asks(self) -> tuple[str, ...]:
        return ("moments",) if self.tap() == "bn_inputs" else ("groups",)

    def features(self, t: Trace) -> Tensor:
        """Spatial means of the tapped maps, per sample and side by side: [b, D], at least fp32."""
        if self.tap() == "bn_inputs":
            assert t.moments is not None
            return t.moments
        groups = t.groups or ()
        maps = groups[:-1] if self.tap() == "stage_inputs" else groups[1:]
        wide = [sample_means(m) for m in maps]
        return torch.cat(wide, 1) if wide else t.logits[:, :0]

    def probe(self) -> Tensor:
        """Features of one black image, for their number."""
        return self.features(self.teacher(self.blank(), *self.tap_asks()))

    def asks(self) -> tuple[str, ...]:
        return ("bn", *self.tap_asks()) if self.cr else ("bn",)

    def more_terms(self, x: Tensor, t: Trace, s: Trace | None, call: Call) -> dict[str, Tensor]:
        if self.cr:
            self.view_features.copy_(self.features(t).detach())  # the global view is a constant of the contrastive loss
        return {}
