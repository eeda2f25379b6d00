"""Triton kernels without a GPU: interpreted on CPU tensors against the reference, and compiled for real architectures.

In subprocesses: the interpreter is chosen when triton is imported, and an out-of-bounds load there ends the process. It shows
indexing and algebra, not precision; bf16 is rounded towards zero by it, so results in bf16 may be one unit in the last place off.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

INTERPRET = """
import torch
from fastkd import ops
ops.use("triton")
assert dict((r[0], r[2]) for r in ops.table())["bn_sums"] == "triton"
torch.manual_seed(0)
shapes = [(3, 5, 7, 7), (0, 4, 3, 3), (70, 3, 5, 17), (2, 127, 1, 1), (5, 6), (2, 65, 3, 2)]
for dtype, rtol, atol in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 5e-2), (torch.float16, 2e-3, 2e-2)):
    for shape in shapes:
        for layout in ("nchw", "nhwc", "sliced") if len(shape) == 4 and dtype == torch.float32 else ("nchw",):
            cases = (("none", False), ("relu", True), ("relu6", False), ("leaky_relu", True))
            for act, with_residual in cases if dtype == torch.float32 else cases[1:2]:
                x = torch.randn(shape).to(dtype)
                if x.dim() == 4 and layout == "nhwc":
                    x = x.contiguous(memory_format=torch.channels_last)
                if x.dim() == 4 and layout == "sliced":
                    x = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3]).to(dtype)[:, :, 1:]
                c = shape[1]
                scale, bias, shift = torch.randn(3, c)
                residual, gy, gsums, out = torch.randn_like(x), torch.randn_like(x), torch.randn(2, c), []
                for name in ("reference", "triton"):
                    ops.use(name)
                    v, r = x.clone().requires_grad_(), residual.clone().requires_grad_()
                    y, s = ops.frozen_bn_act_stats(v, scale, bias, shift, residual=r if with_residual else None, act=act)
                    sums = ops.bn_sums(v, shift)
                    inputs = [v, r] if with_residual else [v]
                    out.append([y, s, *torch.autograd.grad([y, s], inputs, [gy, gsums], retain_graph=True), sums,
                                torch.autograd.grad(sums, v, gsums)[0], torch.autograd.grad(y, v, gy)[0]])
                for ours, theirs in zip(out[1], out[0], strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f"{dtype} {shape} {layout} {act}: {m}")
print("agree")
"""

LOSS = """
import torch
from fastkd import ops
torch.manual_seed(0)
for widths in ([3, 0, 1, 129, 300], [5] * 40, [0], []):
    offsets = tuple(sum(widths[:i]) for i in range(len(widths) + 1))
    stats, target, average = torch.rand(3, 2, offsets[-1]) + 0.3
    if offsets[-1] > 3:
        stats[:, :3], average[:, :3] = target[:, :3], target[:, :3]  # a layer with norm 0
        stats[1, 4] = 0  # a constant channel
    for kind in ("l2", "gauss_kl"):
        blend = {"average": average, "momentum": 0.9}
        for how in ({}, blend, blend | {"calls": torch.tensor(0)}, blend | {"calls": torch.tensor(2)}):
            out = []
            for name in ("reference", "triton"):
                ops.use(name)
                v = stats.clone().requires_grad_()
                loss = ops.bn_match_loss(v, target, offsets, first=10.0, kind=kind, **how)
                out.append((loss, torch.autograd.grad(loss, v, torch.tensor(0.7))[0]))
            for ours, theirs in zip(out[1], out[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m: f"{widths} {kind} {how.keys()}: {m}")
print("agree")
"""

# Every branch: both layouts, relu, the three norms, with and without resize and renorm, maps of more than one block of cells (the last
# shape) and images of more than one block of pixels, windows of more than one tile in the adjoint (64 columns from 3), both rows.
INTERPRET_CAM = """
import torch
from fastkd import ops
from fastkd.ops.cam.reference import class_activation_map_ref as definition
ops.use("triton")
assert dict((r[0], r[2]) for r in ops.table())["class_activation_map"] == "triton"
torch.manual_seed(0)
shapes = [(2, 5, 7, 7), (0, 4, 3, 3), (3, 130, 1, 1), (1, 1, 4, 3), (2, 70, 3, 2), (1, 3, 9, 10)]
options = [(False, "none", None, False), (True, "minmax", None, False), (True, "max", None, False), (True, "minmax", (40, 33), True),
           (False, "max", (2, 70), True), (True, "none", (9, 2), True), (False, "minmax", (5, 6), False)]
for dtype, rtol, atol in ((torch.float32, 1e-4, 1e-5), (torch.bfloat16, 2e-2, 2e-2), (torch.float16, 2e-3, 2e-3)):
    for shape in shapes if dtype == torch.float32 else shapes[:1]:
        for layout in ("nchw", "nhwc", "sliced") if dtype == torch.float32 else ("nhwc",):
            for option in options:
                relu, norm, size, renorm = option
                x = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3])[:, :, 1:].to(dtype)
                x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x.contiguous() if layout == "nchw" else x
                w, y, out = torch.randn(6, shape[1]).to(dtype), torch.randint(6, shape[:1]), []
                for kind in ("reference", "triton"):
                    f, v = x.clone().requires_grad_(), w.clone().requires_grad_()
                    if kind == "reference":
                        m = definition(f, v, y, relu, norm, False, size, renorm)
                    else:
                        m = ops.class_activation_map(f, v, y, relu=relu, norm=norm, size=size, renorm=renorm)
                    out.append([m, *torch.autograd.grad(m, [f, v], torch.linspace(-1, 2, m.numel()).view_as(m))])
                for ours, theirs in zip(out[1], out[0], strict=True):
                    say = lambda m: f"{dtype} {shape} {layout} {option}: {m}"
                    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=say)
f = torch.rand(3, 4, 3, 3)
f[1, 2, 2, 2], f[2] = float("nan"), -1.0
w = torch.ones(2, 4)
for norm in ("none", "minmax", "max"):
    m = ops.class_activation_map(f, w, torch.tensor([-5, 1, 9]), relu=True, norm=norm, size=(6, 6), renorm=True)  # labels are clamped
    assert m[1].isnan().any() and m[0].isfinite().all() and not m[2].any()
print("agree")
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastkd.ops.bn_match import triton as t

def job(kernel, element, architecture, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants: signature[name] = "constexpr"
        elif name in ("x_ptr", "r_ptr", "y_ptr", "gy_ptr", "dx_ptr", "dr_ptr"): signature[name] = "*" + element
        elif name in ("offsets_ptr", "calls_ptr"): signature[name] = "*i64"
        elif name.endswith("_ptr"): signature[name] = "*fp32"
        else: signature[name] = "fp32" if name in ("slope", "momentum", "first") else "i32"
    assert compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", architecture, 32)).asm["cubin"]

for architecture, element in ((80, "fp32"), (90, "bf16")):
    for act in (0, 2):
        flags = dict(ACT=act, HAS_Y=True, HAS_R=bool(act))
        job(t._bn_fwd_nchw_kernel, element, architecture, ROWS=2, COLS=1024, **flags)
        job(t._bn_fwd_nhwc_kernel, element, architecture, ROWS=32, COLS=64, **flags)
        residual = dict(HAS_R=bool(act), HAS_DR=bool(act), LAST=bool(act))
        job(t._bn_bwd_kernel, element, architecture, ACT=act, HAS_G=True, HAS_S=True, ROWS=32, COLS=64, **residual)
        blend = dict(KL=bool(act), BLEND=bool(act), CALLS=bool(act))
        job(t._bn_loss_fwd_kernel, element, architecture, ROWS=32, COLS=128, **blend)
        job(t._bn_loss_bwd_kernel, element, architecture, BLOCK=256, **blend)
    job(t._bn_fwd_nchw_kernel, element, architecture, ACT=0, HAS_Y=False, HAS_R=False, ROWS=2, COLS=1024, per=1)
    job(t._bn_finish_kernel, element, architecture, ROWS=32, COLS=32)
    job(t._bn_bwd_kernel, element, architecture, ACT=0, HAS_G=False, HAS_S=True, HAS_R=False, HAS_DR=False, LAST=True, ROWS=32, COLS=64)
print("compiled")
"""


COMPILE_CAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastkd.ops.cam import triton as t

def job(kernel, element, architecture, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants: signature[name] = "constexpr"
        elif name in ("x_ptr", "dx_ptr"): signature[name] = "*" + element
        elif name == "label_ptr": signature[name] = "*i64"
        elif name.endswith("_ptr"): signature[name] = "*fp32"
        else: signature[name] = "fp32" if name in ("down", "across", "eps") else "i32"
    assert compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", architecture, 32)).asm["cubin"]

tile = dict(CHANNELS=64, CELLS=64)
for architecture, element in ((80, "fp32"), (90, "bf16")):
    for norm, resize, renorm in ((0, False, False), (1, True, True), (2, True, False)):
        flags = dict(RELU=bool(norm), NORM=norm, RESIZE=resize, RENORM=renorm, LAST=resize, PIXELS=1024)
        job(t._cam_fwd_kernel, element, architecture, **flags, **tile)
    job(t._cam_adjoint_kernel, element, architecture, ROWS=16, COLS=64)
    for last in (False, True):
        job(t._cam_outer_kernel, element, architecture, LAST=last, **tile)
flags = dict(RELU=True, NORM=2, RESIZE=True, RENORM=True, LAST=True, PIXELS=1024, CHANNELS=1024, CELLS=1)
job(t._cam_fwd_kernel, "fp16", 80, cells=1, h=1, w=1, **flags)  # arguments that are 1 become constants
job(t._cam_adjoint_kernel, "fp16", 80, cells=1, h=1, w=1, ROWS=16, COLS=64)
job(t._cam_outer_kernel, "fp16", 80, cells=1, LAST=True, CHANNELS=1024, CELLS=1)
print("compiled")
"""


def _run(code: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.parametrize("code", [INTERPRET, LOSS, INTERPRET_CAM], ids=["bn_match", "bn_loss", "cam"])
def test_interpreted_kernels_agree_with_the_reference(code):
    assert "agree" in _run(code, TRITON_INTERPRET="1")


@pytest.mark.parametrize("code", [COMPILE, COMPILE_CAM], ids=["bn_match", "cam"])
def test_kernels_compile_for_gpus(tmp_path, code):
    pytest.importorskip("triton.backends.nvidia")
    assert "compiled" in _run(code, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
