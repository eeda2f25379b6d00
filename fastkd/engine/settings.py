"""What the loop needs to know beside the method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Settings:
    """Settings of a run.

    Attributes:
      seed: root seed. precision: fp32 or bf16. poll: steps between looks at flags.
      graphs: whether steps may be captured in CUDA graphs (see `engine.graphs`).
      every_minutes, every_steps, keep: see `config.CheckpointConfig`. global_bn: BatchNorm over the global batch.
      data: evaluation set on the device, or None. about: goes into every manifest and must be equal on resume.
      student_metadata: goes into student.safetensors. max_steps: stop with a checkpoint after so many steps (tests, plans).
    """

    seed: int = 0
    precision: str = "fp32"
    poll: int = 10
    graphs: bool = True
    every_minutes: float = 10.0
    every_steps: int | None = None
    keep: int = 2
    global_bn: bool = True
    data: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    student_metadata: dict[str, str] = field(default_factory=dict)
    max_steps: int | None = None
