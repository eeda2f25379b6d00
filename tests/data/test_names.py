"""Names from outside (fault T19)."""

from __future__ import annotations

import pytest

from fastkd.data.names import printable


@pytest.mark.fault("T19")
def test_printable_has_no_control_characters_and_encodes():
    assert printable("a\x1b[31m\nb") == "a�[31m�b"
    assert printable("caf\udce9").encode("utf-8") == "caf�".encode()
    assert printable("ordinary name") == "ordinary name"
