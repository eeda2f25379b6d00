"""Backends as a parameter, and NaN in every tensor that fastkd leaves uninitialised."""

from __future__ import annotations

import sys

import pytest
import torch

from fastkd import ops
from fastkd.ops import _registry


@pytest.fixture(params=["reference", "cpp", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest):
    """Each backend by name; skipped, with its reason, where it cannot run."""
    name = request.param
    if reason := _registry.absent(name):
        pytest.skip(f"{name}: {reason}")
    ops.use(name)
    yield name
    ops.use("auto")


@pytest.fixture
def device(backend: str) -> str:
    return "cuda" if backend in ("cuda", "triton") else "cpu"


@pytest.fixture
def cpp():
    if reason := _registry.absent("cpp"):
        pytest.skip(reason)
    ops.use("cpp")
    yield
    ops.use("auto")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch):
    """torch.empty and torch.empty_like called from fastkd return NaN (or all bits set): whoever forgets to write is seen."""

    def poisoned(make):
        def call(*args, **kwargs):
            out = make(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("fastkd") and type(out) is torch.Tensor:
                out.fill_(float("nan") if out.is_floating_point() else -1)
            return out

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
