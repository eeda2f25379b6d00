from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fastkd import ops
from fastkd.cli.app import app


@pytest.fixture
def cli_run() -> Callable[..., Result]:
    """Run a command line in this process."""
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture(autouse=True)
def automatic() -> Any:
    yield
    ops.use("auto")
