"""Generators of the data-free literature, for any image shape: a latent z to images.

Every generator has `latent` (the shape of one z), `l0` (its first layer with weights), `bn0` (its first BatchNorm2d) and
`reinit()`. All are meant to run in train mode, as published: their BatchNorm layers use batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastkd.errors import ConfigError, unknown
from fastkd.nn.generator_layers import UpConv

from .layers import ToMap

INITS = ("default", "normal", "uniform")
Shape = tuple[int, int, int]


class Generator(nn.Module):
    """What all generators share. `init` is the published distribution of the weights, one of `INITS`."""

    latent: tuple[int, ...]
    l0: nn.Linear | nn.Conv2d
    bn0: nn.BatchNorm2d

    def __init__(self, init: str):
        super().__init__()
        if init not in INITS:
            raise ConfigError(unknown("initialisation", init, INITS))
        self.init = init

    def reinit(self, init: str | None = None) -> None:
        """Draw all weights anew, in place, from torch's global generator; BatchNorm buffers as in a fresh network.

        Args:
          init: "default" (PyTorch's), "normal" (weights N(0, .02), BN N(1, .02), biases 0), "uniform" (convolutions and linear
                layers U(-.08, .08), biases 0, BN 1/0); None: what the generator was made with.
        """
        reinitialise(self, init or self.init)


@torch.no_grad()
def reinitialise(net: nn.Module, init: str) -> None:
    """Draw the weights of every Linear, convolution, BatchNorm and GroupNorm of `net` anew, in place (see `Generator.reinit`)."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            m.reset_parameters()
            if init == "normal" and m.affine:
                nn.init.normal_(m.weight, 1, 0.02)
        elif isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            _reset(m, init)


def _reset(m: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, init: str) -> None:
    normed = hasattr(m, "parametrizations")
    parts: Any = m.parametrizations if normed else None
    weight: Tensor = parts.weight.original if normed else m.weight
    if init == "normal":
        nn.init.normal_(weight, 0, 0.02)
    elif init == "uniform":
        nn.init.uniform_(weight, -0.08, 0.08)
    else:
        nn.init.kaiming_uniform_(weight, a=5**0.5)  # what reset_parameters of these layers does
    if m.bias is not None:
        if init == "default":
            fan_in = weight[0].numel()
            nn.init.uniform_(m.bias, -(fan_in**-0.5), fan_in**-0.5)
        else:
            nn.init.zeros_(m.bias)
    if normed:  # the singular vectors belong to the old weight: start them afresh, close to the new one's
        norm = parts.weight[0]
        matrix = weight.flatten(1)
        u, v = torch.randn_like(norm._u), norm._v
        for _ in range(15):
            v = nn.functional.normalize(matrix.mT @ u, dim=0, eps=norm.eps)
            u = nn.functional.normalize(matrix @ v, dim=0, eps=norm.eps)
        norm._u.copy_(u)
        norm._v.copy_(v)


def grid(name: str, shape: Shape, factor: int) -> tuple[int, int]:
    """Height and width of the first map of a generator that enlarges it by `factor`.

    Raises:
      ConfigError: the image is no multiple of `factor`.
    """
    _, height, width = shape
    if height % factor or width % factor or min(height, width) < factor:
        raise ConfigError(f"{name} makes images whose height and width are multiples of {factor}, found {height} x {width}.")
    return height // factor, width // factor


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def conv_tail(
    width: int, channels: int, *, bias: bool = False, eps: float = 1e-5, ups: int = 2, norm: Callable[..., Any] | None = None
) -> list[nn.Module]:
    """Doubling convolutions width → 128 → 64, each with BN and LeakyReLU, and the last convolution 64 → channels.

    With `ups` 3 the last convolution doubles too.
    """
    norm = norm or (lambda m: m)
    last: nn.Module = UpConv(64, channels) if ups == 3 else nn.Conv2d(64, channels, 3, padding=1)
    return [
        *(norm(UpConv(width, 128, bias)), nn.BatchNorm2d(128, eps), leaky()),
        *(norm(UpConv(128, 64, bias)), nn.BatchNorm2d(64, eps), leaky()),
        norm(last),
    ]


def head(kind: str, channels: int) -> list[nn.Module]:
    """The layers behind the last convolution: "sigmoid", "tanh", "tanh_bn" (normalised images) or "bn" (affine, no squashing)."""
    heads: dict[str, list[nn.Module]] = {
        "sigmoid": [nn.Sigmoid()],
        "tanh": [nn.Tanh()],
        "tanh_bn": [nn.Tanh(), nn.BatchNorm2d(channels, affine=False)],
        "bn": [nn.BatchNorm2d(channels)],
    }
    if kind not in heads:
        raise ConfigError(unknown("generator head", kind, heads))
    return heads[kind]


class FcUp(Generator):
    """Linear nz → w·h·h, BN, and `conv_tail`: the skeleton of seven published generators (h = H / 4).

    Args:
      small_start: start at H / 8 and double once more before the last convolution (64x64 images of PRE-DFKD and LRA).
    """

    def __init__(
        self,
        name: str,
        nz: int,
        shape: Shape,
        *,
        width: int,
        bias: bool,
        eps: float,
        out: str,
        init: str,
        spectral: bool = False,
        small_start: bool = False,
    ):
        super().__init__(init)
        ups = 3 if small_start else 2
        size = grid(name, shape, 2**ups)
        self.latent, norm = (nz,), spectral_norm if spectral else None
        self.l0 = nn.Linear(nz, width * size[0] * size[1])
        self.unflatten = ToMap((width, *size))
        self.bn0 = nn.BatchNorm2d(width)
        self.body = nn.Sequential(*conv_tail(width, shape[0], bias=bias, eps=eps, ups=ups, norm=norm))
        self.head = nn.Sequential(*head(out, shape[0]))
        self.reinit()

    def forward(self, z: Tensor) -> Tensor:
        """z [b, nz] → images [b, c, H, W]."""
        return self.head(self.body(self.bn0(self.unflatten(self.l0(z)))))


class DeepMap(Generator):
    """FastDFKD for ImageNet: the latent is a map [nz, H/16, W/16]; every block conv3x3-BN-LeakyReLU, four of them doubling."""

    def __init__(self, name: str, nz: int, shape: Shape, *, out: str, init: str):
        super().__init__(init)
        self.latent = (nz, *grid(name, shape, 16))
        self.l0 = nn.Conv2d(nz, 128, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(128)
        self.body = nn.Sequential(leaky(), *deep_tail(shape[0]))
        self.head = nn.Sequential(*head(out, shape[0]))
        self.reinit()

    def forward(self, z: Tensor) -> Tensor:
        """z [b, nz, H/16, W/16] → images [b, c, H, W]."""
        return self.head(self.body(self.bn0(self.l0(z))))


def deep_tail(channels: int) -> list[nn.Module]:
    """Four doubling blocks 128 → 128 → 64 → 64 → 64 and the last convolution."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((128, 128), (128, 64), (64, 64), (64, 64)):
        layers += [UpConv(inputs, outputs, bias=False), nn.BatchNorm2d(outputs), leaky()]
    return [*layers, nn.Conv2d(64, channels, 3, padding=1)]


class Dcgan(Generator):
    """DFAD for 128x128: Linear, BN, four transposed convolutions 512 → 256 → 128 → 64 → 64, conv3x3."""

    def __init__(self, name: str, nz: int, shape: Shape, *, out: str, init: str):
        super().__init__(init)
        size = grid(name, shape, 16)
        self.latent = (nz,)
        self.l0 = nn.Linear(nz, 512 * size[0] * size[1])
        self.unflatten = ToMap((512, *size))
        self.bn0 = nn.BatchNorm2d(512)
        layers: list[nn.Module] = []
        for inputs, outputs in ((512, 256), (256, 128), (128, 64), (64, 64)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), leaky()]
        self.body = nn.Sequential(*layers, nn.Conv2d(64, shape[0], 3, padding=1))
        self.head = nn.Sequential(*head(out, shape[0]))
        self.reinit()

    def forward(self, z: Tensor) -> Tensor:
        """z [b, nz] → images [b, c, H, W]."""
        return self.head(self.body(self.bn0(self.unflatten(self.l0(z)))))


class Dfq(Generator):
    """DFQ: Linear to 512 maps, three doubling convolutions 512 → 256 → 128 → 64 with BN and ReLU, conv3x3.

    No BatchNorm stands behind the Linear, so `bn0` is the one behind the first convolution.
    """

    def __init__(self, name: str, nz: int, shape: Shape, *, out: str, init: str):
        super().__init__(init)
        size = grid(name, shape, 8)
        self.latent = (nz,)
        self.l0 = nn.Linear(nz, 512 * size[0] * size[1])
        self.unflatten = ToMap((512, *size))
        self.up0, self.bn0 = UpConv(512, 256), nn.BatchNorm2d(256)
        layers: list[nn.Module] = [nn.ReLU()]
        for inputs, outputs in ((256, 128), (128, 64)):
            layers += [UpConv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(64, shape[0], 3, padding=1))
        self.head = nn.Sequential(*head(out, shape[0]))
        self.reinit()

    def forward(self, z: Tensor) -> Tensor:
        """z [b, nz] → images [b, c, H, W]."""
        return self.head(self.body(self.bn0(self.up0(self.unflatten(self.l0(z))))))


_FC_UP: dict[str, dict[str, Any]] = {
    "g_fast": {"width": 128, "bias": False, "eps": 1e-5, "out": "sigmoid", "init": "default"},
    "g_large": {"width": 256, "bias": False, "eps": 1e-5, "out": "sigmoid", "init": "default"},
    # eps 0.8: in the published code a momentum in eps's place; it changes the images, so it stays
    "g_dafl": {"width": 128, "bias": True, "eps": 0.8, "out": "tanh_bn", "init": "default"},
    "g_pre": {"width": 128, "bias": True, "eps": 0.8, "out": "tanh_bn", "init": "uniform", "spectral": True},
    "g_mem": {"width": 128, "bias": True, "eps": 0.8, "out": "tanh_bn", "init": "uniform"},
    "g_dfad_a": {"width": 128, "bias": True, "eps": 1e-5, "out": "tanh_bn", "init": "default"},
    "g_zskt": {"width": 128, "bias": True, "eps": 1e-5, "out": "bn", "init": "default"},
}
_OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "g_deep": (DeepMap, {"out": "sigmoid", "init": "default"}),
    "g_dfad_b": (Dcgan, {"out": "tanh", "init": "normal"}),
    "g_dfq": (Dfq, {"out": "tanh_bn", "init": "default"}),
}


def generator(
    name: str,
    nz: int | None,
    shape: Shape,
    *,
    classes: int | None = None,
    embeddings: Tensor | None = None,
    batch: int | None = None,
    **kw: Any,
) -> nn.Module:
    """A generator by name, with fresh weights in the default floating dtype.

    Args:
      name:       one of `fastkd.models.GENERATORS`.
      nz:         length of a latent (g_deep: channels of the latent map; g_nl, g_nl_deep: width behind the noisy layer, None: 1000).
      shape:      (c, H, W) of the images; H and W multiples of 4 (g_dfq 8; g_deep, g_dfad_b and g_nl_deep 16).
      classes:    with g_nl, g_nl_deep: checked against the rows of `embeddings` where given.
      embeddings: g_nl, g_nl_deep: the table [C, d_e].
      batch:      g_nl, g_nl_deep: rows of the global batch.
      kw:         differences from the published form: `init` ("default", "normal", "uniform"), `out` (the head: "sigmoid",
                  "tanh", "tanh_bn", "bn"); fc-up family: `small_start`, `width`, `bias`, `eps`, `spectral`.
    Returns:
      z [b, nz] (g_deep [b, nz, H/16, W/16]; g_nl: labels [b] int64) → images [b, c, H, W].
    Raises:
      ConfigError: an unknown name, or a shape or option that it cannot have.
    """
    from . import GENERATORS

    if name not in GENERATORS:
        raise ConfigError(unknown("generator", name, GENERATORS))
    if name in ("g_nl", "g_nl_deep"):
        from .noisy import NoisyGenerator

        if embeddings is None or batch is None:
            raise ConfigError(f"{name} makes images from label embeddings: it needs a table [classes, width] and the global batch size.")
        if classes is not None and classes != len(embeddings):
            raise ConfigError(f"the embedding table has {len(embeddings)} rows, expected one for each of the {classes} classes.")
        return NoisyGenerator(embeddings, batch, shape, name=name, **{"hidden": nz or 1000, **kw})
    if nz is None or nz < 1:
        raise ConfigError(f"{name} needs a latent of at least 1 number, found nz = {nz}.")
    if name in _FC_UP:
        return FcUp(name, nz, shape, **{**_FC_UP[name], **kw})
    make, published = _OTHER[name]
    return make(name, nz, shape, **{**published, **kw})
