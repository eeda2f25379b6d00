"""What the figures are held to, as data. A target is a ratio of two rows of one run, never a time."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.ops._registry import OPS

MACHINE = {"amx_bf16": "this CPU has no bf16 matrix units (AMX)"}
"""What a target may need of a machine (a flag in the record's facts), and what is said where it is absent."""


@dataclass(frozen=True)
class Target:
    """One cell of the table. Names of labels and providers are patterns with * and ?.

    Attributes:
      row, against: line and column of the table.
      bench: the record that is looked at. where: labels that a case must have; each case that has them must meet the target.
      ours: the provider that is held to it; "": the backend that the op takes by itself.
      rivals: providers, or kinds of them, of which the fastest counts.
      least: ratio of the rival's time to ours, at least; without rivals: share of the copy bandwidth of the same run.
      less: a provider whose time is taken off the rival's: what it adds. across: labels in which the two may differ.
      needs: a key of `MACHINE`. even: "not slower": overlapping spreads count as met. missed: what follows where it is not met.
      graph: of kernels without their launches: times from CUDA graphs, where both rows have one.
    """

    row: str
    against: str
    bench: str
    where: dict[str, str]
    least: float
    rivals: tuple[str, ...] = ()
    ours: str = ""
    less: str = ""
    across: tuple[str, ...] = ()
    device: str = "cpu"
    needs: str = ""
    even: bool = False
    missed: str = ""
    graph: bool = False

    @property
    def wanted(self) -> str:
        if not self.rivals:
            return f"≥ {100 * self.least:.0f} %"
        return "not slower" if self.even else f"≥ {self.least:g}x"


FP32 = {"dtype": "float32"}
LAYERS = FP32 | {"case": "BN layers *"}
HALF = {"case": "teacher *", "layout": "channels_last", "dtype": "bfloat16"}
MAPS, IMAGES = {"case": "ResNet*"}, {"case": "images to maps*"}
SAMPLES, GATHERS = {"op": "replay_sample*", "case": "1000000 priorities"}, {"op": "replay_gather"}
STAGES = {"case": "stage *"}
LADDER = ("layout", "dtype")
"""Labels in which the rungs of a ladder differ."""

GROUP = "BN + activation + statistics + loss, all layers of a teacher, fwd+bwd"
TEACHER = "whole teacher with BN loss, fwd+bwd"
CAM = "CAM op"
SAMPLE = "replay sample + update, 1 M entries, batch 256"
GATHER = "replay gather + augment + normalise, 32² and 112²"
STAGE = "upsample + conv + BN + LeakyReLU stage, fwd+bwd"
STEP = "a generator step (generator, ResNet-20 teacher, ResNet-8 student)"
BEST = "fused BN in generator"
"""The last fp32 rung of the generator's ladder."""

CPU = (
    Target(f"{GROUP}, NCHW", "eager", "bn_match", LAYERS | {"layout": "NCHW"}, 5, ("hooks",)),
    Target(f"{GROUP}, channels_last", "eager", "bn_match", LAYERS | {"layout": "channels_last"}, 8, ("hooks",)),
    Target(f"{TEACHER}, ResNet-34, fp32", "eager", "bn_match", FP32 | {"case": "teacher *resnet34"}, 1.3, ("hooks",)),
    Target(f"{TEACHER}, ResNet-20, fp32", "eager", "bn_match", FP32 | {"case": "teacher resnet20"}, 2.2, ("hooks",)),
    Target(f"{TEACHER}, bf16 channels_last", "eager", "bn_match", HALF, 3, ("hooks",), needs="amx_bf16"),
    Target(f"{TEACHER}, fp32 channels_last", "compile", "bn_match", HALF | FP32, 1, ("compile*",), even=True),
    Target(CAM, "eager", "cam", MAPS, 6, ("product and sum",)),
    Target(CAM, "compile", "cam", MAPS, 2, ("compile*",)),
    Target(f"{CAM}, images to maps", "grad-cam", "cam", IMAGES, 3, ("grad-cam",), "ours: network"),
    Target(f"{CAM}, what a library adds to a forward", "grad-cam", "cam", IMAGES, 100, ("grad-cam",), "ours: maps alone", "forward alone"),
    Target(SAMPLE, "eager", "replay", SAMPLES, 8, ("eager",)),
    Target(SAMPLE, "cpprb", "replay", SAMPLES, 3, ("cpprb*",)),
    Target(GATHER, "advanced indexing", "replay", GATHERS, 6, ("advanced indexing",)),
    Target(GATHER, "a slice loop", "replay", GATHERS, 2.5, ("slice loop",)),
    Target(GATHER, "compile", "replay", GATHERS, 2.5, ("compile*",)),
    Target(GATHER, "PNG pool + DataLoader", "replay", GATHERS | {"layout": "channels_last"}, 50, ("PNG*",)),
    Target(STAGE, "eager", "upsample", STAGES | FP32, 1.9, ("published",)),
    Target(STAGE, "compile", "upsample", STAGES | FP32, 1.6, ("compile(published)",)),
    Target(f"{STEP}, fp32", "the published way", "generator", {}, 3, ("published",), BEST, across=LADDER),
    Target(f"{STEP}, bf16", "the published way", "generator", {}, 7, ("published",), "bf16", across=LADDER, needs="amx_bf16"),
    Target(f"{STEP}, fp32", "compile", "generator", FP32, 1.05, ("compile*",), BEST, across=LADDER),
    Target(f"{STEP}, bf16", "compile", "generator", {"dtype": "bfloat16"}, 1.05, ("compile*",), "bf16", across=LADDER),
)
BANDWIDTH = {
    "frozen_bn_act_stats": ("bn_match", "single op*"), "bn_sums": ("bn_match", "single op"),
    "batch_norm_act": ("upsample", "BN + act alone"), "upsample_affine_tanh": ("upsample", "*"),
    "class_activation_map": ("cam", "*, full"), "replay_gather": ("replay", "*, full"), "replay_sums": ("replay", "*, full"),
}  # fmt: skip
"""Ops that memory limits, and the cases that fill a GPU."""
TWINS = {
    "bn_sums": ("bn_match", "*"), "frozen_bn_act_stats": ("bn_match", "*"), "batch_norm_act": ("upsample", "BN + act alone"),
    "class_activation_map": ("cam", "ResNet*"), "replay_gather": ("replay", "*"), "replay_sums": ("replay", "*"),
    "replay_sample": ("replay", "* alone"), "replay_update": ("replay", "* alone"), "philox_uniform": ("replay", "*"),
}  # fmt: skip
"""Ops that have a CUDA kernel and a Triton one: the bench and the cases that time both alone. A CUDA kernel stays for what it wins:
called one by one (several ranks, drop-ins), where its launch from C++ counts, or replayed from a graph, where only its own time does
(`captured` in the ops' registry says which of the two graphs take); one that wins neither goes."""
RATIOS = (
    ("BN matching, all layers, fwd+bwd", "eager", "bn_match", {"case": "BN layers *"}, 5, ("hooks",)),
    ("BN matching, whole teacher", "compile", "bn_match", {"case": "teacher *"}, 1.2, ("compile*",)),
    ("replay gather", "advanced indexing", "replay", GATHERS, 6, ("advanced indexing",)),
    ("generator stage", "eager", "upsample", STAGES, 2, ("published",)),
    ("generator stage", "compile", "upsample", STAGES, 1.5, ("compile(published)",)),
)
"""What is held to both ways on a GPU: called from Python, and replayed from a CUDA graph, as the engine's steps are."""
GPU = (
    *(
        Target(f"{row}, {how}", *rest, device="cuda", graph=how == "replayed")
        for row, *rest in RATIOS
        for how in ("called", "replayed")
    ),
    Target("sampling of 1 M", "torchrl's CUDA tree", "replay", SAMPLES, 10, ("torchrl*",), device="cuda"),
    *(
        Target(f"memory-bound: {op}", "a copy", bench, {"op": op, "case": case}, 0.85, device="cuda", graph=True)
        for op, (bench, case) in BANDWIDTH.items()
    ),
    *(
        Target(
            f"CUDA kernel of {op}, {how}", "its Triton twin", bench, {"op": op, "case": case}, 1.1, ("ours: triton",), "ours: cuda",
            device="cuda", missed=missed, graph=how == "replayed",
        )
        for op, (bench, case) in TWINS.items()
        for how, missed in (("called", ""), ("replayed", "graphs take Triton's" if OPS[op].captured else ""))
    ),
)  # fmt: skip


def of(device: str) -> tuple[Target, ...]:
    """The targets of a device type."""
    return GPU if device == "cuda" else CPU
