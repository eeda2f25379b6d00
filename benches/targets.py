"""What the figures are held to, as data. A target is a ratio of two rows of one run, never a time."""

from __future__ import annotations

from dataclasses import dataclass

MACHINE = {"amx_bf16": "this CPU has no bf16 matrix units (AMX)"}
"""What a target may need of a machine (a flag in the record's facts), and what is said where it is absent."""


@dataclass(frozen=True)
class Target:
    """One cell of the table. Names of labels and providers are patterns with * and ?.

    Attributes:
      row, against: line and column of the table.
      bench: the record that is looked at. where: labels that a case must have; each case that has them must meet the target.
      ours: the provider that is held to it; "": the backend that the op takes by itself. rivals: the fastest of these counts.
      least: ratio of the rival's time to ours, at least; without rivals: share of the copy bandwidth of the same run.
      less: a provider whose time is taken off both first. across: labels in which the two may differ.
      needs: a key of `MACHINE`. even: "not slower": overlapping spreads count as met. missed: what follows where it is not met.
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

    @property
    def wanted(self) -> str:
        if not self.rivals:
            return f"≥ {100 * self.least:.0f} %"
        return "not slower" if self.even else f"≥ {self.least:g}x"


ALL_LAYERS = "BN + activation + statistics + loss, all layers of a teacher, fwd+bwd"
TEACHER = "whole teacher with BN loss, fwd+bwd"
CAM = "CAM op"
SAMPLE = "replay sample + update, 1 M entries, batch 256"
GATHER = "replay gather + augment + normalise"
STAGE = "upsample + conv + BN + LeakyReLU stage, fwd+bwd"
STEP = "a generator step"
LADDER = ("layout", "dtype")

CPU = (
    Target(f"{ALL_LAYERS}, NCHW", "eager", "bn_match", {"case": "all layers*", "layout": "NCHW", "dtype": "float32"}, 5, ("hooks",)),
    Target(
        f"{ALL_LAYERS}, channels_last", "eager", "bn_match",
        {"case": "all layers*", "layout": "channels_last", "dtype": "float32"}, 8, ("hooks",),
    ),
    Target(f"{TEACHER}, ResNet-34, fp32", "eager", "bn_match", {"case": "teacher resnet34", "dtype": "float32"}, 1.3, ("hooks",)),
    Target(f"{TEACHER}, ResNet-20, fp32", "eager", "bn_match", {"case": "teacher resnet20", "dtype": "float32"}, 2.2, ("hooks",)),
    Target(
        f"{TEACHER}, bf16 channels_last", "eager", "bn_match",
        {"case": "teacher *", "layout": "channels_last", "dtype": "bfloat16"}, 3, ("hooks",), needs="amx_bf16",
    ),
    Target(
        f"{TEACHER}, channels_last", "compile", "bn_match",
        {"case": "teacher *", "layout": "channels_last"}, 1, ("compile*",), even=True,
    ),
    Target(CAM, "eager", "cam", {"case": "* classes to *"}, 6, ("product and sum",)),
    Target(CAM, "compile", "cam", {"case": "* classes to *"}, 2, ("compile*",)),
    Target(f"{CAM}, images to maps", "grad-cam", "cam", {"case": "images to maps*"}, 3, ("grad-cam",)),
    Target(
        f"{CAM}, what it adds to a forward", "grad-cam", "cam", {"case": "images to maps*"}, 100, ("grad-cam",), less="forward alone",
    ),
    Target(SAMPLE, "eager", "replay", {"op": "replay_sample", "case": "*1000000*"}, 8, ("cumsum*",)),
    Target(SAMPLE, "cpprb", "replay", {"op": "replay_sample", "case": "*1000000*"}, 3, ("cpprb*",)),
    Target(GATHER, "advanced indexing", "replay", {"op": "replay_gather"}, 6, ("advanced indexing",)),
    Target(GATHER, "a slice loop", "replay", {"op": "replay_gather"}, 2.5, ("slice loop",)),
    Target(GATHER, "compile", "replay", {"op": "replay_gather"}, 2.5, ("compile*",)),
    Target(GATHER, "PNG pool + DataLoader", "replay", {"op": "replay_gather"}, 50, ("PNG*",)),
    Target(STAGE, "eager", "upsample", {"case": "stage*"}, 1.9, ("nearest*",)),
    Target(STAGE, "compile", "upsample", {"case": "stage*"}, 1.6, ("compile(nearest*",)),
    Target(f"{STEP}, fp32", "published way", "generator", {}, 3, ("published",), ours="fused BN in generator", across=LADDER),
    Target(f"{STEP}, bf16", "published way", "generator", {}, 7, ("published",), ours="bf16", across=LADDER, needs="amx_bf16"),
    Target(f"{STEP}, fp32", "compile", "generator", {"dtype": "float32"}, 1.05, ("compile*",), ours="fused BN in generator", across=LADDER),
    Target(f"{STEP}, bf16", "compile", "generator", {"dtype": "bfloat16"}, 1.05, ("compile*",), ours="bf16", across=LADDER),
)  # fmt: skip
TWINS = {
    "bn_sums": "bn_match", "frozen_bn_act_stats": "bn_match", "bn_act": "bn_match", "class_activation_map": "cam",
    "replay_sample": "replay", "replay_gather": "replay",
}  # fmt: skip
"""Ops that have or may have a CUDA kernel and a Triton one, and their benches."""
GPU = (
    Target("BN matching, all layers", "eager", "bn_match", {"case": "all layers*"}, 5, ("hooks",), device="cuda"),
    Target("BN matching, all layers", "compile", "bn_match", {"case": "all layers*"}, 1.2, ("compile*",), device="cuda"),
    *(
        Target(f"memory-bound: {op}", "a copy", bench, {"op": op, "case": "[!t]*"}, 0.85, device="cuda")
        for op, bench in TWINS.items()
        if op not in ("bn_act", "replay_sample")
    ),
    Target("replay gather", "advanced indexing", "replay", {"op": "replay_gather"}, 6, ("advanced indexing",), device="cuda"),
    Target("sampling of 1 M", "torchrl", "replay", {"op": "replay_sample", "case": "*1000000*"}, 10, ("torchrl*",), device="cuda"),
    Target("generator stage", "eager", "upsample", {"case": "stage*"}, 2, ("nearest*",), device="cuda"),
    Target("generator stage", "compile", "upsample", {"case": "stage*"}, 1.5, ("compile(nearest*",), device="cuda"),
    *(
        Target(f"CUDA kernel of {op}", "its Triton twin", bench, {"op": op}, 1.1, ("ours: triton",), "ours: cuda", device="cuda",
               missed="delete the CUDA kernel")
        for op, bench in TWINS.items()
    ),
)  # fmt: skip


def of(device: str) -> tuple[Target, ...]:
    """The targets of a device type."""
    return GPU if device == "cuda" else CPU
