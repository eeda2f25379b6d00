"""MUSE: NAYER at low resolutions, with class activation maps pushed towards the image centre and embedding diversity."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import losses
from fastkd.errors import ConfigError
from fastkd.memory import Rows
from fastkd.method import Rate, Weight, step
from fastkd.methods._card import Card
from fastkd.methods._pool import Call
from fastkd.methods.nayer import Nayer
from fastkd.nn import Trace
from fastkd.ops import class_activation_map

CARD = Card(
    paper="Tran et al., Large-Scale Data-Free Knowledge Distillation for ImageNet via Multi-Resolution Data Generation (arXiv 2411.17046)",
    venue="arXiv",
    year=2024,
    basis="reconstructed",
    source="abstract, figure captions and public reviews, on top of NAYER: MUSE-style, no reproduction",
    needs=("bn", "embeddings"),
    terms=(
        "bn",
        "oh",
        "adv",
        "cam: generator: class activation maps towards the image centre",
        "aed: generator: embeddings of new images far from their label's",
        "kl",
        "ed: student: embeddings of stored images close to their label's",
    ),
    also="a_cam: a teacher that ends in pooling and a linear layer, or cam_weights=gradient; a_ed, a_aed: a student with a linear head",
)


@dataclass
class Muse(Nayer):
    """The schedule is NAYER's; each switch is a decision that the public sources leave open."""

    resolutions: tuple[int, ...] = ()
    """resolutions of the generated images; empty: the nominal one, and for 224-px networks 64, 96, 128"""
    res_schedule: Literal["cycle", "random", "remaining"] = "cycle"
    """which resolution a loop takes; remaining: in proportion to the pixels still to make"""
    generators: Literal["separate", "shared"] = "separate"
    """shared: one convolution stack for all resolutions"""
    budget: Literal["pixels", "images"] = "pixels"
    """what equals the host's schedule: one 224-px image is four of 112 px"""
    a_cam: Weight = 1.0
    """weight of the CAM term"""
    cam_layer: Literal["last", "pre_last_stage"] = "last"
    """the map before pooling, or before the last stride (a backward through the tail)"""
    cam_weights: Literal["linear", "gradient"] = "linear"
    """channel weights: rows of the head, or the logit's mean gradient, detached (any head)"""
    cam_norm: Literal["minmax", "relu_max"] = "minmax"
    """how a map is scaled to [0, 1]"""
    cam_norm_grad: bool = False
    """gradient through minimum and maximum"""
    cam_compare: Literal["cam", "image"] = "cam"
    """at the map's resolution, or bilinearly at the image's"""
    cam_sigma: Rate = 0.25
    """width of the Gaussian target in map heights"""
    cam_at: Literal["all", "below"] = "all"
    """all resolutions, or only those below the nominal one"""
    a_ed: Weight = 5.0
    """weight of the embedding term of the student"""
    r: Weight = 0.015
    """hinge radius of the embedding term, for tables of mean norm 10"""
    a_aed: Weight = 1.0
    """weight of the adversarial embedding term of the generator"""
    aed_mask: Literal["agree", "none"] = "agree"
    """only images on which student and teacher agree, or all"""
    aed_cap: Rate | None = None
    """upper bound of a distance in the adversarial term"""
    ed_space: Literal["table", "l2", "standardised"] = "table"
    """label embeddings as given, of unit length, or standardised over classes"""
    head: Literal["joint", "detached"] = "joint"
    """detached: the embedding term trains the linear head only, not the student"""
    kd_resolution: Literal["native", "nominal"] = "native"
    """resolution at which the student learns"""
    kd_pool_choice: Literal["images", "pixels"] = "images"
    """what a pool's share of the student steps follows"""
    aug_synth: Literal["auto", "crop_flip", "resized_crop", "none"] = "auto"
    """auto: `aug` up to 64 px, resized_crop above"""
    bn_low: Weight = 1.0
    """factor of the BN term below the nominal resolution"""

    def check(self) -> None:
        super().check()
        if self.a_cam:
            t = self.teacher(self.blank(), "groups")
            if self.cam_layer == "last" and t.map is None:
                raise ConfigError(
                    "the CAM term needs the map before a global pooling, and none was found in this teacher; use --set method.a_cam=0."
                )
            groups: tuple[Tensor, ...] = t.groups or ()
            strided = t.map is not None and len(groups) > 1 and groups[-2].shape[-1] > groups[-1].shape[-1]
            if self.cam_layer == "pre_last_stage" and not strided:
                raise ConfigError(
                    "the map before the last stride is not found in this teacher; use --set method.cam_layer=last, or method.a_cam=0."
                )
        if self.a_aed and not self.a_ed:
            raise ConfigError("a_aed needs a_ed > 0, or nothing trains the head that it measures with; use --set method.a_aed=0 as well.")
        if len(set(self.sizes())) < len(self.sizes()) or max(self.sizes()) > self.shape[-1]:
            raise ConfigError(
                f"resolutions are {list(self.sizes())}; expected different ones, none above the teacher's input of {self.shape[-1]} px."
            )
        if self.a_cam and self.cam_weights == "linear" and self.cam_layer == "last" and self.teacher.head is None:
            raise ConfigError(
                f"the CAM term needs a pooling + linear head: {self.teacher.head_reason}; "
                "use --set method.cam_weights=gradient, or method.a_cam=0."
            )
        if (self.a_ed or self.a_aed) and not self.student.feature_dim:
            raise ConfigError(
                "the embedding terms need a student that ends in a linear layer, and this one has none that was found; "
                "use --set method.a_ed=0 --set method.a_aed=0."
            )
        bad = [size for size in self.sizes() if size % 4 or size < 8 or (size > 64 and size % 16)]
        if bad:
            raise ConfigError(
                f"resolution {bad[0]} cannot be generated; "
                f"expected a multiple of 4 from 8 to 64, or of 16 above (nearest: {max(8, round(bad[0] / 16) * 16)})."
            )
        if self.generators == "shared" and len({size > 64 for size in self.sizes()}) > 1:
            raise ConfigError(
                "resolutions up to 64 and above 64 have different generators and cannot share one; "
                "choose all on one side, or method.generators=separate."
            )

    def notes(self) -> list[str]:
        said = super().notes()
        if self.a_ed:
            e = self.table_of_labels().double()
            distance = torch.cdist(e, e, compute_mode="donot_use_mm_for_euclid_dist").square() / e.shape[1]
            distance = distance[distance > 1e-9]  # classes of one name (ImageNet's two cranes) have one embedding
            if len(distance) and self.r > distance.min():
                said.append(
                    f"the hinge radius r = {self.r} exceeds the smallest distance between two label embeddings "
                    f"({distance.min().item():.4f}): the embedding term may stay zero"
                )
        return said

    # Which resolution when: a pure function of the fields -----------------------------------------------------------

    def sizes(self) -> tuple[int, ...]:
        nominal = self.shape[-1]
        return self.resolutions or ((64, 96, 128) if nominal >= 224 else (nominal,))

    def loops(self, e: int) -> list[int]:
        return self._plan[e]

    @functools.cached_property
    def _plan(self) -> list[list[int]]:
        """For each epoch the resolutions of its loops: the host's loops at an equal budget of pixels (or images)."""
        sizes, host = self.sizes(), [len(super(Muse, self).loops(e)) for e in range(self.epochs)]
        scale = {size: (self.shape[-1] / size) ** 2 if self.budget == "pixels" else 1.0 for size in sizes}
        target = {size: sum(host) * scale[size] / len(sizes) for size in sizes}
        draw, made, out = random.Random(f"{self.seed}/schedule"), dict.fromkeys(sizes, 0), []
        done = owed = 0.0
        for loops in host:
            owed += loops * sum(scale.values()) / len(sizes)
            this: list[int] = []
            while round(owed) > done:
                open_ = [size for size in sizes if made[size] + 0.5 <= target[size]]
                done += 1
                if open_:
                    this.append(self._choose(open_, made, target, draw))
                    made[this[-1]] += 1
            out.append(this)
        return out

    def _choose(self, sizes: list[int], made: dict[int, int], target: dict[int, float], draw: random.Random) -> int:
        if self.res_schedule == "cycle":  # in turn: the one with the fewest loops, ties in the order given
            return min(sizes, key=lambda size: made[size])
        weights = [(target[size] - made[size]) * size * size if self.res_schedule == "remaining" else 1.0 for size in sizes]
        return draw.choices(sizes, weights)[0]

    def student_resolutions(self, e: int) -> list[int]:
        """The resolution of each student step of epoch e, drawn in proportion to the images (or pixels) stored by then."""
        made = [size for loops in self._plan[: e + 1] for size in loops]
        weights = [made.count(size) * (size * size if self.kd_pool_choice == "pixels" else 1) for size in self.sizes()]
        return random.Random(f"{self.seed}/resolution/{e}").choices(self.sizes(), weights, k=self.kd_steps)

    # State ----------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        self.targets = self.table_of_labels()
        with torch.random.fork_rng(devices=[]):  # the head must not move the host's initialisation
            self.project = self.place(nn.Linear(self.student.feature_dim or 0, self.targets.shape[1]))
        super().build()
        if self.generators == "shared":
            first = self.G[self.sizes()[0]]
            for size in self.sizes()[1:]:
                self.G[size].conv0, self.G[size].body, self.G[size].head = first.conv0, first.body, first.head
                self.opt_g[size] = self.adam(self.G[size].parameters(), lr=self.lr_g, betas=(0.5, 0.999))

    def table_of_labels(self) -> Tensor:
        """f_y in the space of the embedding terms, [C, d_e]."""
        e = self.embeddings
        assert e is not None
        if self.ed_space == "l2":
            return F.normalize(e, dim=1)
        return (e - e.mean(0)) / (e.var(0, unbiased=False) + 1e-5).sqrt() if self.ed_space == "standardised" else e

    def student_parameters(self) -> list[Tensor]:
        return [*self.student.parameters(), *(self.project.parameters() if self.a_ed else [])]

    # Generator phase ------------------------------------------------------------------------------------------------

    def student_epoch(self, e: int) -> Any:
        if self.trains_student(e):
            yield self.anneal, e - self.warmup
            yield self.deal
            for size in self.student_resolutions(e):
                yield self.learn, size

    def aug_at(self, size: int) -> str:
        if self.aug_synth == "auto":
            return self.aug if size <= 64 else "resized_crop"
        return self.aug_synth

    def asks(self) -> tuple[str, ...]:
        return ("bn", "groups") if self.a_cam and self.cam_layer == "pre_last_stage" else ("bn",)

    def inversion_terms(self, x: Tensor, call: Call, adversary: bool) -> dict[str, Tensor]:
        terms = super().inversion_terms(x, call, adversary)
        if self.bn_low != 1.0 and call.image.shape[-1] < self.shape[-1]:
            terms["bn"] = self.bn_low * terms["bn"]
        return terms

    def more_terms(self, x: Tensor, t: Trace, s: Trace | None, call: Call) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        wanted = self.a_cam and (self.cam_at == "all" or call.image.shape[-1] < self.shape[-1])
        if wanted and self.features_of(t).shape[-2:] != (1, 1):  # a single cell says nothing about where the evidence lies
            cam = self.cam_of(t, call.y, (x.shape[-2], x.shape[-1]))
            h, w = cam.shape[-2:]
            terms["cam"] = self.a_cam * losses.cam_to_mask(cam, losses.gaussian_mask(h, w, self.cam_sigma * h, like=cam))
        if self.a_aed and s is not None and s.feature is not None:
            with self.frozen(self.project):
                distance = losses.embedding_distance(self.project(s.feature), self.targets[call.y])
            mask = losses.agreement(t.logits, s.logits) if self.aed_mask == "agree" else None
            terms["aed"] = self.a_aed * losses.adv_embedding(distance, mask, self.aed_cap)
        return terms

    def features_of(self, t: Trace) -> Tensor:
        """The map that the CAM is made of."""
        features = t.map if self.cam_layer == "last" else t.groups[-2] if t.groups else None
        assert features is not None  # `check` refused what has no map
        return features

    def cam_of(self, t: Trace, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalised activation maps of the labels, [b, h, w]."""
        features = self.features_of(t)
        head = self.teacher.head if self.cam_layer == "last" and self.cam_weights == "linear" else None
        if head is not None:
            weight, labels = head[0], y
        else:  # Grad-CAM's channel weights: one row a sample, so that sample b takes row b
            (g,) = torch.autograd.grad(t.logits.gather(1, y[:, None]).sum(), [features], retain_graph=True)
            weight, labels = g.mean((2, 3)).detach(), torch.arange(len(y), device=y.device)
        return class_activation_map(
            features,
            weight,
            labels,
            relu=self.cam_norm == "relu_max",
            norm="minmax" if self.cam_norm == "minmax" else "max",
            norm_grad=self.cam_norm_grad,
            size=size if self.cam_compare == "image" else None,
        )

    # Student phase --------------------------------------------------------------------------------------------------

    @step("distillation")
    def learn(self, size: int = 0) -> None:
        rows = self.at[size or self.sizes()[0]].pool.next(self.kd_batch)
        x = self.view(rows, self.kd_aug, name="kd", scale=self.kd_scale)
        if self.kd_resolution == "nominal" and size != self.shape[-1]:
            x = F.interpolate(x, self.shape[1:], mode="bilinear", align_corners=False)
        self.learn_from(x, rows)

    def couples(self) -> bool:
        return bool(self.a_ed and self.r)  # the hinge stands over the mean of the batch

    def student_terms(self, x: Tensor, t: Tensor, rows: Rows) -> dict[str, Tensor]:
        if not self.a_ed:
            return super().student_terms(x, t, rows)
        s = self.student.trace(x)
        assert s.feature is not None
        feature = s.feature.detach() if self.head == "detached" else s.feature
        distance = losses.embedding_distance(self.project(feature), self.targets[rows.column("label").long()])
        return {"kl": losses.kl_tau(t, s.logits, self.tau), "ed": self.a_ed * losses.hinge_batch(distance, self.r)}
