"""Prioritised sampling and the gather, interpreted: the same random bits, rows and sums as the definition."""

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
