"""What the engine needs to know beside the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastkd.config import WalkConfig

ELSEWHERE = frozenset({"device", "graphs", "checkpoint"})
"""Keys of `WalkConfig` that are no field here by the same name: `Given` has the device, the others are taken apart in `Settings.of`."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run, made once by `of` and handed to all that walks its steps.

    Attributes:
      seed: root seed. precision: fp32 or bf16. poll: steps between looks at flags.
      deterministic: deterministic kernels alone (see `engine.determinism`).
      graphs: whether steps may be captured in CUDA graphs (see `engine.graphs`).
      every_minutes, every_steps, keep: see `config.CheckpointConfig`.
      global_bn: BatchNorm over the global batch; networks become so when the method is prepared (`loop.prepare`).
      data: evaluation set on the device, or None. about: goes into every manifest and must be equal on resume.
      student_metadata: goes into student.safetensors. max_steps: stop with a checkpoint after so many steps (tests, plans).
    """

    seed: int = 0
    precision: str = "fp32"
    poll: int = 10
    deterministic: bool = False
    graphs: bool = True
    every_minutes: float = 10.0
    every_steps: int | None = None
    keep: int = 2
    global_bn: bool = True
    data: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    student_metadata: dict[str, str] = field(default_factory=dict)
    max_steps: int | None = None

    @classmethod
    def of(cls, config: WalkConfig, *, precision: str, **more: Any) -> Settings:
        """Those of a configuration. Every key of `WalkConfig` arrives: one that is no field here is a TypeError.

        Args:
          precision: what the configuration's stands for on the device. more: fields that `WalkConfig` does not have.
        """
        same = {key: getattr(config, key) for key in WalkConfig.model_fields.keys() - ELSEWHERE}
        return cls(**{**same, "precision": precision}, graphs=config.graphs == "auto", **dict(config.checkpoint), **more)
