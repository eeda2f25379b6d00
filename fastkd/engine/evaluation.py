"""How good the student is: accuracy on a data set, or, without data, agreement with the teacher on synthetic images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import ranks
from fastkd.method import Method
from fastkd.nn.augment import normalise


@dataclass(frozen=True)
class Result:
    """Share of images whose class is named first, and among the first five; in 0 … 1."""

    top1: float
    top5: float
    images: int


def batches(images: Tensor, mean: Tensor, std: Tensor, size: int) -> Any:
    """Normalised batches [b, C, H, W] of uint8 images [N, H, W, C] with the slice they came from; no crop, no flip."""
    for start in range(0, images.shape[0], size):
        x = images[start : start + size].permute(0, 3, 1, 2).to(mean.dtype) / 255
        yield slice(start, start + size), normalise(x, mean, std)


@torch.no_grad()
def accuracy(net: nn.Module, data: Any, mean: Tensor, std: Tensor, batch: int = 500) -> Result:
    """Top-1 and top-5 of `net` in eval mode on all images of `data`, split over the ranks.

    Args:
      data: an `ImageSet` on the device of `net`.
      mean, std: [C] constants that the network was trained with.
    """
    was_training = net.training
    net.eval()
    images, labels = ranks.local(data.images), ranks.local(data.labels)
    hits = torch.zeros(2, dtype=torch.float64, device=mean.device)
    for rows, x in batches(images, mean, std, batch):
        logits = net(x)
        logits = logits if isinstance(logits, Tensor) else logits.logits
        top = logits.topk(min(5, logits.shape[1]), 1).indices == labels[rows, None]
        hits += torch.stack([top[:, 0].sum(), top.sum()])
    net.train(was_training)
    top1, top5 = (ranks.total(hits) / len(data.labels)).tolist()
    return Result(top1, top5, len(data.labels))


@torch.no_grad()
def without_data(method: Method, n: int = 512) -> dict[str, float]:
    """On the newest synthetic images: share on which student and teacher agree, the teacher's mean confidence, and its
    class balance (entropy of its named classes over log C, 1 = even). Empty where a method has made no image yet."""
    x = method.sample(n)
    if x is None or not len(x):
        return {}
    teacher = method.teacher(x).logits
    with method.evaluating(method.student):
        student = method.student(x)
    named = teacher.argmax(1).flatten()  # of images, or of the pixels of dense predictions
    share = torch.bincount(named, minlength=method.classes).to(teacher.dtype) / len(named)
    entropy = -(share * share.clamp_min(1e-12).log()).sum() / torch.log(torch.tensor(float(method.classes)))
    same = (teacher.argmax(1) == student.argmax(1)).to(teacher.dtype).mean()
    confidence = F.softmax(teacher, 1).amax(1).mean()
    names = ("agreement", "confidence", "balance")
    return dict(zip(names, torch.stack([same, confidence, entropy.to(same)]).tolist(), strict=True))
