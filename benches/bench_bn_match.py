"""Frozen BN + ReLU with the statistics of its input and their distance to the teacher's, forward and backward.

- All BN layers of a network as one row, without its convolutions, one loss over all of them. Not against torch.compile: with the input
  of a layer as a graph input the compiler stores a ReLU mask that it does not store inside a network, which flatters us.
- Whole teachers, against hooks and against the compiled network with statistics in both forms that a user may write.
- A ladder from the published way to ours: each gain beside the rung that earned it.
- On a GPU, first, each op alone on a tensor that fills the chip: what its kernels reach of a copy's bandwidth, CUDA beside Triton.

`x_best_eager` compares with the hooks in whichever layout they are faster: in channels_last they copy into another order.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import models, ops
from fastkd.nn import instrument
from fastkd.ops.bn_match.reference import bn_match_loss_ref, bn_sums_ref, frozen_bn_act_stats_ref, moments_ref, wide

from ._case import Call, CannotRun, Case, Plan, Provider, compiled, ours, provider
from ._timing import measure_all

OP = "frozen_bn_act_stats"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
WEIGHT = 10.0
"""Gradient of the loss: its weight in the published objectives."""


@dataclass(frozen=True)
class Work:
    """A network on images of `size` × `size`, in batches of `cpu` or `gpu`; `compiled`: layouts in which it is worth the minutes."""

    net: str
    size: int
    cpu: int
    gpu: int
    compiled: tuple[str, ...] = ("NCHW", "channels_last")

    def batch(self, plan: Plan) -> int:
        return 4 if plan.quick else self.gpu if plan.cuda else self.cpu


GROUPS = (Work("resnet20", 32, 256, 256), Work("cifar_resnet34", 32, 64, 64), Work("resnet50", 112, 16, 64), Work("resnet50", 224, 8, 64))
TEACHERS = (Work("resnet20", 32, 256, 256), Work("cifar_resnet34", 32, 32, 256, compiled=("channels_last",)))
TINY = (Work("resnet20", 8, 4, 4),)
FULL = ((256, 64, 112, 112), (512, 512, 28, 28), (2048, 2048, 7, 7))
"""Batch, channels, height and width of single ops on a GPU: inputs of BatchNorms of ResNet-50, of 0.4 GB each in bf16, so that a launch
is a small part of what is compared with a copy's bandwidth."""
SECONDS = 8.0
"""What the rounds of a case may take, once the least number of them is done."""


def run(plan: Plan) -> list[dict[str, Any]]:
    return best_eager(measure_all((dataclasses.replace(c, seconds=SECONDS) for c in cases(plan)), plan))


def teachers(plan: Plan) -> tuple[Work, ...]:
    return TINY if plan.quick else TEACHERS


def cases(plan: Plan) -> Iterator[Case]:
    """Small teachers first: where time is short, the rows of ResNet-50 go. On a GPU the most telling rows of each kind."""
    if plan.cuda and not plan.quick:
        yield from on_gpu(plan)
        return
    if plan.cuda:
        yield from singles(plan, ((2, 8, 6, 6),))
    for work in TINY if plan.quick else GROUPS[:2]:
        yield from groups(plan, work)
    for work in teachers(plan):
        for layout in LAYOUTS:
            yield teacher(plan, work, layout, torch.float32)
        yield teacher(plan, work, "channels_last", torch.bfloat16)
    for work in teachers(plan):
        yield ladder(plan, work)
    for work in () if plan.quick else GROUPS[2:]:
        yield from groups(plan, work)


def on_gpu(plan: Plan) -> Iterator[Case]:
    small, middle, large, largest = GROUPS
    fp32, bf16, last = torch.float32, torch.bfloat16, "channels_last"
    yield from singles(plan, FULL[:1])
    yield layers(plan, largest, last, bf16)
    yield layers(plan, largest, "NCHW", bf16)
    yield teacher(plan, TEACHERS[0], last, bf16)
    yield teacher(plan, TEACHERS[0], last, fp32)
    yield teacher(plan, TEACHERS[1], last, bf16)
    yield layers(plan, small, last, bf16)
    yield layers(plan, small, "NCHW", fp32)
    yield from singles(plan, FULL[1:])
    yield layers(plan, middle, last, bf16)
    yield layers(plan, large, last, bf16)
    yield layers(plan, largest, last, fp32)
    for work in TEACHERS:
        yield ladder(plan, work)


def groups(plan: Plan, work: Work) -> Iterator[Case]:
    for dtype in plan.dtypes:
        for layout in LAYOUTS:
            yield layers(plan, work, layout, dtype)


def best_eager(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the ratio to the hooks in their better layout, of the same case and dtype."""

    def alike_in(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["case"], row["dtype"], row.get("threads")

    fine = [r for r in rows if r.get("ok") and "ms" in r and "rung" not in r]
    for row in fine:
        alike = [r["ms"] for r in fine if r["kind"] == "eager" and alike_in(r) == alike_in(row)]
        if alike and row["kind"] != "eager":
            row["x_best_eager"] = round(min(alike) / row["ms"], 3)
    return rows


def stat_distance(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The public hooks' way: mean over three dimensions, variance of a channel-first copy, two norms."""
    x = x.to(wide(x.dtype))
    rows = x.permute(1, 0, 2, 3).contiguous().flatten(1)
    return (x.mean((0, 2, 3)) - mean).norm() + (rows.var(1, unbiased=False) - var).norm()


def var_mean_distance(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The same distance as somebody would write it for a compiler."""
    v, m = torch.var_mean(x.to(wide(x.dtype)), (0, 2, 3), unbiased=False)
    return (m - mean).norm() + (v - var).norm()


# All BN layers of a network -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Layer:
    """A shape that `count` BN layers of a network have: their input, the gradient of their output, and their constants."""

    x: Tensor
    gy: Tensor
    count: int
    mean: Tensor
    var: Tensor
    gamma: Tensor
    beta: Tensor

    def __post_init__(self) -> None:
        self.scale = self.gamma / (self.var + 1e-5).sqrt()
        self.bias = self.beta - self.scale * self.mean
        self.target = torch.stack([self.mean, self.var])

    def leaf(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.detach().to(dtype or self.x.dtype).requires_grad_()


@functools.cache
def shapes(work: Work) -> Counter[tuple[int, ...]]:
    """(C, H, W) of the BN inputs, with how many layers have each."""
    seen: list[tuple[int, ...]] = []
    net = models.build(work.net, classes=10, channels=3, input_size=work.size).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_pre_hook(lambda m, inputs: seen.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        net(torch.zeros(1, 3, work.size, work.size))
    return Counter(seen)


def layers(plan: Plan, work: Work, layout: str, dtype: torch.dtype) -> Case:
    draw, batch = torch.Generator(plan.device).manual_seed(3), work.batch(plan)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=plan.device)

    def made(shape: tuple[int, ...], count: int) -> Layer:
        c = shape[0]
        mean, var = normal(c), normal(c).square() + 0.5  # running statistics, and inputs near them
        x = normal(batch, *shape) * var.sqrt().view(-1, 1, 1) * 1.1 + mean.view(-1, 1, 1) + 0.1
        maps = [t.to(plan.device, dtype).contiguous(memory_format=LAYOUTS[layout]) for t in (x, normal(batch, *shape))]
        return Layer(*maps, count, mean, var, 1 + 0.2 * normal(c), 0.2 * normal(c))

    group = [made(shape, count) for shape, count in shapes(work).items()]
    every = [layer for layer in group for _ in range(layer.count)]
    offsets = [0]
    for layer in every:
        offsets.append(offsets[-1] + len(layer.mean))
    counts = torch.cat([torch.full_like(v.mean, v.x.numel() // len(v.mean)) for v in every])
    target = torch.cat([v.target for v in every], 1)

    def published(leaves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        ys, terms = [], []
        for v, x in zip(every, leaves):
            ys.append(F.relu(F.batch_norm(x, v.mean, v.var, v.gamma, v.beta, False, 0.0, 1e-5)))
            terms.append(stat_distance(x, v.mean, v.var))
        return ys, torch.stack(terms).sum()

    def public(leaves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        outs = [ops.frozen_bn_act_stats(x, v.scale, v.bias, v.mean, act="relu") for v, x in zip(every, leaves)]
        stats = ops.moments(torch.cat([sums for _, sums in outs], 1), counts, target[0])
        return [y for y, _ in outs], ops.bn_match_loss(stats, target, tuple(offsets))

    def call(fn: Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]) -> Sequence[Tensor]:
        leaves = [v.leaf() for v in every]
        ys, loss = fn(leaves)
        dxs = torch.autograd.grad([*ys, loss], leaves, [*(v.gy for v in every), torch.full_like(loss, WEIGHT)])
        first = [every.index(v) for v in group]
        return loss, *(ys[i] for i in first), *(dxs[i] for i in first)

    def truth() -> Sequence[Tensor]:
        """Layers of one shape are equal: one of them, its distance counted as often as there are layers."""
        total, ys, dxs = torch.zeros((), dtype=torch.float64, device=plan.device), [], []
        for v in group:
            x = v.leaf(torch.float64)
            s, b, m, t = (w.double() for w in (v.scale, v.bias, v.mean, v.target))
            y, sums = frozen_bn_act_stats_ref(x, s, b, m, None, "relu", 0.0)
            loss = bn_match_loss_ref(moments_ref(sums, x.numel() // len(m), m), t, (0, len(m)), 1.0, "l2")
            dxs += torch.autograd.grad((y, loss), x, (v.gy.double(), torch.full_like(loss, WEIGHT)))
            ys.append(y.detach())
            total += v.count * loss.detach()
        return total, *ys, *dxs

    return Case(
        op=OP,
        labels=labels(f"BN layers {work.net}", work, batch, layout, dtype),
        providers=[Provider("hooks", "eager", lambda: call(published)), *ours(OP, plan, lambda: call(public), definition=not plan.cuda)],
        truth=truth,
        baseline="hooks",
        bytes=sum(5 * v.x.numel() * v.x.element_size() for v in every),  # reads x, writes y; backward reads x and gy, writes dx
    )


def labels(case: str, work: Work, batch: int, layout: str, dtype: torch.dtype | None) -> dict[str, str]:
    name = "" if dtype is None else str(dtype)[6:]
    return {"case": case, "shape": f"{batch}x3x{work.size}x{work.size}", "layout": layout, "dtype": name, "pass": "fwd+bwd"}


# Single ops, on a GPU --------------------------------------------------------------------------------------------------------


def singles(plan: Plan, sizes: Sequence[tuple[int, ...]]) -> Iterator[Case]:
    """Every op of the family on each shape: bf16 in both layouts, fp32 on the first."""
    for shape, layout, dtype in itertools.product(sizes, ("channels_last", "NCHW"), (torch.bfloat16, torch.float32)):
        if dtype == torch.bfloat16 or shape == FULL[0]:
            yield single(plan, OP, shape, layout, dtype, backward=False)
            yield single(plan, OP, shape, layout, dtype)
        if dtype == torch.bfloat16:
            if shape == sizes[0] != FULL[1]:
                yield single(plan, OP, shape, layout, dtype, residual=True)
            yield single(plan, "bn_sums", shape, layout, dtype)
    if sizes[0] != FULL[1]:
        yield loss_alone(plan)


def single(
    plan: Plan, op: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, *, residual: bool = False, backward: bool = True
) -> Case:
    draw, c = torch.Generator(plan.device).manual_seed(3), shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=plan.device)

    shift, scale, bias, weight = normal(c), 1 + 0.2 * normal(c), 0.2 * normal(c), 1e-3 * normal(2, c)
    count = 3 if residual else 2
    x, gy, *rest = (normal(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(count))

    def call(fn: Callable[..., tuple[Tensor, ...]], wide: bool = False) -> Call:
        own = [v.detach().to(torch.float64 if wide else dtype).requires_grad_(backward) for v in (x, *rest)]
        vectors = [v.double() if wide else v for v in (shift, scale, bias, weight)]
        grads = [gy.to(own[0].dtype), vectors[3]]

        def one() -> Sequence[Tensor]:
            outs = fn(own[0], *vectors[:3], own[1] if residual else None)
            return outs if not backward else (*outs, *torch.autograd.grad(outs, own, grads[2 - len(outs) :]))

        return one

    def definition(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        return (bn_sums_ref(x, shift),) if op == "bn_sums" else frozen_bn_act_stats_ref(x, scale, bias, shift, residual, "relu", 0.0)

    def plain(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        """Two statistics, a BatchNorm of torch and an activation."""
        v, m = torch.var_mean(x.float(), (0, 2, 3), unbiased=False)
        n, d = x.numel() // c, m - shift
        sums = torch.stack((n * d, n * (v + d * d)))
        if op == "bn_sums":
            return (sums,)
        # Not F.batch_norm: that of torch 2.11 refuses an eps of 0.
        y = torch.batch_norm(x, scale, bias + scale * shift, shift, torch.ones_like(shift), False, 0.0, 0.0, torch.backends.cudnn.enabled)
        return F.relu(y if residual is None else y + residual), sums

    def public(x: Tensor, shift: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        if op == "bn_sums":
            return (ops.bn_sums(x, shift),)
        return ops.frozen_bn_act_stats(x, scale, bias, shift, residual=residual, act="relu")

    passes = (1 if op == "bn_sums" else 2) + residual  # forward: x (and the residual), y
    passes += (2 if op == "bn_sums" else 3 + 2 * residual) if backward else 0  # backward: x, dx; gy; the residual and its gradient
    return Case(
        op=op,
        labels={
            "case": f"single op{' with residual' if residual else ''}",
            "shape": "x".join(map(str, shape)),
            "layout": layout,
            "dtype": str(dtype)[6:],
            "pass": "fwd+bwd" if backward else "fwd",
        },
        providers=[Provider("torch ops", "eager", call(plain)), *ours(op, plan, call(public), definition=False)],
        truth=call(definition, wide=True),
        baseline="torch ops",
        bytes=passes * x.numel() * x.element_size(),
    )


def loss_alone(plan: Plan) -> Case:
    """The distance over the 53 layers of ResNet-50, forward and backward: one launch each way instead of some hundred."""
    draw = torch.Generator(plan.device).manual_seed(4)
    sizes = [channels for (channels, _, _), count in shapes(GROUPS[2]).items() for _ in range(count)]
    offsets = (0, *itertools.accumulate(sizes))
    stats = torch.rand(2, offsets[-1], generator=draw, device=plan.device) + 0.5
    target = torch.rand(2, offsets[-1], generator=draw, device=plan.device) + 0.5

    def call(fn: Callable[[Tensor, Tensor], Tensor], wide: bool = False) -> Call:
        own, to = (v.double() if wide else v.clone() for v in (stats, target))
        own.requires_grad_()

        def one() -> Sequence[Tensor]:
            loss = fn(own, to)
            return loss, *torch.autograd.grad(loss, own, torch.full_like(loss, WEIGHT))

        return one

    def definition(stats: Tensor, target: Tensor) -> Tensor:
        return bn_match_loss_ref(stats, target, offsets, 1.0, "l2")

    def layer_by_layer(stats: Tensor, target: Tensor) -> Tensor:
        return torch.stack([(s - t).norm(dim=1).sum() for s, t in zip(stats.split(sizes, 1), target.split(sizes, 1))]).sum()

    labels = {"case": "53 layers", "shape": f"2x{offsets[-1]}", "layout": "", "dtype": "float32", "pass": "fwd+bwd"}
    public = call(lambda stats, target: ops.bn_match_loss(stats, target, offsets))
    return Case(
        op="bn_match_loss",
        labels=labels,
        providers=[
            Provider("layer by layer", "eager", call(layer_by_layer)),
            provider("compile(definition)", "compile", lambda: call(compiled(plan, definition))),
            *ours("bn_match_loss", plan, public),
        ],
        truth=call(definition, wide=True),
        baseline="layer by layer",
    )


# A whole teacher ------------------------------------------------------------------------------------------------------------

Fn = Callable[[Tensor], tuple[Tensor, Tensor]]


class Setting:
    """A settled network, images and a gradient of the logits; calls return logits, loss, and the gradient of the images."""

    def __init__(self, plan: Plan, work: Work):
        self.plan, self.batch = plan, work.batch(plan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            net = models.build(work.net, classes=10, channels=3, input_size=work.size).train().to(plan.device)
            with torch.no_grad():
                for _ in range(2 if plan.quick else 5):  # running statistics of some images
                    net(torch.randn(min(self.batch, 32), 3, work.size, work.size).to(plan.device))
            images = torch.rand(self.batch, 3, work.size, work.size) * 2 - 1
            self.gy = torch.randn(self.batch, 10).to(plan.device)
        self.trainable, self.images = net.eval(), images.to(plan.device)
        self.frozen = copy.deepcopy(self.trainable).requires_grad_(False)

    def net(self, layout: str) -> nn.Module:
        return copy.deepcopy(self.frozen).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload,no-any-return]

    def call(self, fn: Fn, layout: str, dtype: torch.dtype = torch.float32, also: Sequence[Tensor] = ()) -> Call:
        """`also`: what else a gradient is computed of (and thrown away). bf16 is autocast, as in a run."""
        exact, half = dtype == torch.float64, dtype == torch.bfloat16
        x = self.images.to(torch.float64 if exact else torch.float32).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        gy = self.gy.to(x.dtype)

        def call() -> Sequence[Tensor]:
            with torch.autocast(self.plan.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
                y, loss = fn(x)
                y = y.to(gy.dtype)
                return y, loss, torch.autograd.grad((y, loss), (x, *also), (gy, torch.full_like(loss, WEIGHT)))[0]

        return call

    def truth(self) -> Call:
        return self.call(reported(instrument(copy.deepcopy(self.frozen).double())), "NCHW", torch.float64)


def hooked(net: nn.Module, distance: Callable[[Tensor, Tensor, Tensor], Tensor] = stat_distance) -> Fn:
    """The network with a hook on each BatchNorm, as published."""
    terms: list[Tensor] = []

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        terms.append(distance(inputs[0], module.running_mean, module.running_var))

    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(hook)

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        terms.clear()
        logits = net(x)
        return logits, torch.stack(terms).sum()

    return fn


def reported(made: Any) -> Fn:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        trace = made(x, "bn")
        return trace.logits, ops.bn_match_loss(trace.bn, made.target, made.split)

    return fn


SLACK = 5e-3
"""Some 20 or 40 ReLU masks in a row; single layers are held to less. In bf16 the masks leave no fixed bound: there plain torch's own
error is the measure."""


def teacher(plan: Plan, work: Work, layout: str, dtype: torch.dtype) -> Case:
    """The loss over all BN layers, through the whole network; weights are frozen for every provider."""
    s = Setting(plan, work)
    sums = reported(instrument(s.net(layout)))

    def whole(fn: Fn) -> Call:
        if layout not in work.compiled:
            raise CannotRun(f"compiled in {', '.join(work.compiled)} only: it takes a minute")
        return s.call(compiled(plan, fn), layout, dtype)

    return Case(
        op=OP,
        labels=labels(f"teacher {work.net}", work, s.batch, layout, dtype),
        providers=[
            Provider("hooks", "eager", s.call(hooked(s.net(layout)), layout, dtype)),
            provider("compile(var_mean)", "compile", lambda: whole(hooked(s.net(layout), var_mean_distance))),
            provider("compile(sums)", "compile", lambda: whole(sums), backend="reference"),
            *ours(OP, plan, s.call(sums, layout, dtype), definition=not plan.cuda),
        ],
        truth=s.truth(),
        baseline="hooks",
        tolerance=SLACK if dtype == torch.float32 else s.call(hooked(s.net(layout)), layout, dtype),
    )


def ladder(plan: Plan, work: Work) -> Case:
    s, bf16 = Setting(plan, work), torch.bfloat16
    fused = reported(instrument(s.net("channels_last")))
    weights = tuple(s.trainable.parameters())
    plain = s.call(hooked(s.net("channels_last")), "channels_last", bf16)
    fp32, half = {"dtype": "float32"}, {"dtype": "bfloat16"}
    nchw, last = {"layout": "NCHW"} | fp32, {"layout": "channels_last"} | fp32

    def rung(name: str, earned: str, kind: str, call: Call, labels: dict[str, str], **more: Any) -> Provider:
        return Provider(name, kind, call, rung=earned, labels=labels, **more)

    return Case(
        op=OP,
        labels={k: v for k, v in labels(f"ladder {work.net}", work, s.batch, "", None).items() if v},
        providers=[
            rung("published", "as published", "eager", s.call(hooked(s.trainable), "NCHW", also=weights), nchw),
            rung("frozen", "freezing", "eager", s.call(hooked(s.net("NCHW")), "NCHW"), nchw),
            rung("channels_last", "channels_last", "eager", s.call(hooked(s.net("channels_last")), "channels_last"), last),
            rung("fused ops", "kernels", "ours", s.call(fused, "channels_last"), last),
            rung("bf16", "bf16", "ours", s.call(fused, "channels_last", bf16), last | half, tolerance=plain),
        ],
        truth=s.truth(),
        baseline="published",
        tolerance=SLACK,
    )
