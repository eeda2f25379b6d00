"""Feature, map and stages of a network that cannot be traced: read from the calls that its own forward makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Recorder(TorchFunctionMode):
    """Context around one forward. Nothing is attached to the network, nothing is computed: tensors are noted as they pass.

    After it: `feature` is the input of the last linear layer (or of the last 1x1 convolution on a 1x1 map), `map` the input of the
    last pooling to 1x1 before that, `head` weight and bias of that layer, `groups` the first input of a strided convolution or pooling
    at each resolution, the image excepted, and the map. Without `stages` the map alone: the others are not kept from being freed.
    """

    def __init__(self, image: Tensor, *, stages: bool = True):
        super().__init__()
        self.image = image
        self.stages = stages
        self.feature: Tensor | None = None
        self.map: Tensor | None = None
        self.head: tuple[Tensor, Tensor | None] | None = None
        self._pooled: Tensor | None = None
        self._ends: dict[tuple[int, ...], Tensor] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        note = self._notes.get(func)
        if note is not None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor):
                note(self, x, args, kwargs)
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, args: Any, kwargs: Any) -> None:
        self._note_head(x, args, kwargs)

    def _conv(self, x: Tensor, args: Any, kwargs: Any) -> None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
        if tuple(weight.shape[2:]) == (1, 1) and tuple(x.shape[2:]) == (1, 1) and self._pooled is not None:
            self._note_head(x, args, kwargs)
        self._strided(x, stride)

    def _note_head(self, x: Tensor, args: Any, kwargs: Any) -> None:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        self.feature, self.map = x.flatten(1) if x.dim() == 4 else x, self._pooled
        self.head = (weight, bias)

    def _adaptive(self, x: Tensor, args: Any, kwargs: Any) -> None:
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        if size in (1, (1, 1), [1, 1]):
            self._pooled = x

    def _window(self, x: Tensor, args: Any, kwargs: Any) -> None:
        kernel = args[1] if len(args) > 1 else kwargs["kernel_size"]
        stride = (args[2] if len(args) > 2 else kwargs.get("stride")) or kernel
        if (tuple(kernel) if isinstance(kernel, tuple | list) else (kernel, kernel)) == tuple(x.shape[2:]):
            self._pooled = x
        else:
            self._strided(x, stride)

    def _mean(self, x: Tensor, args: Any, kwargs: Any) -> None:
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if x.dim() == 4 and isinstance(dims, tuple | list) and sorted(d % 4 for d in dims) == [2, 3]:
            self._pooled = x

    def _max(self, x: Tensor, args: Any, kwargs: Any) -> None:
        self._strided(x, (args[2] if len(args) > 2 else kwargs.get("stride")) or (args[1] if len(args) > 1 else kwargs["kernel_size"]))

    def _strided(self, x: Tensor, stride: Any) -> None:
        if self.stages and max(stride if isinstance(stride, tuple | list) else (stride,)) > 1 and x is not self.image:
            self._ends.setdefault(tuple(x.shape[2:]), x)

    @property
    def groups(self) -> tuple[Tensor, ...]:
        last = () if self.map is None or any(self.map is x for x in self._ends.values()) else (self.map,)
        return (*self._ends.values(), *last)

    _notes: dict[Any, Callable[..., None]] = {
        F.linear: _linear,
        F.conv2d: _conv,
        torch.conv2d: _conv,
        F.adaptive_avg_pool2d: _adaptive,
        F.avg_pool2d: _window,
        F.max_pool2d: _max,
        torch.max_pool2d: _max,
        torch.mean: _mean,
        Tensor.mean: _mean,
    }
