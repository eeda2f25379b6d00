"""The loss of all BN layers, interpreted: both kinds, with and without the average."""

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
