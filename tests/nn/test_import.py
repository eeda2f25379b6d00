"""The names of `fastkd.nn` cost nothing until one is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_import_does_not_load_torch():
    code = "import sys, fastkd.nn; assert 'torch' not in sys.modules and 'Teacher' in dir(fastkd.nn)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_no_other():
    import fastkd.nn

    for name in fastkd.nn.__all__:
        assert getattr(fastkd.nn, name) is not None
    assert not hasattr(fastkd.nn, "nothing")
