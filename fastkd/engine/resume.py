"""Going on from a checkpoint: which one, whether it belongs to this run, and its state put back."""

from __future__ import annotations

from pathlib import Path

import torch

from fastkd import ranks
from fastkd.engine import checkpoint, state
from fastkd.engine.events import Events
from fastkd.engine.settings import Settings
from fastkd.errors import CheckpointError, ConfigError
from fastkd.method import Method


def restored(method: Method, settings: Settings, events: Events, out: Path, anew: bool) -> tuple[tuple[int, int], int]:
    saved = _newest(events, out / "checkpoints", anew)
    if saved is None:
        return (0, 0), 0
    different = {k: (saved.manifest.get(k), v) for k, v in settings.about.items() if saved.manifest.get(k) != v and k != "world"}
    if different:
        key, (was, now) = next(iter(different.items()))
        raise ConfigError(
            f"the run in '{out}' cannot be continued with another {key}: it was {was}, now {now}; use the old one or a new --out."
        )
    try:
        state.restore(method, saved.tensors, saved.numbers, saved.images)
    except ValueError as e:
        raise CheckpointError(f"checkpoint {saved.path.name} does not fit this run: {e}.") from None
    if saved.manifest.get("world", 1) != ranks.world():
        events.write(
            "warning",
            text=f"saved by {saved.manifest.get('world', 1)} ranks, continued by {ranks.world()}: equal to rounding, not to the bit",
        )
    events.write("resumed", epoch=saved.position[0], step=saved.manifest["step"], checkpoint=saved.path.name)
    return saved.position, int(saved.manifest["step"])


def _newest(events: Events, folder: Path, anew: bool) -> checkpoint.Saved | None:
    """The newest checkpoint that verifies: rank 0 chooses and sets damaged ones aside, the others read the one it chose."""
    said: list[str] = []
    try:
        saved = checkpoint.newest(folder, said) if ranks.rank() == 0 else None
    except CheckpointError:
        if not anew:
            raise
        saved = None
        said.append("no checkpoint is left that can be used; the run starts anew")
    for line in said:
        events.write("warning", text=line)
    if ranks.world() == 1:
        return saved
    chosen = int(ranks.max(torch.tensor(saved.manifest["step"] if saved else -1)).item())
    if ranks.rank() == 0 or chosen < 0:
        return saved
    try:
        return checkpoint.read(folder / checkpoint.name_of(chosen))
    except ValueError as e:
        who = f"rank {ranks.rank()} cannot read the checkpoint of step {chosen} that rank 0 chose"
        raise CheckpointError(f"{who} ({e}); all ranks must see the same '{folder}'.") from None
