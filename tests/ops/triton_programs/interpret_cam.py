"""The class activation map kernels, interpreted."""
# Every branch: both layouts, relu, the three norms, with and without resize and renorm, maps of more than one block of cells (the last
# shape) and images of more than one block of pixels, windows of more than one tile in the adjoint (64 columns from 3), both rows.

import torch

from fastkd import ops
from fastkd.ops.cam.reference import class_activation_map_ref as definition

ops.use("triton")
assert {r[0]: r[2] for r in ops.table()}["class_activation_map"] == "triton"
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
f, w, y = torch.randn(2, 0, 3, 3), torch.ones(2, 0), torch.zeros(2, dtype=torch.int64)
out, slope = torch.ops.fastkd.class_activation_map_fwd(f, w, y, True, "max", [5, 6], True)
assert out.shape == (2, 5, 6) and slope.shape == (2, 3, 3) and not out.any() and not slope.any()  # no channels
print("agree")
