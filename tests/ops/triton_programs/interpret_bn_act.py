"""BatchNorm with batch statistics and its activation, interpreted."""

import torch

from fastkd import ops

ops.use("triton")
assert {r[0]: r[2] for r in ops.table()}["batch_norm_act"] == "triton"
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
