"""Class activation maps: the op alone, and with a network's forward beside libraries that make such maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import models, ops
from fastkd.nn import ClassActivationMap, instrument
from fastkd.ops.cam.reference import class_activation_map_ref, scale_map

from . import peers
from ._case import Call, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

OP = "class_activation_map"
MAPS = {
    "ResNet-20 at 32": (256, 64, 8, 32, 10),
    "ResNet-34 at 32": (256, 512, 4, 32, 100),
    "ResNet-50 at 112": (64, 2048, 4, 112, 1000),
    "ResNet-50 at 224": (32, 2048, 7, 224, 1000),
}
"""Batch, channels, height and width of the map, of the image, classes."""
FULL = {"ResNet-50 at 224, full": (1024, 2048, 7, 224, 1000)}
"""A batch that fills a GPU."""
NETWORKS = {"ResNet-20 at 32": ("resnet20", 64, 32, 10), "ResNet-50 at 224": ("resnet50", 2, 224, 1000)}
"""Name, batch (on a GPU 64), height and width of the image, classes."""
TINY_MAPS = {"tiny": (4, 16, 4, 8, 5)}
TINY_NETWORKS = {"tiny": ("resnet20", 4, 8, 5)}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def run(plan: Plan) -> list[dict[str, Any]]:
    return adds(measure_all(cases(plan), plan))


def cases(plan: Plan) -> Iterator[Case]:
    yield from on_gpu(plan) if plan.cuda and not plan.quick else alones(plan)
    for name, (net, batch, size, classes) in (TINY_NETWORKS if plan.quick else NETWORKS).items():
        yield end_to_end(plan, name, net, 64 if plan.cuda and not plan.quick else batch, size, classes)


def on_gpu(plan: Plan) -> Iterator[Case]:
    """The most telling of all combinations first."""
    fp32, bf16 = torch.float32, torch.bfloat16
    for layout, dtype in (("channels_last", bf16), ("NCHW", bf16), ("NCHW", fp32)):
        for backward in (False, True):
            for name, sizes in FULL.items():
                yield alone(plan, name, sizes, layout, dtype, backward)
    for name, layout, dtype in (
        ("ResNet-34 at 32", "channels_last", bf16),
        ("ResNet-20 at 32", "NCHW", fp32),
        ("ResNet-50 at 112", "channels_last", bf16),
    ):
        yield alone(plan, name, MAPS[name], layout, dtype, True)


def alones(plan: Plan) -> Iterator[Case]:
    for dtype in plan.dtypes:
        for name, sizes in (TINY_MAPS if plan.quick else MAPS).items():
            for layout in LAYOUTS:
                for backward in (False, True):
                    yield alone(plan, name, sizes, layout, dtype, backward)


def product_sum(features: Tensor, weight: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
    """As maps are usually written: a weighted copy of the features, its sum over channels, ReLU, min-max, resize."""
    m = F.relu((weight[labels][:, :, None, None].to(features.dtype) * features).sum(1))
    m = scale_map(m.to(weight.dtype), "minmax", False)
    return F.interpolate(m[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def alone(plan: Plan, name: str, sizes: tuple[int, ...], layout: str, dtype: torch.dtype, backward: bool) -> Case:
    batch, k, hw, image, classes = sizes
    draw, device = torch.Generator(plan.device).manual_seed(8), plan.device
    weight = torch.randn(classes, k, generator=draw, device=device) * k**-0.5
    labels = torch.randint(classes, (batch,), generator=draw, device=device)
    features = F.relu(torch.randn(batch, k, hw, hw, generator=draw, device=device)).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn(batch, image, image, generator=draw, device=device)
    features.requires_grad_(backward)
    size = (image, image)

    def definition(features: Tensor, weight: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return class_activation_map_ref(features, weight, labels, True, "minmax", False, size, False)

    def public(features: Tensor, weight: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        return ops.class_activation_map(features, weight, labels, relu=True, norm="minmax", size=size)

    def call(fn: Callable[..., Tensor], features: Tensor = features, weight: Tensor = weight, grad: Tensor = grad) -> Call:
        def one() -> tuple[Tensor, ...]:
            m = fn(features, weight, labels, size)
            return (m, *torch.autograd.grad(m, features, grad.to(m.dtype))) if backward else (m,)

        return one

    usual = None if dtype == torch.float32 else 0.25  # the usual way sums in bf16, and divides by a difference of such sums
    exact = features.detach().double().requires_grad_(backward)
    traffic = features.numel() * features.element_size() * (2 if backward else 1)  # reads features; backward writes as much
    return Case(
        op=OP,
        labels={
            "case": name,
            "shape": f"{batch}x{k}x{hw}x{hw}",
            "layout": layout,
            "dtype": str(dtype)[6:],
            "pass": "fwd+bwd" if backward else "fwd",
        },
        providers=[
            Provider("product and sum", "eager", call(product_sum), tolerance=usual),
            provider("compile(definition)", "compile", lambda: call(compiled(plan, definition))),
            provider("compile(product and sum)", "compile", lambda: call(compiled(plan, product_sum)), tolerance=usual),
            *ours(OP, plan, call(public), definition=not plan.cuda),
        ],
        truth=call(definition, exact, weight.double(), grad.double()),
        baseline="product and sum",
        bytes=traffic + 4 * grad.numel() * (2 if backward else 1),  # and writes the maps; backward reads their gradient
    )


def end_to_end(plan: Plan, name: str, spec: str, batch: int, size: int, classes: int) -> Case:
    """Images to maps. A bare forward and the maps alone are rows of their own, so that what a library adds can be read off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        net = models.build(spec, classes=classes, channels=3, input_size=size).to(plan.device).eval()
        x = torch.randn(batch, 3, size, size).to(plan.device)
    labels = torch.arange(batch, device=plan.device) % classes
    live, made = ClassActivationMap(net), ClassActivationMap(instrument(net, shape=(3, size, size)))
    exact = ClassActivationMap(copy.deepcopy(net).double())
    with torch.no_grad():
        trace = made.model(x)
        weight = made.model.head[0]

    def maps() -> tuple[Tensor]:
        return (ops.class_activation_map(trace.map, weight, labels, relu=True, norm="minmax", size=(size, size), renorm=True),)

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (net(x),)

    return Case(
        op=OP,
        labels={
            "case": f"images to maps, {name}",
            "shape": f"{batch}x3x{size}x{size}",
            "layout": "NCHW",
            "dtype": "float32",
            "pass": "fwd",
        },
        providers=[
            Provider("forward alone", "eager", forward, checked=False),
            Provider("ours: maps alone", "ours", maps),
            Provider("ours: network", "ours", lambda: (live(x, labels),)),
            Provider("ours: teacher", "ours", lambda: (made(x, labels),)),
            provider("grad-cam", "peer", lambda: peers.grad_cam(net, x, labels)),
            provider("torchcam", "peer", lambda: peers.torchcam(net, x, labels), checked=False),
        ],
        truth=lambda: (exact(x.double(), labels),),
        baseline="grad-cam",
        tolerance=1e-3,
    )


def adds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`adds_ms`: time beyond a bare forward, in the cases that have one; `x_adds`: that, in multiples of what our maps alone take."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            cases.setdefault((row["case"], row["shape"], row.get("threads")), []).append(row)
    for own in cases.values():
        ms = {row["provider"]: row["ms"] for row in own}
        if "forward alone" in ms and "ours: maps alone" in ms:
            for row in own:
                if "alone" not in row["provider"]:
                    row["adds_ms"] = round(row["ms"] - ms["forward alone"], 6)
                    row["x_adds"] = round(row["adds_ms"] / ms["ours: maps alone"], 3)
    return rows
