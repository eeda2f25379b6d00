"""What steps free stays with the process: seen in the pages that the system has to hand out, not in time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastkd.engine import allocator
from tests import small

CPU = torch.device("cpu")
FAULTS = """
import contextlib, resource, sys, torch
from fastkd.engine import allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(12 << 20) for _ in range(3)]  # 48 MB each, freed together
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with allocator.kept(torch.device("cpu")) if sys.argv[1] == "kept" else contextlib.nullcontext() as held:
    for _ in range(5):  # until small blocks have settled between the large ones
        faults()
    print(held, faults())
print(held, faults())
"""

glibc = pytest.mark.skipif(allocator._glibc() is None, reason="the C library is not glibc")


def pages(how, **env):
    """Whether memory is held and page faults of four rounds, then the same after the context."""
    usual = {k: v for k, v in os.environ.items() if k not in (*allocator.OWN_CHOICE, "GLIBC_TUNABLES")}
    done = subprocess.run([sys.executable, "-c", FAULTS, how], env={**usual, **env}, capture_output=True, text=True, check=True)
    return [(held, int(n)) for held, n in (line.split() for line in done.stdout.splitlines())]


@glibc
def test_freed_memory_is_not_handed_out_anew():
    (_, usual), _ = pages("freed")
    (held, kept), (_, after) = pages("kept")
    assert held == "True"
    assert usual > 10_000 and kept < usual / 20  # 4 x 3 x 48 MB are 147,456 pages of 4 KB, fewer where pages are larger
    assert after > kept  # and afterwards it is given back again


@glibc
@pytest.mark.parametrize("env", [{"MALLOC_TRIM_THRESHOLD_": "1000000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4194304"}])
def test_what_the_user_has_chosen_stays(env):
    assert pages("kept", **env)[0][0] == "False"


@glibc
def test_nothing_is_changed_for_another_device_or_c_library(monkeypatch):
    with allocator.kept(torch.device("meta")) as held:
        assert not held
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    with allocator.kept(CPU) as held:
        assert not held


def test_a_run_holds_on_to_it(monkeypatch):
    seen = []
    original = allocator.kept

    def kept(device):
        seen.append(device)
        return original(device)

    monkeypatch.setattr(allocator, "kept", kept)
    assert small.run(small.prepared("noise")) == 0
    assert seen == [CPU]
