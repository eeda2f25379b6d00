"""Other libraries that do a comparable thing. None is a dependency: one that is not installed is a row with its reason."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ._case import Call, CannotRun


def needed(module: str, package: str) -> Any:
    """A peer's module.

    Raises:
      CannotRun: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name == module.partition(".")[0] else f" (it needs {error.name})"
        raise CannotRun(f"{package} is not installed{missing}") from None
    except Exception as error:  # a binary built for another torch
        raise CannotRun(f"{package} does not load: {str(error).splitlines()[0][:160]}") from None


def _torchvision() -> None:
    """Both CAM libraries may import torchvision, which loads beside a CPU torch only with the declarations that the tests keep."""
    with contextlib.suppress(ImportError):  # an installed copy has no tests
        importlib.import_module("tests.torchvision_stub").define()


def grad_cam(net: nn.Module, x: Tensor, labels: Tensor) -> Call:
    """grad-cam's Grad-CAM of the last feature map: a forward and a backward, maps scaled to [0, 1] and resized to the image."""
    _torchvision()
    library = needed("pytorch_grad_cam", "grad-cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    wanted = [targets.ClassifierOutputTarget(label) for label in labels.tolist()]
    maker = library.GradCAM(model=net, target_layers=[_last_features(net, x)])
    return lambda: (torch.as_tensor(maker(input_tensor=x, targets=wanted)).to(x.device),)


def torchcam(net: nn.Module, x: Tensor, labels: Tensor) -> Call:
    """torchcam's Grad-CAM of the last feature map, at the map's own size."""
    _torchvision()
    library = needed("torchcam.methods", "torchcam")
    maker, wanted = library.GradCAM(net, _last_features(net, x)), labels.tolist()
    return lambda: tuple(maker(wanted, net(x)))


def _last_features(net: nn.Module, x: Tensor) -> nn.Module:
    """The module whose output enters the global pooling."""
    seen: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(m)) for m in net.modules()]
    with torch.no_grad():
        net(x[:1])
    for hook in hooks:
        hook.remove()
    at = next((i for i, m in enumerate(seen) if isinstance(m, nn.AdaptiveAvgPool2d)), 0)
    if at == 0:
        raise CannotRun("no module's output enters a global pooling")
    return seen[at - 1]


def cpprb(images: Tensor, batch: int, mean: Tensor, std: Tensor) -> Call:
    """cpprb's uniform sampling of the same store, then to floats and normalised; no crop, no flip, and it draws the rows itself."""
    if images.is_cuda:
        raise CannotRun("cpprb stores on the CPU")
    library = needed("cpprb", "cpprb")
    buffer = library.ReplayBuffer(len(images), {"x": {"shape": images.shape[1:], "dtype": "uint8"}})
    buffer.add(x=images.numpy())
    return lambda: (_finish(torch.from_numpy(buffer.sample(batch)["x"]), mean, std),)


def torchrl(images: Tensor, batch: int, mean: Tensor, std: Tensor) -> Call:
    """torchrl's uniform sampling of the same store, then to floats and normalised; no crop, no flip, and it draws the rows itself."""
    library = needed("torchrl.data", "torchrl")
    buffer = library.ReplayBuffer(storage=library.LazyTensorStorage(len(images), device=images.device), batch_size=batch)
    buffer.extend(images)
    return lambda: (_finish(buffer.sample(), mean, std),)


def cpprb_prioritised(leaves: Tensor, batch: int) -> Call:
    """cpprb's prioritised sampling with weights, and the same priorities written back."""
    if leaves.is_cuda:
        raise CannotRun("cpprb stores on the CPU")
    library = needed("cpprb", "cpprb")
    buffer = library.PrioritizedReplayBuffer(len(leaves), {"x": {}}, alpha=1.0)
    buffer.add(x=leaves.numpy(), priorities=leaves.double().numpy())

    def call() -> tuple[Tensor, ...]:
        drawn = buffer.sample(batch, beta=0.4)
        buffer.update_priorities(drawn["indexes"], drawn["x"].ravel())
        return torch.from_numpy(drawn["indexes"]), torch.from_numpy(drawn["weights"])

    return call


def torchrl_prioritised(leaves: Tensor, batch: int) -> Call:
    """torchrl's prioritised sampler with weights, and the same priorities written back."""
    library = needed("torchrl.data", "torchrl")
    samplers = needed("torchrl.data.replay_buffers.samplers", "torchrl")
    storage = library.LazyTensorStorage(len(leaves), device=leaves.device)
    sampler = samplers.PrioritizedSampler(len(leaves), alpha=1.0, beta=0.4)
    buffer = library.ReplayBuffer(storage=storage, sampler=sampler, batch_size=batch)
    rows = buffer.extend(leaves)
    buffer.update_priority(rows, leaves)

    def call() -> tuple[Tensor, ...]:
        taken, info = buffer.sample(return_info=True)
        buffer.update_priority(info["index"], taken)
        return torch.as_tensor(info["index"]), torch.as_tensor(info.get("_weight", info.get("priority_weight")))

    return call


def _finish(taken: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return ((taken.to(torch.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
