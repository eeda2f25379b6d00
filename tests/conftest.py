"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.faults.table import pytest_addoption, pytest_collection_modifyitems, pytest_configure

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure"]


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
