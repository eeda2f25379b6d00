"""Networks by name: CIFAR and ImageNet classifiers, generators, and the adapters for networks of other packages.

The tables here need no torch; the first use of a function does.

    from fastkd import models
    net = models.build("resnet20", classes=10)
    models.fit(net, models.load_weights("resnet20.safetensors"), what="teacher")
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastkd.errors import ConfigError, nearest, unknown

if TYPE_CHECKING:
    from torch import nn

    from .encoders import encoder
    from .generators import generator
    from .weights import Weights, describe, fit, load_weights, recognise, save_weights

__all__ = [
    "ENCODERS",
    "GENERATORS",
    "MODELS",
    "PREFIXES",
    "ModelEntry",
    "Weights",
    "build",
    "describe",
    "encoder",
    "fit",
    "generator",
    "load_weights",
    "names",
    "recognise",
    "save_weights",
]


@dataclass(frozen=True)
class ModelEntry:
    """One named classifier.

    Attributes:
      target:      "module:function" inside `fastkd.models`; called with classes, channels, input_size and `options`.
      family:      the group it is listed under.
      description: one line.
      options:     what tells this name from its siblings (depth, width, …).
      input_size:  the height and width it is meant for; others work where the network has no fixed-size head.
    """

    target: str
    family: str
    description: str
    options: Mapping[str, Any] = field(default_factory=dict)
    input_size: int = 32


def _table() -> dict[str, ModelEntry]:
    table: dict[str, ModelEntry] = {}
    for depth in (8, 20, 32, 44, 56):
        text = f"thin CIFAR ResNet-{depth}, stages 16/32/64, option-A shortcuts"
        table[f"resnet{depth}"] = ModelEntry("thin_resnet:thin_resnet", "cifar", text, {"depth": depth})
    for depth, kind in ((18, "basic"), (34, "basic"), (50, "bottleneck")):
        text = f"CIFAR ResNet-{depth}, 3x3 stem without max-pooling, stages 64/128/256/512, {kind} blocks"
        table[f"cifar_resnet{depth}"] = ModelEntry("resnet:cifar_resnet", "cifar", text, {"depth": depth})
    for depth, width in ((10, 1), (16, 1), (16, 2), (40, 1), (40, 2)):
        text = f"wide ResNet {depth}-{width}, pre-activation"
        table[f"wrn{depth}_{width}"] = ModelEntry("wrn:wrn", "cifar", text, {"depth": depth, "width": width})
    table["vgg11_bn"] = ModelEntry("vgg:vgg11_bn", "cifar", "VGG-11 with BatchNorm and one linear layer")
    for stride in (1, 2):
        text = f"MobileNetV2 with a stride-{stride} stem"
        table[f"mobilenetv2_s{stride}"] = ModelEntry("mobilenet_v2:mobilenet_v2", "cifar", text, {"stem_stride": stride})
    table["lenet5"] = ModelEntry("lenet:lenet5", "small", "LeNet-5 without padding, 6/16/120 channels")
    table["lenet5_half"] = ModelEntry("lenet:lenet5", "small", "LeNet-5 of half the width, 3/8/60 channels", {"half": True})
    for depth in (3, 4):
        text = f"ConvNet-{depth} of dataset condensation, width 128, instance norm"
        table[f"convnet{depth}"] = ModelEntry("convnet:convnet", "small", text, {"depth": depth}, 32 if depth == 3 else 64)
    for depth in (8, 14, 20, 26, 32):
        text = f"small ResNet-{depth} with a 64-channel stem and a 2x2 pooled head (karanchahal/distiller)"
        table[f"karanchahal_resnet{depth}"] = ModelEntry("karanchahal:karanchahal_resnet", "karanchahal", text, {"depth": depth})
    for depth in (10, 16, 28):
        text = f"wide ResNet {depth}-1 with that code base's keys (karanchahal/distiller)"
        table[f"karanchahal_wrn{depth}_1"] = ModelEntry("wrn:karanchahal_wrn", "karanchahal", text, {"depth": depth, "width": 1})
    for depth in (18, 34, 50):
        text = f"ImageNet ResNet-{depth}, keys as in torchvision"
        table[f"resnet{depth}"] = ModelEntry("resnet:resnet", "imagenet", text, {"depth": depth}, 224)
    table["mobilenet_v2"] = ModelEntry("mobilenet_v2:mobilenet_v2", "imagenet", "MobileNetV2, keys as in torchvision", {}, 224)
    text = "SqueezeNet 1.1 without BatchNorm, keys as in torchvision"
    table["squeezenet1_1"] = ModelEntry("squeezenet:squeezenet1_1", "imagenet", text, {}, 224)
    for percent in (25, 50, 75, 100):
        text = f"MobileNet v1 x{percent / 100:g}, TensorFlow padding"
        table[f"mobilenet_v1_x{percent:03d}"] = ModelEntry("mobilenet_v1:mobilenet_v1", "imagenet", text, {"alpha": percent / 100}, 224)
    for suffix, more, said in (
        ("", {}, "rates 12/24/36"),
        ("_dfad", {"rates": (12, 24, 32), "pad_input": True}, "rates 12/24/32, as DFAD has it"),
    ):
        for trunk, name in (("resnet50", "ResNet-50"), ("mobilenet_v2", "MobileNetV2")):
            text = f"DeepLabV3 on a dilated {name} at 1/8, {said}; a class for each pixel"
            table[f"deeplabv3_{trunk}{suffix}"] = ModelEntry("deeplab:deeplabv3", "segmentation", text, {"trunk": trunk, **more}, 128)
    text = "EfficientNet-Lite0, TensorFlow padding, ReLU6, no squeeze-and-excitation"
    table["efficientnet_lite0"] = ModelEntry("efficientnet_lite:efficientnet_lite0", "imagenet", text, {}, 224)
    return table


MODELS: dict[str, ModelEntry] = _table()
"""Every classifier that a plain name means."""

PREFIXES: dict[str, str] = {
    "timm": "timm:NAME, a network of the timm package (extra [timm])",
    "torchvision": "torchvision:NAME, a network of torchvision (extra [vision])",
    "py": "py:FILE:FUNCTION, a function of your own that returns the network",
    "ckpt": "ckpt:RUN_DIR, the student of a run",
}
"""What may stand before a colon in a model specification."""

GENERATORS: dict[str, str] = {
    "g_fast": "FastDFKD, CMI: width 128, Sigmoid, images in [0, 1]",
    "g_large": "CMI's GAN baselines: width 256, Sigmoid, images in [0, 1]",
    "g_dafl": "DAFL: BN eps 0.8, Tanh and BatchNorm without affine, normalised images",
    "g_pre": "PRE-DFKD, MB-DFKD, LRA: as g_dafl with spectral norm, U(-.08, .08)",
    "g_mem": "PRE-DFKD memory decoder: as g_dafl, U(-.08, .08)",
    "g_dfad_a": "DFAD classification: Tanh and BatchNorm without affine, normalised images",
    "g_zskt": "ZSKT: affine BatchNorm head without squashing, normalised unbounded images",
    "g_deep": "FastDFKD ImageNet: latent map, four doublings, Sigmoid, images in [0, 1]",
    "g_dfad_b": "DFAD 128x128: transposed convolutions, Tanh, images in (-1, 1)",
    "g_dfq": "DFQ: width 512, three doublings, Tanh and BatchNorm without affine, normalised images",
    "g_nl": "NAYER: label embeddings through noisy linear layers, then g_fast's convolutions; takes labels",
    "g_nl_deep": "NAYER ImageNet: as g_nl with four doublings; takes labels",
}
"""Every generator, with one line each."""

ENCODERS: dict[str, str] = {"enc_pre": "PRE-DFKD: images to mean and log-variance of a latent"}
"""Every encoder, with one line each."""

_LAZY = {
    "encoder": "encoders",
    "generator": "generators",
    "Weights": "weights",
    "describe": "weights",
    "fit": "weights",
    "load_weights": "weights",
    "recognise": "weights",
    "save_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastkd.models' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def names() -> list[str]:
    """The classifiers that a plain name means, in the order of the table."""
    return list(MODELS)


def build(spec: str, *, classes: int, channels: int = 3, input_size: int | tuple[int, int] | None = None) -> nn.Module:
    """A classifier with fresh weights (torch's global generator, default floating dtype).

    Args:
      spec:       NAME, timm:NAME, torchvision:NAME or py:FILE:FUNCTION.
      classes:    number of logits, at least 2.
      channels:   image channels, at least 1.
      input_size: height and width of the images, only needed by networks whose head depends on it; None: the name's own.
    Returns:
      a module, images [N, channels, H, W] → logits [N, classes], of segmentation networks [N, classes, H, W].
    Raises:
      ConfigError: an unknown name, prefix or value, or an adapter that cannot deliver.
    """
    if classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, found {classes}.")
    if channels < 1:
        raise ConfigError(f"images need at least 1 channel, found {channels}.")
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if size is not None and min(size) < 1:
        raise ConfigError(f"the input size must be positive, found {size[0]} x {size[1]}.")
    if spec in MODELS:
        entry = MODELS[spec]
        module, _, function = entry.target.partition(":")
        make = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return make(classes=classes, channels=channels, input_size=size or (entry.input_size,) * 2, **entry.options)
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in PREFIXES:
        if not rest:
            raise ConfigError(f"nothing stands behind '{prefix}:'; expected {PREFIXES[prefix]}.")
        if prefix == "ckpt":
            raise ConfigError(f"'{spec}' means the student of a run, which only the commands of a run resolve; expected a network here.")
        adapters = importlib.import_module(f"{__name__}.adapters")
        return getattr(adapters, f"from_{prefix}")(rest, classes=classes, channels=channels, input_size=size)
    raise ConfigError(_not_known(spec, prefix if colon else ""))


def _not_known(spec: str, prefix: str) -> str:
    """The sentence for a specification that means nothing."""
    if prefix and os.sep not in prefix and "/" not in prefix:
        return unknown("model prefix", prefix, PREFIXES)
    if "/" in spec or os.sep in spec:
        name, close = spec.rsplit("/", 1)[-1], "timm:NAME"
        if ".py" in name:
            close = f"py:{spec}" if ":" in name else f"py:{spec}:FUNCTION"
        elif os.path.isdir(spec):
            close = f"ckpt:{spec}"
        elif name.endswith((".safetensors", ".pth", ".pt", ".th")):
            options = "--teacher-weights or --student-weights"
            return f"'{spec}' is a file of weights, not a model; name the model and give the file as {options}."
        elif "torchvision" in spec or spec.startswith("pytorch/"):
            close = f"torchvision:{name}"
        elif name in MODELS or nearest(name, MODELS):
            close = nearest(name, MODELS) or name
        else:
            close = f"timm:{name}"
        return f"a model name with a slash needs a prefix, found '{spec}'; did you mean '{close}'? Prefixes: {', '.join(PREFIXES)}."
    return unknown("model", spec, MODELS)
