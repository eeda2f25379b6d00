"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
SCORES = {"top1": "top-1", "miou": "mIoU"}
"""What networks are judged by, as events and summaries name it, and as people do."""


def judged_by(values: Mapping[str, object] | None) -> str:
    """The score that a network's line or an event has; top1 where it has none."""
    return next((name for name in SCORES if (values or {}).get(name) is not None), "top1")


def percent(share: float | None) -> str:
    """0.9312 → '93.12 %'; unknown → '–'."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.2f} %"


def duration(seconds: float | None) -> str:
    """Seconds as 4.2 s, 3:07 or 2:03:04; never negative; unknown → '–'."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def seconds(value: float) -> str:
    """Seconds of something short: 2.1 ms, 34 us, 1.3 s; from a minute on as `duration`."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 999.5:
            return f"{value * factor:.3g} {unit}"
    return duration(value)


def size(count: float) -> str:
    """Bytes as 512 B, 3.4 MB, 1.2 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """A loss term in four significant digits at most."""
    return f"{value:.4g}"


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """The last `width` values as blocks, scaled between their smallest and largest."""
    shown = [v for v in values if math.isfinite(v)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] for v in shown)
