"""replay_gather against a pixel loop, for every store, result type and border."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd import ops


def _pixels(images, index, dy, dx, flip, pad, mean, std, dtype):
    """Pixel by pixel, as the docstring says."""
    height, width, channels = images.shape[1:]
    wide = torch.promote_types(dtype, torch.float32)
    out = torch.zeros(len(index), channels, height, width, dtype=wide)
    for b, row in enumerate(index.tolist()):
        for i in range(height):
            for j in range(width):
                y = i + (int(dy[b]) - pad if dy is not None else 0)
                x = (width - 1 - j if flip is not None and flip[b] else j) + (int(dx[b]) - pad if dx is not None else 0)
                if 0 <= y < height and 0 <= x < width:
                    v = images[row, y, x].to(wide)
                    out[b, :, i, j] = v / 255 if images.dtype == torch.uint8 else v
    if mean is not None or std is not None:
        m = torch.zeros(channels, dtype=wide) if mean is None else mean.to(wide)
        s = torch.ones(channels, dtype=wide) if std is None else std.to(wide)
        out = (out - m.view(-1, 1, 1)) / s.view(-1, 1, 1)
    return out.to(dtype)


def _store(dtype, n=5, h=4, w=7, c=3):
    gen = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (n, h, w, c), dtype=torch.uint8, generator=gen)
    return torch.randn((n, h, w, c), generator=gen).to(dtype)


@pytest.mark.parametrize("out", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("store", [torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_replay_gather(backend, device, store, out, channels):
    images = _store(store, c=channels)
    index = torch.tensor([4, 0, 0, 2, 1, 3, 3, 2, 1])
    pad = 2
    dy = torch.tensor([2, 0, 4, 1, 3, 2, 0, 4, 0])  # every border, the middle, the corners
    dx = torch.tensor([2, 4, 0, 3, 1, 0, 2, 4, 0])
    flip = torch.tensor([False, True, False, True, True, False, False, True, True])
    mean, std = torch.linspace(0.1, 0.6, channels), torch.linspace(0.2, 0.9, channels)
    everything = {"dy": dy, "dx": dx, "flip": flip, "pad": pad, "mean": mean, "std": std}
    for given in ({}, {"dy": dy, "dx": dx, "pad": pad}, {"flip": flip}, everything, {"std": std}):
        there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        got = ops.replay_gather(images.to(device), index.to(device), dtype=out, **there).cpu()
        options = {"dy": None, "dx": None, "flip": None, "pad": 0, "mean": None, "std": None, **given}
        expected = _pixels(images, index, dtype=out, **options)
        assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == out
        if device == "cpu":
            assert torch.equal(got, expected), "other bits than the definition"
        else:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("mode", "size"), [("nearest", (4, 7)), ("nearest", (9, 3)), ("bilinear", (4, 7)), ("bilinear", (1, 15)), ("bilinear", (8, 5))]
)
@pytest.mark.parametrize("store", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_resize_is_interpolate_of_the_cropped_image(backend, device, store, mode, size, memory):
    images, index = _store(store).to(device), torch.tensor([4, 0, 2], device=device)
    off, flip = torch.tensor([0, 3, 4], device=device), torch.tensor([True, False, True], device=device)
    crop = {"dy": off, "dx": off.flip(0), "flip": flip, "pad": 2}
    mean, std = torch.linspace(0.1, 0.6, 3, device=device), torch.linspace(0.2, 0.9, 3, device=device)
    for out in (torch.float32, torch.float64, torch.bfloat16):
        plain = ops.replay_gather(images, index, dtype=torch.promote_types(out, torch.float32), **crop)
        resized = F.interpolate(plain, size, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))
        expected = ((resized - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).to(out)
        options = {**crop, "mean": mean, "std": std, "size": size, "mode": mode, "memory_format": memory, "dtype": out}
        got = ops.replay_gather(images, index, **options)
        assert got.is_contiguous(memory_format=memory) and got.dtype == out
        torch.testing.assert_close(got, expected)
        if device == "cpu":
            ops.use("reference")
            assert torch.equal(got, ops.replay_gather(images, index, **options)), "other bits than the definition"
            ops.use(backend)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("store", [torch.uint8, torch.float32], ids=str)
def test_layouts_hold_the_same_values(backend, device, store, channels):
    images, index = _store(store, c=channels).to(device), torch.tensor([3, 1], device=device)
    last = ops.replay_gather(images, index, dy=index, flip=index > 1, pad=2)
    first = ops.replay_gather(images, index, dy=index, flip=index > 1, pad=2, memory_format=torch.contiguous_format)
    assert torch.equal(first, last) and first.is_contiguous() and last.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("width", [1, 2, 33])
def test_crop_larger_than_the_image(backend, device, width):
    """A shift beyond the image leaves only black, normalised."""
    images = _store(torch.uint8, h=2, w=width)
    pad = 40
    extreme = torch.tensor([0, 80, 40, 0])
    flip, mean = torch.tensor([True, False, True, False]), torch.full((3,), 0.5)
    options = {"dy": extreme.flip(0), "dx": extreme, "flip": flip, "pad": pad, "mean": mean}
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got = ops.replay_gather(images.to(device), torch.arange(4, device=device), dtype=torch.float32, **there)
    torch.testing.assert_close(got.cpu(), _pixels(images, torch.arange(4), std=None, dtype=torch.float32, **options))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("width", [8, 12, 33, 64, 700])  # whole vectors of 16 and 8 bytes, none, and more than a block of threads
def test_long_rows(backend, device, channels, width):
    gen = torch.Generator().manual_seed(width + channels)
    images = _store(torch.uint8, n=9, h=5, w=width, c=channels)[1::2]
    index, pad = torch.tensor([3, 0, 0, 2, 1]), 11
    draws = {k: torch.randint(2 * pad + 1, (5,), generator=gen) for k in ("dy", "dx")}
    draws |= {"dy": draws["dy"] // 6 + 9, "flip": torch.tensor([True, False, True, False, True])}
    half = torch.full((channels,), 0.5)  # with both a half, multiplying by reciprocals makes other bits than dividing
    scale = {"mean": half, "std": half} if width % 8 else {"mean": torch.rand(channels, generator=gen)}
    given = {k: v.to(device) for k, v in {**draws, **scale}.items()} | {"pad": pad}
    for out in (torch.float32, torch.float64, torch.bfloat16):
        for size in (None, (3, width), (9, 1032)):
            for memory in (torch.channels_last, torch.contiguous_format):
                options = {"size": size, "mode": "nearest", "memory_format": memory, "dtype": out, **given}
                got = ops.replay_gather(images.to(device), index.to(device), **options)
                ops.use("reference")
                expected = ops.replay_gather(images.to(device), index.to(device), **options)
                ops.use(backend)
                assert torch.equal(got, expected), f"{out} {size} {memory}"


def test_more_rows_than_a_gpu_takes_at_once(backend, device):
    images, index = _store(torch.uint8, h=11, w=8, c=1).to(device), torch.arange(17_000, device=device) % 5
    got = ops.replay_gather(images, index, flip=index == 2, dtype=torch.bfloat16)
    once = ops.replay_gather(images, index[:5], flip=index[:5] == 2, dtype=torch.bfloat16)
    assert torch.equal(got, once[index])


def test_every_byte_is_exact(cpp):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    got = ops.replay_gather(images, torch.zeros(1, dtype=torch.int64), dtype=torch.float32)
    assert torch.equal(got.flatten(), torch.arange(256, dtype=torch.float32) / 255)


def test_default_dtype(backend, device, fp64):
    images = _store(torch.uint8).to(device)
    assert ops.replay_gather(images, torch.zeros(2, dtype=torch.int64, device=device)).dtype == torch.float64


def test_special_halves(cpp):
    """Subnormals, infinities, NaN, the largest and the rounding edges of fp16 survive store and result."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    images = bits.view(torch.float16).view(1, 256, 256, 1)
    for out in (torch.float32, torch.float16, torch.bfloat16):
        got = ops.replay_gather(images, torch.zeros(1, dtype=torch.int64), dtype=out).flatten()
        torch.testing.assert_close(got, images.flatten().to(out), rtol=0, atol=0, equal_nan=True)
    edges = torch.tensor([65519.0, 65520.0, 6e-8, 2.9802e-8, 2.98e-8, -65519.99, 1 + 2**-11, 1 + 3 * 2**-11, 6.1e-5, 1e-3]).view(1, 2, 5, 1)
    got = ops.replay_gather(edges, torch.zeros(1, dtype=torch.int64), dtype=torch.float16).flatten()
    assert torch.equal(got, edges.flatten().half())


def test_threads_and_instruction_sets_do_not_matter(cpp):
    from fastkd import _C

    images, index = _store(torch.uint8, n=64, h=32, w=32), torch.randint(0, 64, (256,))
    threads, seen = torch.get_num_threads(), []
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            for count in (1, 3):
                torch.set_num_threads(count)
                plain = ops.replay_gather(images, index, dtype=torch.float32)
                seen.append((plain, ops.replay_gather(images, index, size=(20, 47), mean=torch.rand(3).fill_(0.3), dtype=torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(_C.isas()[-1])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_empty(backend, device):
    images = _store(torch.uint8).to(device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert ops.replay_gather(images, none).shape == (0, 3, 4, 7)
    assert ops.replay_gather(images[:0], none).shape == (0, 3, 4, 7)


def test_sliced_store_and_columns(backend, device):
    images = _store(torch.uint8, n=8).to(device)
    index = torch.arange(8, device=device)[::2]
    got = ops.replay_gather(images[1::2], index.div(2, rounding_mode="floor"), dtype=torch.float32)
    torch.testing.assert_close(got, ops.replay_gather(images, torch.tensor([1, 3, 5, 7], device=device), dtype=torch.float32))


def test_refused(backend, device):
    images, index = _store(torch.uint8).to(device), torch.zeros(2, dtype=torch.int64, device=device)
    if device == "cpu":
        for bad in (5, -6):
            with pytest.raises(IndexError):
                ops.replay_gather(images, torch.tensor([0, bad]))
    for change, message in (
        ({"images": images.int()}, "images"), ({"images": images[0]}, "images"), ({"index": index.int()}, "index"),
        ({"dy": index.int()}, "dy"), ({"flip": index}, "flip"), ({"mean": torch.ones(2, device=device)}, "mean"), ({"pad": -1}, "pad"),
        ({"dtype": torch.int32}, "dtype"), ({"images": images.float().requires_grad_()}, "gradient"),
        ({"images": images[:, :, ::2]}, "must be contiguous"), ({"size": (0, 3)}, "size"), ({"size": (3,)}, "size"),
        ({"size": (3, 3), "mode": "bicubic"}, "expected one of bilinear, nearest"),
        ({"memory_format": torch.preserve_format}, "memory_format"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.replay_gather(**{"images": images, "index": index, **change})


def test_opcheck(cpp):
    images, index = _store(torch.uint8), torch.tensor([1, 0, 4])
    off, flip, mean = torch.tensor([0, 1, 4]), torch.tensor([True, False, True]), torch.rand(3)
    ops.replay_gather(images, index)  # the first use registers the op
    for size, mode, last in ((None, "bilinear", True), ([5, 3], "bilinear", False), ([5, 3], "nearest", True)):
        arguments = (images, index, off, off, flip, 2, mean, mean, size, mode, last, torch.float32)
        torch.library.opcheck(torch.ops.fastkd.replay_gather.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(backend, device, dynamic):
    images, mean = _store(torch.uint8).to(device), torch.rand(3, device=device)

    def call(i, flip):
        options = {"dy": i % 5, "dx": i % 3, "flip": flip, "pad": 2, "mean": mean, "std": mean, "dtype": torch.float32}
        small = ops.replay_gather(images, i, size=(3, 5), memory_format=torch.contiguous_format, **options)
        return ops.replay_gather(images, i, **options) * 2, small

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in ([1, 0, 4], [2, 2, 3, 1, 0]):
        index = torch.tensor(rows, device=device)
        for a, b in zip(compiled(index, index > 1), call(index, index > 1), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


def test_a_gradient_is_refused(cpp):
    images, index, mean = _store(torch.uint8), torch.tensor([1]), torch.rand(3, requires_grad=True)
    with pytest.raises(ValueError, match="computes no gradient"):
        ops.replay_gather(images, index, mean=mean).sum().backward()
    with torch.no_grad():
        assert ops.replay_gather(images, index, mean=mean).shape == (1, 3, 4, 7)
    with torch.inference_mode():
        assert ops.replay_gather(images, index, mean=mean).shape == (1, 3, 4, 7)


@pytest.mark.large
def test_more_than_2_31_elements(cpp):
    images = torch.zeros((2, 2**15, 2**15 + 1, 1), dtype=torch.uint8)
    images[1, -1, -1] = 255
    got = ops.replay_gather(images, torch.tensor([0, 1]), dtype=torch.bfloat16)
    assert got[1, 0, -1, -1] == 1 and got[0].sum() == 0
