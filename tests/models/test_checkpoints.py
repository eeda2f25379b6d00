"""The public pretrained networks: keys fit strictly, and the measured accuracy comes out on real images."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd import models

TABLE = {  # file: (network, top-1 of the complete test set)
    "cifar10/akamaster_resnet20": ("resnet20", 91.73),
    "cifar10/akamaster_resnet32": ("resnet32", 92.63),
    "cifar10/akamaster_resnet44": ("resnet44", 93.10),
    "cifar10/akamaster_resnet56": ("resnet56", 93.39),
    "cifar10/karanchahal_resnet8": ("karanchahal_resnet8", 89.59),
    "cifar10/karanchahal_resnet8_distilled": ("karanchahal_resnet8", 91.00),
    "cifar10/karanchahal_resnet14": ("karanchahal_resnet14", 92.18),
    "cifar10/karanchahal_resnet20": ("karanchahal_resnet20", 93.02),
    "cifar10/karanchahal_resnet26": ("karanchahal_resnet26", 93.41),
    "cifar10/karanchahal_resnet32": ("karanchahal_resnet32", 93.69),
    "cifar10/karanchahal_wrn10_1": ("karanchahal_wrn10_1", 88.06),
    "cifar10/karanchahal_wrn16_1": ("karanchahal_wrn16_1", 91.75),
    "cifar10/karanchahal_wrn28_1": ("karanchahal_wrn28_1", 92.89),
    "cifar100/karanchahal_resnet8": ("karanchahal_resnet8", 64.11),
    "cifar100/karanchahal_resnet14": ("karanchahal_resnet14", 68.30),
    "cifar100/karanchahal_resnet20": ("karanchahal_resnet20", 69.69),
    "cifar100/karanchahal_resnet26": ("karanchahal_resnet26", 71.06),
    "cifar100/karanchahal_resnet32": ("karanchahal_resnet32", 71.69),
    "imagenet/efficientnet_lite0": ("efficientnet_lite0", 92.20),
    "imagenet/mobilenet_v1_075_224": ("mobilenet_v1_x075", 80.70),
    "imagenet/mobilenet_v1_025_224": ("mobilenet_v1_x025", 55.50),
}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def load(folder: Path, file: str) -> tuple[torch.nn.Module, dict]:
    name, _ = TABLE[file]
    weights = models.load_weights(folder / "checkpoints" / f"{file}.safetensors")
    net = models.build(name, classes=CLASSES[file.split("/")[0]])
    assert models.fit(net, weights, what="teacher") == []
    said = models.describe(weights)
    assert said["notes"] == [] and said["classes_in_head"] == CLASSES[file.split("/")[0]]
    return net.eval(), said


@cache
def cifar(folder: Path, data: str) -> tuple[torch.Tensor, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # 10,000 images in one picture
        pixels = np.asarray(Image.open(folder / data / "test_batch.webp"))
    labels = np.load(folder / data / "labels.npz")["test"]
    return torch.from_numpy(pixels.reshape(10000, 32, 32, 3).copy()), torch.from_numpy(labels.astype(np.int64))


@cache
def photographs(folder: Path) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    f = np.load(folder / "imagenet" / "compat1000_224px.npz")
    return f["data"], f["offsets"], torch.from_numpy(f["labels"].astype(np.int64))


def images(folder: Path, data: str, start: int, stop: int) -> torch.Tensor:
    """uint8 [n, H, W, 3]."""
    if data != "imagenet":
        return cifar(folder, data)[0][start:stop]
    raw, offsets, _ = photographs(folder)
    jpegs = [raw[offsets[i] : offsets[i + 1]].tobytes() for i in range(start, stop)]
    return torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(j)).convert("RGB"))) for j in jpegs])


@torch.inference_mode()
def top1(folder: Path, file: str, n: int, batch: int = 250) -> float:
    net, said = load(folder, file)
    data = file.split("/")[0]
    labels = photographs(folder)[2] if data == "imagenet" else cifar(folder, data)[1]
    mean, std = (torch.tensor(said[k])[:, None, None] for k in ("mean", "std"))
    right = 0
    for i in range(0, n, batch if data != "imagenet" else 50):
        stop = min(i + (batch if data != "imagenet" else 50), n)
        x = (images(folder, data, i, stop).permute(0, 3, 1, 2) / 255 - mean) / std
        right += int((net(x.contiguous(memory_format=torch.channels_last)).argmax(1) == labels[i:stop]).sum())
    return 100 * right / n


@pytest.mark.parametrize("file", TABLE)
def test_fits_strictly_and_is_recognised(file, shared_data):
    net, said = load(shared_data, file)
    assert len(said["mean"]) == len(said["std"]) == 3
    with torch.no_grad():
        size = said["input_size"] or 32
        assert torch.isfinite(net(torch.rand(1, 3, size, size))).all()


@pytest.mark.parametrize("file", [f for f in TABLE if not f.startswith("imagenet")])
def test_accuracy_on_the_first_500(file, shared_data):
    assert top1(shared_data, file, 500) >= TABLE[file][1] - 4


@pytest.mark.parametrize("file", [f for f in TABLE if f.startswith("imagenet")])
def test_accuracy_on_the_first_100_photographs(file, shared_data):
    assert top1(shared_data, file, 100) >= TABLE[file][1] - 10  # 100 images: 5 points are one standard deviation


@pytest.mark.slow
@pytest.mark.parametrize("file", TABLE)
def test_accuracy_on_all(file, shared_data):
    measured = top1(shared_data, file, 1000 if file.startswith("imagenet") else 10000)
    print(f"{file} {measured:.2f}")
    tolerance = 0.3 if file.startswith("imagenet") else 0.05
    assert abs(measured - TABLE[file][1]) <= tolerance
