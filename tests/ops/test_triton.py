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

BATCH_NORM = """
import torch
from fastkd import ops
ops.use("triton")
assert dict((r[0], r[2]) for r in ops.table())["batch_norm_act"] == "triton"
torch.manual_seed(0)
shapes = [(3, 5, 7, 7), (70, 3, 5, 17), (2, 127, 1, 1), (5, 6), (2, 65, 3, 2)]
for dtype, rtol, atol in ((torch.float32, 1e-4, 1e-4), (torch.bfloat16, 2e-2, 5e-2), (torch.float16, 3e-3, 2e-2)):
    for shape in shapes if dtype == torch.float32 else shapes[:1]:
        for layout in ("nchw", "nhwc", "sliced") if shape == (3, 5, 7, 7) else ("nchw", "nhwc") if len(shape) == 4 else ("nchw",):
            for act, affine in (("none", True), ("relu", False), ("relu6", True), ("leaky_relu", True)):
                x = torch.randn(shape) * 2 + 1
                if layout == "nhwc":
                    x = x.contiguous(memory_format=torch.channels_last)
                if layout == "sliced":
                    x = torch.randn(shape[0], shape[1], shape[2] + 1, shape[3])[:, :, 1:]
                x, c = x.to(dtype), shape[1]
                weight, bias = torch.randn(2, c)
                gy, out = torch.randn_like(x), []
                for name in ("reference", "triton"):
                    ops.use(name)
                    v = [t.clone().requires_grad_() for t in ((x, weight, bias) if affine else (x,))]
                    mean, var = torch.zeros(c), torch.ones(c)
                    y = ops.batch_norm_act(v[0], mean, var, *v[1:], act=act)
                    out.append([y, *torch.autograd.grad(y, v, gy), mean, var])
                for ours, theirs in zip(out[1], out[0], strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f"{dtype} {shape} {layout} {act}: {m}")
assert ops.batch_norm_act(torch.randn(0, 3, 2, 2)).shape == (0, 3, 2, 2)
print("agree")
"""

UPSAMPLE = """
import torch
from fastkd import ops
ops.use("triton")
torch.manual_seed(0)
for dtype, rtol, atol in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 2e-1), (torch.float16, 2e-3, 3e-2)):
    for shape in ((2, 3, 5, 7), (1, 1, 1, 1), (3, 3, 1, 1), (0, 2, 3, 3), (2, 17, 3, 33)):
        for memory in (torch.contiguous_format, torch.channels_last):
            for f, constants in ((ops.upsample_affine_tanh, 1), (ops.upsample_affine_sigmoid, 0), (ops.upsample_affine_sigmoid, 1)):
                x = (torch.randn(shape) * torch.randint(0, 2, shape).mul(3.9).add(0.1)).to(dtype).contiguous(memory_format=memory)
                given = torch.randn(2, shape[1]).unbind() if constants else ()
                gy, out = torch.randn(shape[0], shape[1], 2 * shape[2], 2 * shape[3]).to(dtype), []
                for name in ("reference", "triton"):
                    ops.use(name)
                    v = x.clone().requires_grad_()
                    y = f(v, *given)
                    out.append([y, torch.autograd.grad(y, v, gy)[0]])
                for ours, theirs in zip(out[1], out[0], strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m: f"{dtype} {shape} {memory}: {m}")
print("agree")
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastkd.ops.bn_act import triton as b
from fastkd.ops.bn_match import triton as t
from fastkd.ops.upsample import triton as u

def job(kernel, element, architecture, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants: signature[name] = "constexpr"
        elif name in ("x_ptr", "r_ptr", "y_ptr", "gy_ptr", "dx_ptr", "dr_ptr"): signature[name] = "*" + element
        elif name.endswith("_ptr"): signature[name] = "*fp32"
        else: signature[name] = "fp32" if name in ("slope", "count", "eps") else "i32"
    assert compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", architecture, 32)).asm["cubin"]

for architecture, element in ((80, "fp32"), (90, "bf16")):
    for act in (0, 2):
        flags = dict(ACT=act, HAS_Y=True, HAS_R=bool(act))
        job(t._bn_fwd_nchw_kernel, element, architecture, BLOCK=1024, **flags)
        job(t._bn_fwd_nhwc_kernel, element, architecture, ROWS=64, COLS=64, **flags)
        residual = dict(HAS_R=bool(act), HAS_DR=bool(act), LAST=bool(act))
        job(t._bn_bwd_kernel, element, architecture, ACT=act, HAS_G=True, HAS_S=True, BLOCK=1024, **residual)
    job(t._bn_fwd_nchw_kernel, element, architecture, ACT=0, HAS_Y=False, HAS_R=False, BLOCK=1024, per=1)
    job(t._bn_bwd_kernel, element, architecture, ACT=0, HAS_G=False, HAS_S=True, HAS_R=False, HAS_DR=False, LAST=True, BLOCK=1024, hw=1)
    for act in (0, 3):
        flags = dict(ACT=act, HAS_B=bool(act))
        job(b._stats_kernel, element, architecture, HAS_W=bool(act), BLOCK=128)
        job(b._fwd_kernel, element, architecture, LAST=bool(act), BLOCK=1024, **flags)
        job(b._bwd_kernel, element, architecture, LAST=bool(act), BLOCK=1024, **flags)
        job(b._bwd_sums_nchw_kernel, element, architecture, BLOCK=1024, **flags)
        job(b._bwd_sums_nhwc_kernel, element, architecture, ROWS=64, COLS=64, **flags)
        flags = dict(TANH=bool(act), HAS_S=bool(act), LAST=not act, BLOCK=1024)
        job(u._fwd_kernel, element, architecture, HAS_B=not act, **flags)
        job(u._bwd_kernel, element, architecture, **flags)
print("compiled")
"""


def _run(code: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.parametrize("code", [INTERPRET, BATCH_NORM, UPSAMPLE], ids=["bn_match", "bn_act", "upsample"])
def test_interpreted_kernels_agree_with_the_reference(code):
    assert "agree" in _run(code, TRITON_INTERPRET="1")


def test_kernels_compile_for_gpus(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    assert "compiled" in _run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
