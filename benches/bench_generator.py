"""A generator step of FastDFKD: g_fast, a ResNet-20 teacher, a ResNet-8 student; forward, loss and the gradients that Adam would take.

A ladder, so that each gain stands beside what earned it: from the published way (weight gradients nobody uses, hooks, NCHW, nearest
upsampling) to what a run of fastkd computes. Every rung gives the images and gradients of the published way in fp64, or has no ratio.
The loss is 10 BN matching + 0.5 cross-entropy + 1.33 adversarial KL; no optimiser and no augmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastkd.nn as fnn
from fastkd import losses, models, ops
from fastkd.models import generators

from ._case import Call, CannotRun, Case, Plan, Provider, compiled, provider
from ._timing import measure_all
from .bench_bn_match import stat_distance
from .facts import cpuinfo

OP = "generator_step"
SIZES = (256, 32, 256)
"""Batch, height and width of the images, latent size."""
TINY = (8, 8, 16)
BN, ONE_HOT, ADVERSARY = 10.0, 0.5, 1.33
CLASSES = 10

SINGLE, HALF = (1e-4, 1e-3, 1e-3, 3e-2, 3e-2), (3e-2, 0.1, 0.1, 0.35, 0.35)
"""Relative L2 errors that pass, of images, logits, latents' and weights' gradients: fp32, and bf16, in which masks and agreement flip.

Three networks stand in a row there; the ops themselves are held to less in their own benches.
"""

Networks = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Images → logits of the teacher, BN loss, logits of the student."""


def run(plan: Plan) -> list[dict[str, Any]]:
    return measure_all(cases(plan), plan)


@dataclass
class Setting:
    """The three networks as published, a batch of latents, and the labels."""

    generator: nn.Module
    teacher: nn.Module
    student: nn.Module
    z: Tensor
    labels: Tensor

    def copied(self, *, layout: torch.memory_format = torch.contiguous_format, frozen: bool = True) -> Setting:
        """Its own networks: in eval mode but for the generator, with or without gradients of the weights of teacher and student."""
        g, t, s = (copy.deepcopy(m).to(memory_format=layout) for m in (self.generator, self.teacher, self.student))  # type: ignore[call-overload]
        for net in (t, s):
            net.eval().requires_grad_(not frozen)
        return Setting(g.train(), t, s, self.z.detach().clone().requires_grad_(), self.labels)

    def double(self) -> Setting:
        own = self.copied()
        own.generator, own.teacher, own.student = (m.double() for m in (own.generator, own.teacher, own.student))
        return Setting(own.generator, own.teacher, own.student, own.z.detach().double().requires_grad_(), own.labels)


def setting(plan: Plan) -> Setting:
    batch, size, nz = TINY if plan.quick else SIZES
    shape = (3, size, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        generator = generators.generator("g_fast", nz, shape).to(plan.device)
        built = (models.build(name, classes=CLASSES, channels=3, input_size=size) for name in ("resnet20", "resnet8"))
        teacher, student = (net.to(plan.device) for net in built)
        settle(generator, teacher, student, [torch.randn(min(batch, 64), nz).to(plan.device) for _ in range(4)])
        z, labels = torch.randn(batch, nz), torch.randint(CLASSES, (batch,))
    return Setting(generator, teacher, student, z.to(plan.device).requires_grad_(), labels.to(plan.device))


@torch.no_grad()
def settle(generator: nn.Module, teacher: nn.Module, student: nn.Module, latents: Sequence[Tensor]) -> None:
    """Make fresh networks resemble trained ones where the loss looks: running statistics of other images than the generator's, confident
    logits, and a student that mostly names the teacher's class (else the adversarial term and its gradient are zero)."""
    favourites = []
    for net in (teacher, student):
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the mean over the passes
        for z in latents:
            images = generator(z)
            net(images + 0.3 * torch.randn_like(images))
        for m in norms:
            m.momentum = 0.1
        head = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
        head.weight.mul_(3)
        favourites.append((head, int(net.eval()(generator(latents[0])).mean(0).argmax())))
    (_, wanted), (head, found) = favourites
    for v in (head.weight, head.bias):
        v.copy_(v.roll(wanted - found, 0))


# The pieces of a rung -------------------------------------------------------------------------------------------------


def hooked(own: Setting) -> Networks:
    """Teacher with a hook on each BatchNorm, student as it is."""
    terms: list[Tensor] = []

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        terms.append(stat_distance(inputs[0], module.running_mean, module.running_var))

    for m in own.teacher.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(hook)

    def networks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms.clear()
        logits = own.teacher(x)
        return logits, torch.stack(terms).sum(), own.student(x)

    return networks


def instrumented(own: Setting, *, student: bool) -> Networks:
    """Teacher whose statistics come out of its BatchNorms' one pass; `student`: its BatchNorms are folded in the same way."""
    teacher = fnn.instrument(own.teacher)
    folded = fnn.instrument(own.student) if student else None

    def networks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = teacher(x, "bn")
        s = own.student(x) if folded is None else folded(x).logits
        return t.logits, ops.bn_match_loss(t.bn, teacher.target, teacher.split), s

    return networks


def with_definitions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with the definitions of all ops, whatever the provider's backend is: for what is compiled beside a fast generator."""

    def call(*args: Any) -> Any:
        before = ops.backend()
        ops.use("reference")
        try:
            return fn(*args)
        finally:
            ops.use(before)

    return call


def fused_generator(own: Setting) -> nn.Module:
    """The generator with its BatchNorms and activations as fused ops.

    Raises:
      CannotRun: this fastkd has no such thing.
    """
    fuse = getattr(fnn, "fuse_generator", None)
    if fuse is None:
        raise CannotRun("this fastkd has no fastkd.nn.fuse_generator")
    made: nn.Module = fuse(own.generator)
    return made


def needs_bf16(plan: Plan) -> None:
    """Raises CannotRun on a CPU that can only imitate bf16."""
    if not plan.cuda and not {"avx512_bf16", "amx_bf16"} & set(cpuinfo("flags").split()):
        raise CannotRun("this CPU has no bf16 arithmetic (AVX-512 BF16 or AMX)")


def step(own: Setting, networks: Networks, generator: nn.Module | None = None, *, half: bool = False, whole: Any = None) -> Call:
    """One step: images, logits of teacher and student, gradients of the latents and of the generator's parameters. Every other weight
    that wants a gradient has one computed, too.

    Args:
      networks: of `hooked`, `instrumented` or a compiled one. generator: instead of the setting's. half: autocast to bf16.
      whole: compiles the step's forward, loss included.
    """
    generator = own.generator if generator is None else generator
    wanted = [own.z, *generator.parameters()]
    unused = [p for net in (own.teacher, own.student) for p in net.parameters() if p.requires_grad]

    def forward(z: Tensor) -> tuple[Tensor, ...]:
        images = generator(z)
        t, bn, s = networks(images)
        return images, t, s, BN * bn + ONE_HOT * losses.cross_entropy(t, own.labels) + ADVERSARY * losses.adv_masked_kl(t, s)

    made = forward if whole is None else whole(forward)

    def call() -> Sequence[Tensor]:
        with torch.autocast(own.z.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            images, t, s, loss = made(own.z)
        return (images, t, s, *torch.autograd.grad(loss, [*wanted, *unused])[: len(wanted)])

    return call


def compared(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Images, logits, gradient of the latents, and that of all weights as one vector: of some weights it is nothing but rounding."""
    images, t, s, z, *weights = outputs
    return images, t, s, z, torch.cat([w.flatten() for w in weights])


# The ladder -----------------------------------------------------------------------------------------------------------


def cases(plan: Plan) -> Iterator[Case]:
    base, last = setting(plan), torch.channels_last
    plain = {"layout": "NCHW", "dtype": "float32"}
    fp32, bf16 = {"layout": "channels_last", "dtype": "float32"}, {"layout": "channels_last", "dtype": "bfloat16"}

    def eager(half: bool = False, **how: Any) -> Callable[[], Call]:
        def make() -> Call:
            own = base.copied(**how)
            if half:
                needs_bf16(plan)
            return step(own, hooked(own), half=half)

        return make

    def fused(*, student: bool = False, generator: bool = False, half: bool = False) -> Callable[[], Call]:
        def make() -> Call:
            own = base.copied(layout=last)
            if half:
                needs_bf16(plan)
            return step(own, instrumented(own, student=student), fused_generator(own) if generator else None, half=half)

        return make

    def two_compiled(half: bool) -> Callable[[], Call]:
        def make() -> Call:
            own = base.copied(layout=last)
            if half:
                needs_bf16(plan)
            return step(own, with_definitions(compiled(plan, instrumented(own, student=False))), half=half)

        return make

    def all_compiled(half: bool) -> Callable[[], Call]:
        def make() -> Call:
            own = base.copied(layout=last)
            if half:
                needs_bf16(plan)
            return step(own, instrumented(own, student=False), half=half, whole=lambda forward: compiled(plan, forward))

        return make

    made = hasattr(fnn, "fuse_generator")  # without it the rung above bf16 has its reason, and bf16 stands on the one below
    exact = base.double()
    batch, size, _ = TINY if plan.quick else SIZES
    yield Case(
        op=OP,
        labels={"case": "g_fast, resnet20, resnet8", "shape": f"{batch}x3x{size}x{size}", "pass": "fwd+bwd"},
        providers=[
            Provider("published", "eager", eager(frozen=False)(), backend="reference", rung="as published", labels=plain),
            Provider("frozen", "eager", eager()(), backend="reference", rung="freezing", labels=plain),
            Provider("channels_last", "eager", eager(layout=last)(), backend="reference", rung="channels_last", labels=fp32),
            Provider("identity", "ours", eager(layout=last)(), rung="identity", labels=fp32),
            provider("fused BN in teacher", "ours", fused(), rung="kernels", labels=fp32),
            provider("fused BN in student", "ours", fused(student=True), rung="kernels", labels=fp32),
            provider("fused BN in generator", "ours", fused(student=True, generator=True), rung="kernels", labels=fp32),
            provider("bf16", "ours", fused(student=True, generator=made, half=True), rung="bf16", labels=bf16, tolerance=HALF),
            provider("hooks, bf16", "eager", eager(True, layout=last), backend="reference", labels=bf16, tolerance=HALF),
            provider("compile(T, S), identity", "compile", two_compiled(False), labels=fp32),
            provider("compile(G, T, S)", "compile", all_compiled(False), backend="reference", labels=fp32),
            provider("compile(T, S), identity, bf16", "compile", two_compiled(True), labels=bf16, tolerance=HALF),
            provider("compile(G, T, S), bf16", "compile", all_compiled(True), backend="reference", labels=bf16, tolerance=HALF),
        ],
        truth=step(exact, hooked(exact)),
        baseline="published",
        tolerance=SINGLE,
        compared=compared,
    )
