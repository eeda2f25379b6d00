"""The teacher and the condensed set that come with fastkd, and the recipes that make them again: `python -m fastkd.tasks.embedded [FILE]`,
a minute on two cores, and `python -m fastkd.tasks.embedded --condensed [FILE]`, some minutes.

ResNet-20 on the 1,297 training digits; its weights are stored as fp16 to stay small. 10 images a class by DM on the same digits, 26 kB.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from fastkd import models
from fastkd.assemble.networks import ASSETS
from fastkd.config import CondenseConfig, TeachConfig
from fastkd.data import condensed
from fastkd.tasks.condense import condense
from fastkd.tasks.teach import teach

FILE = ASSETS / "digits-resnet20.safetensors"
RECIPE = TeachConfig(model="resnet20", data="digits", epochs=100, batch=64, lr=0.2, label_smoothing=0.1, device="cpu", precision="fp32")

CONDENSED = ASSETS / "condensed" / "digits-dm-10ipc.safetensors"
CONDENSATION = CondenseConfig(data="digits", ipc=10, epochs=1, iterations=300, eval_steps=300, device="cpu", precision="fp32")


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


def make_condensed(file: Path, recipe: CondenseConfig = CONDENSATION) -> float:
    """Condense by the recipe and copy the set; returns the top-1 on the test digits of a ConvNet-3 trained on it (0 … 1)."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = condense(recipe, Path(folder) / "run")
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(folder) / "run" / condensed.FILE, file)
    return float(outcome.summary["student"]["top1"])


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if w != "--condensed"]
    of_condensed = len(words) < len(sys.argv) - 1
    target = Path(words[0]) if words else CONDENSED if of_condensed else FILE
    top1 = make_condensed(target) if of_condensed else make(target)
    print(f"{target}: top-1 {100 * top1:.2f} % on the test digits, {target.stat().st_size} bytes")
