"""Doubled tanh and sigmoid, interpreted."""

import torch

from fastkd import ops

ops.use("triton")
torch.manual_seed(0)
for dtype, rtol, atol in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 2e-2, 2e-1), (torch.float16, 2e-3, 3e-2)):
    for shape in ((2, 3, 5, 7), (1, 1, 1, 1), (3, 3, 1, 1), (0, 2, 3, 3), (2, 17, 3, 33), (2, 3, 33, 40)):
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
