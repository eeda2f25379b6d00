"""The BN-statistic kernels, interpreted: every activation, layout, dtype, with and without residual."""

import torch

from fastkd import ops

ops.use("triton")
assert {r[0]: r[2] for r in ops.table()}["bn_sums"] == "triton"
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
