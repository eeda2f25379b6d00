"""Fused operations, each with a plain torch definition beside it and backends behind one name.

`import fastkd.ops` loads neither torch nor the compiled part; the first use of a function does.

    from fastkd import ops
    ops.use("reference")       # or "auto" (default), "cpp", "cuda", "triton"
    ops.table()                # which backend runs what here, and why the others do not
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._registry import backend, build_info, captured, deterministic, table, use

if TYPE_CHECKING:
    from .bn_act import batch_norm_act
    from .bn_match import bn_match_loss, bn_stats, bn_sums, frozen_bn_act_stats, moments
    from .cam import class_activation_map
    from .replay import replay_gather
    from .replay_tree import philox_uniform, replay_sample, replay_sums, replay_update
    from .upsample import fold_stem, upsample_affine_sigmoid, upsample_affine_tanh, upsample_conv2d, upsampled_stem_conv2d

_FAMILY = {
    "bn_sums": "bn_match",
    "bn_stats": "bn_match",
    "moments": "bn_match",
    "bn_match_loss": "bn_match",
    "frozen_bn_act_stats": "bn_match",
    "class_activation_map": "cam",
    "replay_gather": "replay",
    "philox_uniform": "replay_tree",
    "replay_sums": "replay_tree",
    "replay_sample": "replay_tree",
    "replay_update": "replay_tree",
    "batch_norm_act": "bn_act",
    "fold_stem": "upsample",
    "upsample_affine_sigmoid": "upsample",
    "upsample_affine_tanh": "upsample",
    "upsample_conv2d": "upsample",
    "upsampled_stem_conv2d": "upsample",
}

__all__ = [
    "backend",
    "batch_norm_act",
    "bn_match_loss",
    "bn_stats",
    "bn_sums",
    "build_info",
    "captured",
    "class_activation_map",
    "deterministic",
    "fold_stem",
    "frozen_bn_act_stats",
    "moments",
    "philox_uniform",
    "replay_gather",
    "replay_sample",
    "replay_sums",
    "replay_update",
    "table",
    "upsample_affine_sigmoid",
    "upsample_affine_tanh",
    "upsample_conv2d",
    "upsampled_stem_conv2d",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _FAMILY:
        raise AttributeError(f"module 'fastkd.ops' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_FAMILY[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return __all__
