"""What an import costs, and what is left without a GPU, without triton, without the compiled part. Each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Makes modules look as if they were not installed.
HIDE = """
import sys
class Hide:
    def __init__(self, *names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name in self.names or any(name.startswith(n + ".") for n in self.names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
"""
USE = """
import torch
from fastkd import ops
x = torch.randn(4, 5, 6, 6, requires_grad=True)
y, sums = ops.frozen_bn_act_stats(x, torch.ones(5), torch.zeros(5), torch.zeros(5), act="relu")
stats = ops.moments(sums, 4 * 36, torch.zeros(5))
(y.sum() + ops.bn_match_loss(stats, torch.ones(2, 5), (0, 5))).backward()
assert x.grad.isfinite().all()
assert ops.class_activation_map(x, torch.randn(3, 5), torch.tensor([0, 1, 2, 0]), norm="minmax").shape == (4, 6, 6)
assert ops.replay_gather(torch.zeros(2, 6, 6, 3, dtype=torch.uint8), torch.tensor([1])).shape == (1, 3, 6, 6)
assert ops.upsample_conv2d(x, torch.randn(2, 5, 3, 3)).shape == (4, 2, 12, 12)
chosen = {r[0]: r[2] for r in ops.table() if r[1] == "cpu"}
why = {r[0]: r[3] for r in ops.table() if r[1] == "cpu"}
"""


def run(code: str, **environment: str) -> str:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    env.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


LIGHT = ["fastkd", "fastkd.ops", "fastkd.errors", "fastkd.config", "fastkd.models", "fastkd.methods", "fastkd.data"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_kernels(module):
    run(f"import sys, {module}\nheavy = {{'torch', 'triton', 'fastkd._C'}} & set(sys.modules)\nassert not heavy, heavy")


def test_torch_modules_load_neither_triton_nor_kernels_nor_cuda():
    """Torch itself may import triton; nothing of ours does before a Triton backend is asked for."""
    run(
        "import sys, torch\nbefore = set(sys.modules)\nimport fastkd.ops.bn_match, fastkd.ops.cam, fastkd.ops.replay, fastkd.ops.upsample\n"
        "bad = (set(sys.modules) - before) & {'fastkd._C', 'triton', 'fastkd.ops.bn_match.triton', 'torch._dynamo'}\nassert not bad, bad\n"
        "assert not torch.cuda.is_initialized()"
    )


@pytest.mark.fault("T32")
def test_without_a_gpu():
    run(USE + "assert 'cuda' not in {r[1] for r in ops.table()}\nassert not torch.cuda.is_initialized()")


@pytest.mark.fault("T32")
def test_without_the_compiled_part():
    run(
        HIDE + "sys.meta_path.insert(0, Hide('fastkd._C'))\n" + USE + "assert chosen['bn_sums'] == 'reference', chosen\n"
        "assert 'not built' in why['bn_sums']['cpp'], why\nassert 'not built' in ops.build_info()['reason']\n"
        "from fastkd.errors import ConfigError\n"
        "try: ops.use('cpp')\nexcept ConfigError as e: assert 'not built' in str(e)\nelse: raise SystemExit('cpp was accepted')"
    )


@pytest.mark.fault("T32")
def test_without_triton():
    run(
        HIDE + "sys.meta_path.insert(0, Hide('triton'))\n" + USE + "assert why['bn_sums']['triton'] != 'ok'\n"
        "from fastkd.errors import ConfigError\n"
        "try: ops.use('triton')\nexcept ConfigError as e: assert 'is not installed' in str(e), e\nelse: raise SystemExit('accepted')"
    )


@pytest.mark.fault("T32")
def test_without_both():
    hidden = "sys.meta_path.insert(0, Hide('triton', 'fastkd._C'))\n"
    run(HIDE + hidden + USE + "assert set(chosen.values()) == {'reference', 'fold'}, chosen")


@pytest.mark.fault("T32")
def test_a_compiled_part_that_does_not_load_is_a_reason_not_a_crash(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nclass Broken:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fastkd._C': raise ImportError('libsomething.so.1: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run(USE + "assert 'libsomething' in why['bn_sums']['cpp'], why", PYTHONPATH=path)
