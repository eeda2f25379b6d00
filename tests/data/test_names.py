"""Names from outside (fault T19)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from fastkd.data.names import file_name, printable

HOSTILE = [
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "x" * 300,
    "CON",
    "con.txt",
    "lpt1",
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "a/b\\c",
    "caf\udce9",
    "été",
    "a b",
    "x.",
]


@pytest.mark.fault("T19")
@pytest.mark.parametrize("name", HOSTILE)
def test_file_name_is_one_safe_component(name, tmp_path):
    safe = file_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", safe) and len(safe) <= 120
    assert safe.split(".")[0].upper() not in {"CON", "LPT1"} and ".." not in Path(safe).parts
    (tmp_path / safe).write_text("here")
    assert os.listdir(tmp_path) == [safe]


def test_safe_names_stay_and_different_names_stay_different():
    assert file_name("n01440764") == "n01440764" and file_name("Ankle-boot_2.png") == "Ankle-boot_2.png"
    assert len({file_name(name) for name in HOSTILE}) == len(HOSTILE)
    assert file_name("a b") != file_name("a_b") and file_name("x" * 300) != file_name("x" * 301)


@pytest.mark.fault("T19")
def test_printable_has_no_control_characters_and_encodes():
    assert printable("a\x1b[31m\nb") == "a�[31m�b"
    assert printable("caf\udce9").encode("utf-8") == "caf�".encode()
    assert printable("ordinary name") == "ordinary name"
