"""How good the student is: accuracy or mIoU on a data set, or, without data, agreement with the teacher on synthetic images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import ranks
from fastkd.data.image_set import IGNORE
from fastkd.errors import InputError
from fastkd.method import Method
from fastkd.nn.augment import normalise
from fastkd.nn.freeze import in_eval

SCORES = ("top1", "miou")
"""The scores that a network is judged by, each by its kind of data."""


def headline(data: Any) -> str:
    """The score by which networks are judged on an `ImageSet` (None: on images with one label)."""
    return "miou" if data is not None and data.dense else "top1"


class Interrupted(Exception):
    """A rank was asked to stop while a network was measured."""


Asked = Callable[[], bool]
"""Whether any rank was asked to stop; a collective."""


def measure(net: nn.Module, data: Any, mean: Tensor, std: Tensor, asked: Asked | None = None) -> dict[str, float]:
    """All scores of `net` on `data` (see `accuracy` and `segmentation`), its headline first; in 0 … 1.

    Args:
      asked: looked at before each batch, which may be minutes before the last one.
    Raises:
      InputError: answers for whole images where `data` has labels of pixels, or the other way round. Interrupted: see `asked`.
    """
    if data.dense:
        dense = segmentation(net, data, mean, std, asked=asked)
        return {"miou": dense.miou, "pixel_accuracy": dense.pixel_accuracy}
    result = accuracy(net, data, mean, std, asked=asked)
    return {"top1": result.top1, "top5": result.top5}


@dataclass(frozen=True)
class Result:
    """Share of images whose class is named first, and among the first five; in 0 … 1."""

    top1: float
    top5: float
    images: int


def batches(images: Tensor, mean: Tensor, std: Tensor, size: int, asked: Asked | None = None, least: int = 0) -> Any:
    """Normalised batches [b, C, H, W] of uint8 images [N, H, W, C] with the slice they came from; no crop, no flip.

    Args:
      asked: see `measure`; looked at while no more than `least` images, which every rank has, are through.
    """
    for start in range(0, images.shape[0], size):
        if asked is not None and start < least and asked():
            raise Interrupted
        x = images[start : start + size].permute(0, 3, 1, 2).to(mean.dtype) / 255
        yield slice(start, start + size), normalise(x, mean, std)


@torch.no_grad()
def accuracy(net: nn.Module, data: Any, mean: Tensor, std: Tensor, batch: int = 500, asked: Asked | None = None) -> Result:
    """Top-1 and top-5 of `net` in eval mode on all images of `data`, split over the ranks.

    Args:
      data: an `ImageSet` on the device of `net`.
      mean, std: [C] constants that the network was trained with.
    """
    images, labels = ranks.local(data.images), ranks.local(data.labels)
    hits = torch.zeros(2, dtype=torch.float64, device=mean.device)
    with in_eval(net):
        for rows, x in batches(images, mean, std, batch, asked, len(data.images) // ranks.world()):
            logits = _logits(net, x)
            if logits.dim() != 2:
                raise InputError(
                    f"the network answers for each pixel, '{data.name}' has one label an image; expected data with labels of pixels"
                )
            top = logits.topk(min(5, logits.shape[1]), 1).indices == labels[rows, None]
            hits += torch.stack([top[:, 0].sum(), top.sum()])
    top1, top5 = (ranks.total(hits) / len(data.labels)).tolist()
    return Result(top1, top5, len(data.labels))


@dataclass(frozen=True)
class DenseResult:
    """Mean over the classes of intersection over union, share of pixels whose class is named; in 0 … 1. `iou`: of each class, nan where
    it is neither named nor to be found."""

    miou: float
    pixel_accuracy: float
    iou: tuple[float, ...]
    images: int


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, [C]; nan where a class is in neither.

    Args:
      confusion: [C, C] floating, number of pixels by label (row) and answer (column).
    """
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


@torch.no_grad()
def segmentation(net: nn.Module, data: Any, mean: Tensor, std: Tensor, batch: int = 16, asked: Asked | None = None) -> DenseResult:
    """mIoU of `net` in eval mode on all pixels of `data` that have a label, from one confusion table over all images and ranks.

    Args:
      data: a dense `ImageSet` on the device of `net`; images of any size.
      mean, std: [C] constants that the network was trained with.
    """
    c = data.classes
    images, labels = ranks.local(data.images), ranks.local(data.labels)
    table = torch.zeros(c * c + 1, dtype=torch.float64, device=mean.device)  # the last place takes what is ignored
    with in_eval(net):
        for rows, x in batches(images, mean, std, batch, asked, len(data.images) // ranks.world()):
            logits, y = _logits(net, x), labels[rows]
            if logits.shape[2:] != y.shape[1:]:
                found = f"a map of {' x '.join(map(str, logits.shape[2:]))}" if logits.dim() > 2 else "one label"
                raise InputError(f"the network answers with {found}, '{data.name}' has labels of {y.shape[1]} x {y.shape[2]} pixels")
            pairs = torch.where(y == IGNORE, c * c, y * c + logits.argmax(1))
            table += torch.bincount(pairs.flatten(), minlength=len(table))
    confusion = ranks.total(table)[:-1].view(c, c)
    each, share = iou(confusion), confusion.diagonal().sum() / confusion.sum()
    return DenseResult(float(each.nanmean()), float(share), tuple(each.tolist()), len(data.labels))


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    """What a network, or a teacher, answers."""
    out = net(x)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def health(method: Method, n: int) -> dict[str, Tensor]:
    """[] values on the device over up to `n` of the newest synthetic images; empty where there are none yet. A collective.

    agreement: share on which student and teacher name the same class. confidence: mean of the teacher's largest probability. balance:
    entropy of the classes that the teacher names over the log of how many could be named, 1 = even. distance: root mean square
    difference of two different images in the teacher's normalised units, where photographs have about 1.
    """
    x = method.sample(n)
    if x is None or not len(x):
        return {}
    teacher = method.teacher(x).logits
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    with method.evaluating(method.student):
        student = method.student(x)
    named = teacher.argmax(1).flatten()  # of images, or of the pixels of dense predictions
    share = torch.bincount(named, minlength=method.classes).to(teacher.dtype) / len(named)
    entropy = -(share * share.clamp_min(1e-12).log()).sum() / torch.log(torch.tensor(float(max(2, min(method.classes, len(named))))))
    same = (teacher.argmax(1) == student.argmax(1)).to(teacher.dtype).mean()
    return {
        "agreement": same,
        "confidence": F.softmax(teacher, 1).amax(1).mean(),
        "balance": entropy.to(same),
        "distance": (2 * x.var(0, unbiased=len(x) > 1).mean()).sqrt().to(same),
    }
