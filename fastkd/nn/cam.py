"""Class activation maps of a classifier, with the calling convention of pytorch-grad-cam and without its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.errors import InputError
from fastkd.ops import class_activation_map

from . import graph as fxg
from .freeze import in_eval
from .instrument import Teacher
from .recorder import Recorder


class ClassActivationMap(nn.Module):
    """Maps in [0, 1] of what speaks for a class, at the size of the image: those of pytorch-grad-cam's `GradCAM` on the last feature map.

    For a head `linear(mean over space of the map)` the gradient of a logit is the head's row of that class, so that one forward and
    one kernel do (`ops.class_activation_map` with relu, min-max, resize to the image, min-max again). Other heads are refused.

    The network is used as it is at each call, in eval mode and without gradients; nothing is copied, replaced or hooked, and each
    submodule gets its own mode back. A `Teacher` may stand for the network: its forward is the faster one.

    Args:
      model:         classifier, images [B, C, H, W] → logits [B, classes], that ends in a global average pooling and a linear layer.
      target_layers: None, or the one module whose output enters the pooling; anything else is refused at the first call.
    Raises:
      InputError: see `forward`; several target layers, or one that is not part of the model.
    """

    def __init__(self, model: nn.Module, target_layers: Sequence[nn.Module] | None = None):
        super().__init__()
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        layers = list(target_layers or ())
        if len(layers) > 1:
            raise InputError(f"{len(layers)} target layers were given; expected the one that enters the global pooling, or None.")
        if layers and isinstance(self.model, Teacher):
            raise InputError("a Teacher has no layers to choose from; expected target_layers=None.")
        names = {m: name for name, m in self.model.named_modules()}
        if layers and layers[0] not in names:
            kind = type(layers[0]).__name__
            raise InputError(f"the target layer ({kind}) is not part of the model; expected one of its modules, or None.")
        self._layer: str | None = names[layers[0]] if layers else None
        self._checked = False

    @torch.no_grad()
    def forward(self, input_tensor: Tensor, targets: Tensor | Sequence[Any] | None = None) -> Tensor:
        """One map an image.

        Args:
          input_tensor: [B, C, H, W].
          targets: int64 [B]; or a list of B class numbers or pytorch-grad-cam `ClassifierOutputTarget`s; None: the class of the highest
            logit of each image.
        Returns:
          [B, H, W] in [0, 1], at least fp32, without gradient, on the device of the images; `np.asarray` takes it as it is on the CPU.
        Raises:
          InputError: a network without such a head, a target layer that does not enter the pooling, targets of another kind (a softmax
            score has other gradients than a logit) or number. IndexError: a tensor of targets with a class that does not exist (on the
            CPU; elsewhere it is taken as the nearest).
        """
        logits, features, head = self._run(input_tensor)
        if not self._checked:
            self._check(input_tensor, logits, features, head)
        assert features is not None and head is not None
        labels = logits.argmax(1) if targets is None else _labels(targets, len(logits), logits.shape[1]).to(logits.device)
        size = (input_tensor.shape[-2], input_tensor.shape[-1])
        return class_activation_map(features, head[0], labels, relu=True, norm="minmax", size=size, renorm=True)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor | None, fxg.Head | None]:
        """Logits, the map that enters the pooling, weight and bias of the head."""
        if isinstance(self.model, Teacher):
            t = self.model(x)
            return t.logits, t.map, self.model.head
        with in_eval(self.model), Recorder(x, stages=False) as seen:
            logits = self.model(x)
        return logits, seen.map, None if seen.head is None else fxg.head_weights(*seen.head)

    def _check(self, x: Tensor, logits: Any, features: Tensor | None, head: fxg.Head | None) -> None:
        """Whether the maps of this network are class activation maps, and of the layer asked for; looks once, and waits for the device."""
        reason = ""
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            reason = f"the network returns {found}, not logits [B, classes]"
        elif isinstance(self.model, Teacher) and head is None:
            reason = self.model.head_reason
        elif features is None or head is None:
            reason = "no global average pooling feeds the last linear layer"
        elif not fxg.agrees(head, logits, features):
            reason = "its logits are not the last linear layer of the mean of the map before the pooling"
        if reason:
            raise InputError(f"class activation maps need a head of global average pooling and a linear layer: {reason}.")
        if self._layer is not None:
            self._check_layer(x)
        self._checked = True

    def _check_layer(self, x: Tensor) -> None:
        """Raises InputError unless the target layer returns the very tensor that enters the pooling, as it is then."""
        returned: list[tuple[Tensor, int]] = []

        def note(module: nn.Module, inputs: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                returned.append((out, out._version))

        hook = dict(self.model.named_modules())[str(self._layer)].register_forward_hook(note)
        try:
            with torch.inference_mode(False), torch.no_grad(), in_eval(self.model), Recorder(x[:1], stages=False) as seen:
                self.model(x[:1])
        finally:
            hook.remove()
        assert seen.map is not None
        if not any(out is seen.map and version == out._version for out, version in returned):
            raise InputError(
                f"the output of the target layer '{self._layer}' does not enter the global pooling; "
                "expected the module before the pooling, or target_layers=None, which finds it."
            )

    def __enter__(self) -> ClassActivationMap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Does nothing: no hook is left on the network."""


def _labels(targets: Tensor | Sequence[Any], batch: int, classes: int) -> Tensor:
    """int64 [batch] on the device of a tensor, else on the CPU."""
    if len(targets) != batch:
        raise InputError(f"{len(targets)} targets for {batch} images; expected one an image.")
    if isinstance(targets, Tensor):
        if targets.dtype != torch.int64 or targets.dim() != 1:
            raise InputError(f"targets are {targets.dtype} of shape {tuple(targets.shape)}; expected int64 [{batch}].")
        return targets
    numbers = [_number(i, t) for i, t in enumerate(targets)]
    for i, n in enumerate(numbers):
        if not 0 <= n < classes:
            raise InputError(f"targets[{i}] is class {n}; expected 0 to {classes - 1} (nearest: {max(0, min(n, classes - 1))}).")
    return torch.tensor(numbers, dtype=torch.int64)


def _number(i: int, target: Any) -> int:
    """The class of a number (torch's and NumPy's too), or of a `ClassifierOutputTarget`, known by its name: nothing is imported."""
    if any(t.__name__ == "ClassifierOutputTarget" for t in type(target).__mro__):
        target = target.category
    try:
        return int(target.__index__())
    except (AttributeError, TypeError):
        raise InputError(
            f"targets[{i}] is a {type(target).__name__}; expected a class number or a ClassifierOutputTarget, whose score is a logit."
        ) from None
