"""The teacher that comes with fastkd, and the recipe that makes it again: `python -m fastkd.tasks.embedded [FILE]`, a minute on two cores.

ResNet-20 on the 1,297 training digits; its weights are stored as fp16 to stay small.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from fastkd import models
from fastkd.assemble.networks import ASSETS
from fastkd.config import TeachConfig
from fastkd.tasks.teach import teach

FILE = ASSETS / "digits-resnet20.safetensors"
RECIPE = TeachConfig(model="resnet20", data="digits", epochs=100, batch=64, lr=0.2, label_smoothing=0.1, device="cpu", precision="fp32")


def make(file: Path, recipe: TeachConfig = RECIPE) -> float:
    """Train by the recipe and write the weights; returns the last top-1 on the 500 test digits (0 … 1)."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = teach(recipe, Path(folder) / "run")
        made = models.load_weights(Path(folder) / "run" / "teacher.safetensors")
    small = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in made.state.items()}
    origin = "trained by fastkd.tasks.embedded on the UCI handwritten digits (Alpaydin and Kaynak 1998, CC BY 4.0); weights CC0"
    file.parent.mkdir(parents=True, exist_ok=True)
    models.save_weights(file, small, {**made.metadata, "recipe": recipe.model_dump_json(), "origin": origin})
    return float(outcome.summary["student"]["top1"])


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    print(f"{target}: top-1 {100 * make(target):.2f} % on the test digits, {target.stat().st_size} bytes")
