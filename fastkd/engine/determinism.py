"""Only deterministic kernels, where a run asks for them: the same bits from the same run on the same GPUs. fastkd's own ops all are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from fastkd.errors import ConfigError

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
"""What cuBLAS and NCCL read when they start: workspaces that concurrent streams do not share, one order of the sums of all ranks."""
REFUSED = "does not have a deterministic implementation"
"""What torch says of a kernel that it then refuses."""


def ask(wanted: bool) -> None:
    """Set `ENVIRONMENT`, where it is wanted and the user has not; before anything is computed on a GPU."""
    if wanted:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Admit deterministic kernels alone for the duration; with False nothing changes.

    Raises:
      ConfigError: an operation has no such kernel; it is named.
    """
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=False)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    except RuntimeError as e:
        if REFUSED not in str(e):
            raise
        name = str(e).partition(REFUSED)[0].strip()
        raise ConfigError(f"deterministic is set, and {name} has no deterministic kernel here; leave it out, or use another device.") from e
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = flags
