"""Going on from a checkpoint: which one, whether it belongs to this run, and its state put back."""

from __future__ import annotations

from pathlib import Path

import torch

from fastkd import ranks
from fastkd.engine import checkpoint, state
from fastkd.engine.events import Events
from fastkd.engine.guards.collapse import Collapse
from fastkd.engine.settings import Settings
from fastkd.errors import CheckpointError, ConfigError
from fastkd.method import Method


def restored(
    method: Method, settings: Settings, events: Events, out: Path, anew: bool, collapse: Collapse
) -> tuple[tuple[int, int], int]:
    """Put the state of the newest checkpoint back, and that of the guard; where the run goes on: (epoch, step of it), steps done.

    Raises:
      CheckpointError: none can be used, or it does not fit. ConfigError: it is of another run.
    """
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
    if "collapse" in saved.manifest:
        collapse.restore(saved.manifest["collapse"])
    if saved.manifest.get("world", 1) != ranks.world():
        events.write(
            "warning",
            text=f"saved by {saved.manifest.get('world', 1)} ranks, continued by {ranks.world()}: equal to rounding, not to the bit",
        )
    threads, now = saved.manifest.get("threads"), torch.get_num_threads()
    if method.device.type == "cpu" and threads not in (None, now):  # torch cuts sums and products by the number of threads
        events.write(
            "warning",
            text=f"saved with {threads} threads (OMP_NUM_THREADS), continued with {now}: equal to rounding, not to the bit",
        )
    events.write("resumed", epoch=saved.position[0], step=saved.manifest["step"], checkpoint=saved.path.name)
    return saved.position, int(saved.manifest["step"])


def _newest(events: Events, folder: Path, anew: bool) -> checkpoint.Saved | None:
    """The newest checkpoint that verifies on every rank: rank 0 chooses and sets damaged ones aside, the others look for the one it chose.

    On a network disk a rank may see an older state of the folder; then all take the newest that all see.
    """
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
    ranks.meet()  # rank 0 may have had much to read
    chosen = most = int(ranks.max(torch.tensor(_step(saved))).item())
    behind: list[int] = []
    while most >= 0:
        if _step(saved) != most:
            saved = checkpoint.readable(folder, most)
        ranks.meet()
        steps = ranks.gather(torch.tensor([_step(saved)])).tolist()
        behind = behind or [r for r, step in enumerate(steps) if step < most]
        who = f"rank {', '.join(map(str, behind))}"
        if min(steps) < 0:
            raise CheckpointError(f"{who} cannot read the checkpoint of step {chosen}, nor an older one; all must see the same '{folder}'.")
        if min(steps) == most:
            if behind:
                events.write("warning", text=f"{who} cannot read the checkpoint of step {chosen}; all ranks go on from step {most}")
            return saved
        most = min(steps)
    return None


def _step(saved: checkpoint.Saved | None) -> int:
    """Steps done before a checkpoint; -1 for none."""
    return int(saved.manifest["step"]) if saved is not None else -1
