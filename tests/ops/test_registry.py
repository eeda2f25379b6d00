"""Which backend runs: automatic choice, requests by name, reasons."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from fastkd import ops
from fastkd.errors import ConfigError
from fastkd.ops import _library, _native, _registry
from fastkd.ops.bn_match import native

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def automatic():
    yield
    _registry._wanted = "auto"
    _registry._answers.clear()


def test_every_backend_has_a_module_that_launches_its_kernels(monkeypatch):
    named = {name for op in _registry.OPS.values() for name in op.backends()} - {"reference", "fold"}
    assert named == _library.MODULES.keys()
    monkeypatch.setattr(_library, "choose", lambda op, x: "numpy")  # listed for an op, and nothing written for it
    with pytest.raises(NotImplementedError, match="no module launches kernels of the backend 'numpy'"):
        ops.replay_sums(torch.ones(4))


def test_captured_calls_prefer_kernels_by_their_own_time(monkeypatch):
    monkeypatch.setattr(_registry, "absent", lambda name: None)
    chosen = lambda op: _registry.choose(op, "cuda", "bfloat16")  # noqa: E731
    assert (chosen("bn_sums"), chosen("batch_norm_act")) == ("cuda", "cuda")
    with ops.captured():
        assert (chosen("bn_sums"), chosen("batch_norm_act")) == ("triton", "cuda")
        with ops.captured(False):
            assert chosen("bn_sums") == "cuda"
        assert _registry.choose("bn_sums", "cuda", "float64") == "cuda"  # Triton's has no fp64
        ops.use("reference")
        assert chosen("bn_sums") == "reference"
    ops.use("auto")
    assert chosen("bn_sums") == "cuda"


def test_unknown_name():
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        ops.use("tritno")
    assert ops.backend() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_request_that_cannot_be_met_says_why():
    for name in ("cuda", "triton"):
        with pytest.raises(ConfigError, match=f"ops.backend={name} cannot run here"):
            ops.use(name)
    assert ops.backend() == "auto"


def test_a_dtype_without_kernel(monkeypatch):
    monkeypatch.setattr(_registry, "absent", lambda name: None)
    ops.use("triton")
    with pytest.raises(ConfigError, match="no kernel for float64"):
        _registry.choose("bn_sums", "cuda", "float64")
    ops.use("auto")
    assert _registry.choose("bn_match_loss", "cpu", "float16") == "reference"  # auto falls through


def test_a_device_without_kernel(monkeypatch):
    monkeypatch.setattr(_registry, "absent", lambda name: None)
    ops.use("cuda")
    with pytest.raises(ConfigError, match="does not run on cpu"):
        ops.bn_sums(torch.randn(2, 3, 4, 4), torch.zeros(3))


def test_an_op_without_that_backend_keeps_its_choice(cpp):
    x, w = torch.randn(1, 2, 3, 3), torch.randn(2, 2, 3, 3)
    assert ops.upsample_conv2d(x, w).shape == (1, 2, 6, 6)


def test_reference_runs_no_kernel(monkeypatch):
    monkeypatch.setattr(native, "bn_fwd", lambda *a: pytest.fail("a kernel ran"))
    ops.use("reference")
    ops.bn_sums(torch.randn(2, 3, 4, 4), torch.zeros(3))
    torch.ops.fastkd.bn_sums_fwd(torch.randn(2, 3, 4, 4), torch.zeros(3))


def test_the_kernel_runs(cpp, monkeypatch):
    seen = []
    monkeypatch.setattr(native, "bn_fwd", lambda x, *a: seen.append(x) or (None, torch.zeros(2, 3)))
    ops.use("auto")
    ops.bn_sums(torch.randn(2, 3, 4, 4), torch.zeros(3))
    assert seen


def test_an_unknown_op():
    with pytest.raises(ConfigError, match="unknown op 'bn_sum'; did you mean 'bn_sums'"):
        _registry.choose("bn_sum", "cpu", "float32")


def test_the_tables_of_ops_agree():
    """Names for type checkers, for look-up, for `import *`, for backends, and the page."""
    typed = {
        alias.name: node.module
        for block in ast.parse(Path(ops.__file__).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == ops._FAMILY
    assert sorted(ops.__all__) == sorted([*ops._FAMILY, "backend", "build_info", "captured", "deterministic", "table", "use"])
    assert set(ops._FAMILY) - set(_registry.OPS) == {"bn_stats", "moments", "fold_stem"}  # made of others, or plain torch
    assert set(_registry.OPS) <= set(ops._FAMILY)
    rows = [line for line in (DOCS / "ops.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert not [name for name in ops._FAMILY if not any(f"`{name}" in line.split(" | ")[0] for line in rows)]


def test_table():
    rows = ops.table()
    cpu = {op: (chosen, reasons) for op, device, chosen, reasons in rows if device == "cpu"}
    assert set(cpu) == set(_registry.OPS)
    for chosen, reasons in cpu.values():
        assert reasons["reference"] == "ok" and reasons[chosen] == "ok"
        assert all(reason and isinstance(reason, str) for reason in reasons.values())
    assert "reference" not in {cpu["upsample_conv2d"][0]}


def test_build_info_is_text():
    info = ops.build_info()
    assert all(isinstance(v, str) for v in info.values()) and ("reason" in info or {"compiler", "isa", "cuda_reason"} <= set(info))


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ("80-real 86-real 89-real 90", (9, 0), True),
        ("80-real 86-real 89-real 90", (8, 7), True),  # binary of the same generation
        ("80-real 86-real 89-real 90", (10, 0), True),  # PTX
        ("80-real 86-real 89-real 90", (7, 5), False),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("90-virtual", (9, 0), True),
        ("native", (7, 5), True),
    ],
)
def test_architectures(built, device, runs):
    assert (_native._uncovered(built, device) is None) == runs


def test_seam_refuses_two_devices():
    meta = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="expected one device"):
        ops.bn_sums(torch.randn(2, 3, 4, 4), meta)
    with pytest.raises(ValueError, match="expected one device"):
        _native._addr(meta, torch.device("cpu"))


def test_null_and_misaligned_addresses_raise(cpp):
    from fastkd import _C

    size = _C.Sizes(1, 1, 1, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="x is a null pointer"):
        _C.bn_fwd(0, 0, 0, 0, 64, 0, 64, 64, size, 0, 0.0, 1, False, 0)
    with pytest.raises(ValueError, match="shift is not aligned"):
        _C.bn_fwd(64, 0, 0, 0, 65, 0, 64, 64, size, 0, 0.0, 1, False, 0)
