"""Fixtures that all tests share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from tests.faults.table import pytest_addoption, pytest_collection_modifyitems, pytest_configure

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]


def pytest_runtest_logfinish(nodeid: str, location: object) -> None:
    """A kernel that broke the GPU context would fail every test behind it: the worker of pytest-xdist ends, and another one starts."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            time.sleep(0.5)  # what it reported is on its way
            os._exit(70)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and pretrained networks beside the repository; tests that need it are skipped where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository: real data and pretrained networks are not here")
    return folder


@pytest.fixture
def fp64():
    """Everything that is made without a dtype is fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
