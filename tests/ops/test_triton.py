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

REPLAY = """
import itertools
import torch
from fastkd import ops
gen = torch.Generator().manual_seed(0)

def both(make):
    out = []
    for name in ("reference", "triton"):
        ops.use(name)
        out.append(make())
    return zip(*out, strict=True)

assert all(r[3]["triton"] == "ok" for r in ops.table() if r[0].startswith(("replay", "philox")))
key = torch.tensor([-5, 2**40 + 3])
for a, b in both(lambda: [ops.philox_uniform(key, n) for n in (0, 1, 1500)]):
    assert torch.equal(a, b), "other random bits than the definition"
u = torch.cat((torch.rand(40, generator=gen, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)))
for n, dtype, exact in itertools.product((1, 65, 1000, 1025, 5000), (torch.float32, torch.float64), (True, False)):
    q = (torch.randint(0, 4, (n,), generator=gen) if exact else torch.rand(n, generator=gen)).to(dtype)
    q[n // 2] = 1
    index, value = torch.randint(0, n, (30,), generator=gen), torch.randint(0, 9, (30,), generator=gen).to(dtype)
    def everything():
        leaves = q.clone()
        sums = ops.replay_sums(leaves)
        out = [sums.clone(), *ops.replay_sample(leaves, sums, u=u), *ops.replay_sample(leaves, sums, key=key, n=7)]
        out += [ops.replay_sample(leaves, sums, u=u[:0])[2]]
        for how in ("last", "max", "mean"):
            ops.replay_update(leaves, sums, index, value, duplicates=how)
            ops.replay_update(leaves, sums, index[:0], value[:0], duplicates=how)
            out += [leaves.clone(), sums.clone()]
        return out
    for a, b in both(everything):
        rtol = 0 if not a.is_floating_point() else 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(a, b, rtol=rtol, atol=0)
index = torch.tensor([4, 0, 0, 2, 1])
draws = {"dy": torch.tensor([0, 2, 4, 1, 3]), "dx": torch.tensor([4, 1, 0, 2, 3]), "flip": torch.arange(5) % 2 == 0, "pad": 2,
         "mean": torch.rand(3, generator=gen), "std": torch.rand(3, generator=gen) + 0.2}
for store, out, options in itertools.product(
    (torch.uint8, torch.float32, torch.float16), (torch.float32, torch.float64, torch.float16), ({}, {"dy": draws["dy"], "pad": 2}, draws)
):
    pixels = torch.rand(5, 4, 7, 3, generator=gen) * (255 if store == torch.uint8 else 1)
    images = pixels.to(store)
    for (size, mode), memory in itertools.product(
        ((None, "bilinear"), ((3, 9), "bilinear"), ((19, 21), "nearest")), (torch.channels_last, torch.contiguous_format)
    ):
        more = {"size": size, "mode": mode, "memory_format": memory, "dtype": out}
        for a, b in both(lambda: [ops.replay_gather(images, index, **options, **more)]):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, msg=lambda m: f"{store} {out} {options.keys()} {size} {mode} {memory}: {m}")
for a, b in both(lambda: [ops.replay_gather(images[1::2], index[:0]), ops.replay_gather(images[1::2], torch.tensor([1, 0]))]):
    assert torch.equal(a, b)
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
        elif name.endswith("_ptr"): signature[name] = "*fp32"
        else: signature[name] = "fp32" if name == "slope" else "i32"
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

def other(kernel, architecture, types, **constants):
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    assert compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", architecture, 32)).asm["cubin"]

import triton.language as tl
from fastkd.ops.replay import triton as gather
from fastkd.ops.replay_tree import triton as tree
widths = dict(PIECES=16, WIDTH=64)
long = dict.fromkeys(("key_ptr", "index_ptr", "refused_ptr", "dy_ptr", "dx_ptr", "y_ptr", "x_ptr"), "*i64")
for architecture, leaf, store, wide, out in ((80, "*fp32", "*u8", "fp32", "*bf16"), (90, "*fp64", "*fp16", "fp64", "*fp64")):
    leaves = dict.fromkeys(("leaves_ptr", "value_ptr", "probability_ptr", "least_ptr"), leaf)
    types = {**long, **leaves, "sums_ptr": "*fp64", "u_ptr": "*fp64"}
    other(tree._uniform_kernel, architecture, {**types, "out_ptr": "*fp64"}, BLOCK_N=1024)
    other(tree._ends_kernel, architecture, types, PIECES=16, BLOCK_N=1024)
    for flag in (True, False):
        other(tree._block_kernel, architecture, types, HAS_INDEX=flag, **widths)
        other(tree._sample_kernel, architecture, types, HAS_U=flag, DRAWS=4, **widths)
    for how in range(3):
        other(tree._settle_kernel, architecture, types, HOW=how, ROWS=16, BLOCK_N=128)
    for resized, blended in ((False, False), (True, False), (True, True)):
        lut = ("*fp32" if blended else out) if store == "*u8" else "*i64"
        floats = dict.fromkeys(("mean_ptr", "std_ptr", "wy_ptr", "wx_ptr"), "*" + wide)
        types = {**long, **floats, "images_ptr": store, "flip_ptr": "*u8", "lut_ptr": lut, "out_ptr": out}
        other(gather._gather_kernel, architecture, types, HAS_DY=resized, HAS_DX=resized, HAS_FLIP=resized, RESIZED=resized,
              BLENDED=blended, BYTES=store == "*u8", LAST=blended, WIDE=getattr(tl, "float" + wide[2:]), BLOCK=1024)
print("compiled")
"""


def _run(code: str, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}"
    return result.stdout


def test_interpreted_kernels_agree_with_the_reference():
    assert "agree" in _run(INTERPRET, TRITON_INTERPRET="1")


def test_interpreted_replay_kernels_agree_with_the_reference():
    assert "agree" in _run(REPLAY, TRITON_INTERPRET="1")


def test_kernels_compile_for_gpus(tmp_path):
    pytest.importorskip("triton.backends.nvidia")
    assert "compiled" in _run(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
