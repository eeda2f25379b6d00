"""Networks of other packages and of the user's own files. Nothing here is imported before it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from types import ModuleType
from typing import Any

from torch import nn

from fastkd.errors import ConfigError, nearest, unknown


def _package(name: str, extra: str) -> ModuleType:
    """Import an optional package, or one sentence that says what to install.

    A torchvision made for another torch raises RuntimeError or OSError at import, and takes timm down with it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name == name:
            raise ConfigError(f"{name} is not installed; install fastkd[{extra}] with this environment's torch version pinned.") from None
        raise ConfigError(f"{name} cannot be imported: {_line(e)}; install fastkd[{extra}] anew.") from None
    except (ImportError, RuntimeError, OSError, AttributeError) as e:
        raise ConfigError(
            f"{name} is installed but cannot be imported beside this torch ({_line(e)}); "
            f"install fastkd[{extra}] in the version made for it."
        ) from None


def _line(e: BaseException) -> str:
    """Kind and first line of an exception."""
    text = (str(e).strip().splitlines() or ["no message"])[0]
    return f"{type(e).__name__}: {text[:200]}"


def from_timm(name: str, *, classes: int, channels: int, input_size: tuple[int, int] | None) -> nn.Module:
    """A network of timm without pretrained weights; weights come only as a file.

    Raises:
      ConfigError: timm is missing, or does not know the name.
    """
    if ":" in name:
        raise ConfigError(f"'timm:{name}' would fetch something; name the architecture alone and give the weights as a file.")
    timm = _package("timm", "timm")
    known = timm.list_models()
    if name.split(".")[0] not in known:
        close = nearest(name, known)
        raise ConfigError(f"timm has no model '{name}'" + (f"; did you mean 'timm:{close}'?" if close else f"; it lists {len(known)}."))
    try:
        options = _sized(timm.get_pretrained_cfg(name.split(".")[0]), input_size)
        return timm.create_model(name.split(".")[0], pretrained=False, num_classes=classes, in_chans=channels, **options)
    except Exception as e:
        raise ConfigError(f"timm cannot make '{name}' with {classes} classes and {channels} channels ({_line(e)}).") from None


def _sized(config: Any, input_size: tuple[int, int] | None) -> dict[str, Any]:
    """The image size, for networks of timm that are built for one (ViT, Swin, MLP-Mixer: as many position embeddings as patches)."""
    return {"img_size": input_size} if input_size and getattr(config, "fixed_input_size", False) else {}


def from_torchvision(name: str, *, classes: int, channels: int, input_size: tuple[int, int] | None) -> nn.Module:
    """A classifier of torchvision without pretrained weights.

    Raises:
      ConfigError: torchvision is missing or broken, does not know the name, or the images do not have 3 channels.
    """
    models = _package("torchvision", "vision").models
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(unknown("torchvision model", name, known))
    if channels != 3:
        raise ConfigError(f"torchvision's networks take 3 channels, found {channels}; choose a network of fastkd or of timm.")
    try:
        return models.get_model(name, weights=None, num_classes=classes)
    except Exception as e:
        raise ConfigError(f"torchvision cannot make '{name}' with {classes} classes ({_line(e)}).") from None


def from_py(rest: str, *, classes: int, channels: int, input_size: tuple[int, int] | None) -> nn.Module:
    """Import FILE and call FUNCTION with those of classes, channels and input_size that it takes.

    This runs the user's code, so it only happens where `py:` was typed.

    Args:
      rest: FILE:FUNCTION.
    Raises:
      ConfigError: no such file or function, an exception in either, or a result that is no module.
    """
    path, colon, function = rest.rpartition(":")
    if not colon or not path or not function:
        raise ConfigError(f"'py:{rest}' names no function; expected py:FILE:FUNCTION.")
    if not os.path.isfile(path):
        raise ConfigError(f"'py:{rest}': there is no file '{path}'.")
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)  # the file may import its neighbours, also while the function runs
    try:
        make = _function(path, function)
        offered = {"classes": classes, "channels": channels, "input_size": input_size}
        try:
            net = make(**_accepted(make, offered))
        except Exception as e:
            raise ConfigError(f"'{function}' of '{path}' failed ({_line(e)}).") from None
    finally:
        sys.path.remove(folder)
    if not isinstance(net, nn.Module):
        raise ConfigError(f"'{function}' of '{path}' returned a {type(net).__name__}, expected a torch.nn.Module.")
    return net


def _function(path: str, function: str) -> Any:
    name = "fastkd_py_" + os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"'{path}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling of its classes look it up
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise ConfigError(f"'{path}' cannot be imported ({_line(e)}).") from None
    make = getattr(module, function, None)
    if not callable(make):
        own = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_") and getattr(v, "__module__", name) == name]
        raise ConfigError(unknown(f"function of '{path}':", function, own) if own else f"'{path}' has no function '{function}'.")
    return make


def _accepted(make: Any, offered: dict[str, Any]) -> dict[str, Any]:
    """Those of `offered` that `make` takes by name; all of them where it takes any."""
    try:
        takes = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return offered
    if any(p.kind is p.VAR_KEYWORD for p in takes):
        return offered
    named = {p.name for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {k: v for k, v in offered.items() if k in named}
