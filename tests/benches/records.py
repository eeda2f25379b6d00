"""Records made by hand, for what reads them."""

from __future__ import annotations

from typing import Any


def row(provider: str, ms: float | None = None, kind: str = "ours", **more: Any) -> dict[str, Any]:
    """A row of the case "BN layers"; without a time it has a reason."""
    labels = {"op": "frozen_bn_act_stats", "case": "BN layers resnet20", "shape": "8x3x8x8", "layout": "NCHW", "dtype": "float32"}
    out: dict[str, Any] = {**labels, "pass": "fwd+bwd", "threads": 1, "provider": provider, "kind": kind, "ok": True}
    out |= {"reason": "is not here"} if ms is None else {"ms": ms, "p20": 0.95 * ms, "p80": 1.05 * ms}
    return out | more


def record(rows: list[dict[str, Any]], bench: str = "bn_match", **facts: Any) -> dict[str, Any]:
    about = {
        "type": "cpu", "device": "cpu", "host": {"cpu": "a CPU", "cores": 2}, "flags": ["avx2"], "torch": "2.13.0", "python": "3.11.7",
        "copy_gbps": 20.0, "revision": "abc", "settings": {"quick": False},
        "ops": [{"op": "frozen_bn_act_stats", "device": "cpu", "chosen": "cpp", "backends": {}}],
    }  # fmt: skip
    return {"bench": bench, "complete": True, "seconds": 1.0, "facts": about | facts, "gate": [], "rows": rows}
