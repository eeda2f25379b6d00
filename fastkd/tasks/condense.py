"""Makes a condensed set of real data: a few learned images a class on which a network trains as on all of them. A Method like any other.

DM (Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023), DC ("Dataset Condensation with Gradient Matching", ICLR
2021) and DSA ("Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastkd import assemble, losses, models, ranks
from fastkd.config import CondenseConfig
from fastkd.data import condensed
from fastkd.engine.events import Listener
from fastkd.errors import ConfigError
from fastkd.method import Method, Phase, Step, step
from fastkd.models.generators import reinitialise
from fastkd.nn import diff_augment
from fastkd.tasks.real_data import Opened, make_job, open_data

LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
"""Images a class → image steps of a network of DC, and epochs of the network between two of them."""
BATCH = 256
"""Synthetic images of a step that trains a network on them."""


@dataclass
class Condense(Method):
    """The images are the only state that is kept; the networks that judge them are drawn anew. Images in normalised space, never clipped.

    After each epoch the run's student, a fresh network, is trained on the set as it is: its accuracy is that of the set.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    space: ClassVar[Literal["unit", "normalised"]] = "normalised"
    method: Literal["dm", "dc", "dsa"] = "dm"
    net: str = "convnet3"
    ipc: int = 10
    epochs: int = 20
    iterations: int = 1000
    batch: int = 256
    aug: str = "dsa"
    init: Literal["real", "noise"] = "real"
    lr: float = 1.0
    momentum: float = 0.5
    lr_net: float = 0.01
    chunk: int = 4096
    eval_steps: int = 1000

    def build(self) -> None:
        labels = self.real.labels
        counts = torch.bincount(labels, minlength=self.classes)
        self.each, self.most = min(self.batch, int(counts.min())), int(counts.max())
        self._members = (torch.argsort(labels, stable=True), counts.cumsum(0) - counts, counts)  # constants: no state
        self.labels = torch.arange(self.classes, device=self.device).repeat_interleave(self.ipc)
        self.images = nn.Parameter(self.first_images())
        self.opt = self.sgd([self.images], lr=self.lr, momentum=self.momentum)
        self.judge = self.place(models.build(self.net, classes=self.classes, channels=self.shape[0], input_size=self.shape[1]))
        self.opt_judge = self.sgd(self.judge.parameters(), lr=self.lr_net, momentum=0.0)
        self.opt_s = self.sgd(self.student.parameters(), lr=self.lr_net, momentum=0.9, weight_decay=5e-4)
        self.student.train()

    def first_images(self) -> Tensor:
        """[classes · ipc, C, H, W], class after class: real images of the class, no two alike, or noise."""
        n = self.classes * self.ipc
        if self.init == "noise":
            return torch.randn(n, *self.shape, generator=self.rng.whole("images"), device=self.device)
        return self.real_images(self.members(self.ipc, "images")).flatten(0, 1)

    # The algorithm box ----------------------------------------------------------------------------------------------

    def epoch(self, e: int) -> Iterator[Step]:
        for _ in range(self.iterations):
            yield self.redraw
            if self.method == "dm":
                yield self.match_means
                continue
            outer, inner = LOOPS[max(i for i in LOOPS if i <= self.ipc)]
            for k in range(outer):
                yield self.match_gradients
                if k < outer - 1:
                    for _ in range(inner):
                        yield self.fit
        yield self.restart
        for i in range(self.eval_steps):
            if i in (0, self.eval_steps // 2):
                yield self.anneal, i
            yield self.learn

    @step("synthesis", eager=True)
    def redraw(self) -> None:
        reinitialise(self.judge, "default")

    @step("synthesis")
    def match_means(self) -> None:
        """DM: for each class the mean features of real and of synthetic images, both augmented alike, in a network that knows nothing."""
        index, group, u = self.members(self.each, "real")[:, self.rows(self.each)], *self.drawn(self.classes, "siamese")
        n = max(1, self.chunk // index.shape[1])  # classes of one pass; instance norm does not couple images, so any number gives the same
        parts = []
        with self.frozen(self.judge):
            for at in range(0, self.classes, n):
                some = slice(at, at + n)
                with torch.no_grad():
                    real = self.features(self.augmented(self.real_images(index[some]), group[some], u[some]), len(group[some]))
                made = self.features(self.augmented(self.by_class()[some], group[some], u[some]), len(group[some]))
                parts.append(losses.mean_match(real, made))
        self.minimise({"dm": torch.stack(parts).sum()}, self.opt)

    @step("synthesis")
    def match_gradients(self) -> None:
        """DC and DSA: for each class the network's gradients on real and on synthetic images."""
        index, group, u = self.members(self.each, "real")[:, self.rows(self.each)], *self.drawn(self.classes, "siamese")
        weights: list[Tensor] = list(self.judge.parameters())
        parts = []
        for c in range(self.classes):
            one = slice(c, c + 1)
            real = self.gradients(self.loss(self.augmented(self.real_images(index[one]), group[one], u[one]), c), weights)
            made = self.gradients(self.loss(self.augmented(self.by_class()[one], group[one], u[one]), c), weights, create_graph=True)
            parts.append(losses.gradient_distance(real, made))
        self.minimise({self.method: torch.stack(parts).sum()}, self.opt)

    @step("synthesis")
    def fit(self) -> None:
        """One epoch of the judging network on the synthetic set."""
        for rows in self.rng.permutation(len(self.labels), "fit").split(BATCH):
            self.minimise({"fit": self.supervised(self.judge, rows)}, self.opt_judge)

    # The set's own test ---------------------------------------------------------------------------------------------

    @step("distillation", eager=True)
    def restart(self) -> None:
        reinitialise(self.student, "default")
        self.reset(self.opt_s)

    @step("distillation", eager=True)
    def anneal(self, i: int) -> None:
        self.set_lr(self.opt_s, self.lr_net * (0.1 if i else 1.0))

    @step("distillation")
    def learn(self) -> None:
        rows = self.rng.permutation(len(self.labels), "learn")[:BATCH]
        self.minimise({"ce": self.supervised(self.student, rows)}, self.opt_s)

    # Parts ----------------------------------------------------------------------------------------------------------

    def members(self, n: int, name: str) -> Tensor:
        """`n` different training images of each class, the same on all ranks: int64 [classes, n]."""
        order, starts, counts = self._members
        keys = torch.rand(self.classes, self.most, generator=self.rng.whole(name), device=self.device)
        keys = torch.where(torch.arange(self.most, device=self.device) < counts[:, None], keys, 2.0)
        return order[starts[:, None] + keys.topk(n, largest=False).indices]

    def real_images(self, index: Tensor) -> Tensor:
        """Training images by their numbers [n, m], in normalised space: [n, m, C, H, W]."""
        x = self.real.images[index.flatten()].permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        return self.unit_view(x, "none").unflatten(0, index.shape)

    def by_class(self) -> Tensor:
        """The synthetic images, [classes, ipc, C, H, W]."""
        return self.images.unflatten(0, (self.classes, self.ipc))

    def drawn(self, n: int, name: str) -> tuple[Tensor, Tensor]:
        """`n` siamese draws, a group [n] and its numbers [n, DRAWS]; the same on all ranks."""
        groups = len(diff_augment.GROUPS) - (not self.augmentation.flip)  # no flip where the data have none
        u = torch.rand(n, diff_augment.DRAWS, generator=self.rng.whole(f"{name}.u"), device=self.device)
        return self.rng.pick(groups, n, name=f"{name}.group"), u

    def augmented(self, x: Tensor, group: Tensor, u: Tensor) -> Tensor:
        """Images [n, m, C, H, W] of n classes; what equal draws change alike, [n · m, C, H, W]."""
        return (diff_augment.siamese(x, group, u) if self.aug == "dsa" else x).flatten(0, 1)

    def features(self, x: Tensor, classes: int) -> Tensor:
        """What enters the last linear layer of the judging network: [classes, images of each, d]."""
        return self.judge.features(x).flatten(1).unflatten(0, (classes, -1))  # type: ignore[operator,no-any-return]

    def loss(self, x: Tensor, c: int) -> Tensor:
        """The judging network's cross-entropy of images of class `c`."""
        return losses.cross_entropy(self.judge(x), torch.full((len(x),), c, device=self.device))

    def supervised(self, net: nn.Module, rows: Tensor) -> Tensor:
        """Cross-entropy of synthetic images as they are, each augmented by itself; the same on all ranks."""
        x = self.augmented(self.images.detach()[rows, None], *self.drawn(len(rows), "own"))
        return losses.cross_entropy(net(x), self.labels[rows])

    def images_of(self, phase: Phase) -> int:
        return min(BATCH, len(self.labels)) if phase == "distillation" else self.classes * (self.each + self.ipc)

    def notes(self) -> list[str]:
        few = self.each < self.batch
        return [f"the smallest class has {self.each} images, so a step sees {self.each} of each class, not {self.batch}"] if few else []

    def report(self) -> dict[str, float]:
        return {"condensed_images": float(len(self.labels))}


def condense(config: CondenseConfig, out: Path, *, resume: str = "no", listeners: Sequence[Listener] = ()) -> assemble.Outcome:
    """Condense `config.data`; the folder then holds condensed.safetensors, ready for `fastkd run --condensed`, and the network that was
    trained on it (convnet.safetensors).

    Raises:
      ConfigError, InputError, PlaceError: one sentence each, before the first step.
    """
    found = open_data(config.data, config.input_size, config.mean, config.std, "be condensed")
    values = resolved(config, found)
    method = Condense(**values)
    job = make_job("condense", method, method.net, found, config, out_name="convnet.safetensors", resolved=values)
    outcome = assemble.execute(job, out, resume=resume, listeners=listeners)
    if outcome.code == 0 and ranks.rank() == 0:
        about = {"method": method.method, "ipc": method.ipc, "seed": config.seed, "data": found.train.name}
        condensed.write(out / condensed.FILE, method.images, method.labels, method.mean, method.std, about)
    return outcome


def resolved(config: CondenseConfig, found: Opened) -> dict[str, Any]:
    """The fields of `Condense`: what is left open is what the papers use.

    Raises:
      ConfigError: more images a class than there are, or fewer pixels than the network needs.
    """
    if found.train.dense:
        raise ConfigError(f"'{config.data}' has labels of pixels, which cannot be condensed; expected one label an image.")
    fewest = int(found.train.labels.bincount(minlength=found.classes).min())
    dm = config.method == "dm"
    init = config.init or ("noise" if config.method == "dc" else "real")
    least = config.ipc if init == "real" else 1
    if fewest < least:
        raise ConfigError(f"ipc is {config.ipc}, the smallest class of '{config.data}' has {fewest} images; expected at most that many.")
    return {
        "method": config.method,
        "ipc": config.ipc,
        "net": config.net or ("convnet4" if min(found.shape[1:]) >= 64 else "convnet3"),
        "epochs": config.epochs,
        "iterations": config.iterations or (1000 if dm else 50),
        "batch": config.batch,
        "aug": config.aug or ("off" if config.method == "dc" else "dsa"),
        "init": init,
        "lr": config.lr or (0.1 if not dm else 10.0 if config.ipc >= 100 else 1.0),
        "momentum": config.momentum,
        "lr_net": config.lr_net,
        "chunk": config.chunk,
        "eval_steps": config.eval_steps,
    }
