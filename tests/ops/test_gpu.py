"""What only a GPU can show of the ops: no host synchronisation, CUDA graphs, devices and streams that are not the current ones."""

from __future__ import annotations

import pytest
import torch

from fastkd import ops
from fastkd.ops import _registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")]


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    if reason := _registry.absent(request.param):
        pytest.skip(f"{request.param}: {reason}")
    ops.use(request.param)
    yield
    ops.use("auto")


def _step(x, scale, bias, shift, target, images, index, flip):
    y, sums = ops.frozen_bn_act_stats(x, scale, bias, shift, act="relu")
    stats = ops.moments(sums, x.numel() // x.shape[1], shift)
    loss = ops.bn_match_loss(stats, target, (0, x.shape[1]), first=2.0) + y.sum() + ops.bn_sums(x, shift).sum()
    batch = ops.replay_gather(images, index, dy=index, dx=index, flip=flip, pad=2, mean=target[0, :3], std=target[1, :3] + 1)
    cam = ops.class_activation_map(x, scale[None].expand(5, -1), index, relu=True, norm="minmax", size=(9, 9), renorm=True)
    means, variances = scale.new_zeros(16), scale.new_ones(16)
    normed = ops.batch_norm_act(x, means, variances, scale, bias, act="leaky_relu", slope=0.2)
    normed = ops.upsample_affine_tanh(ops.upsample_conv2d(normed, x[:, :, :3, :3]), scale[:4], bias[:4])
    loss = loss + normed.square().sum() + means.sum() + ops.upsample_affine_sigmoid(x).square().sum()
    (dx,) = torch.autograd.grad(loss + cam.sum(), x)
    leaves = images.view(-1).float()
    tree, key, row = ops.replay_sums(leaves), torch.stack((index[0], index[1])), index * 100
    refused = ops.replay_update(leaves, tree, torch.cat((row, row)), torch.cat((scale, bias))[:8].abs(), duplicates="mean")
    drawn, probability, least = ops.replay_sample(leaves, tree, key=key, n=64)
    resized = ops.replay_gather(images, index, flip=flip, size=(5, 17), memory_format=torch.contiguous_format)
    return loss.detach(), dx, batch, resized, refused, drawn, probability, least, leaves, tree[:, -1]


def _arguments(device="cuda"):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 7, 7, generator=gen).to(device).requires_grad_()
    vectors = [torch.randn(16, generator=gen).to(device) for _ in range(3)]
    images = torch.randint(0, 256, (5, 8, 9, 3), generator=gen, dtype=torch.uint8).to(device)
    index, flip = torch.tensor([4, 0, 1, 3]).to(device), (torch.arange(4) > 1).to(device)
    return x, *vectors, torch.rand(2, 16, generator=gen).to(device), images, index, flip


def test_no_host_synchronisation(kernels):
    arguments = _arguments()
    _step(*arguments)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(kernels):
    arguments = _arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _step(*arguments)
    with torch.no_grad():
        arguments[0].mul_(0.5).add_(0.1)
        arguments[6].copy_(torch.tensor([1, 1, 0, 2]))
    graph.replay()
    for replayed, eager in zip(out, _step(*arguments), strict=True):
        torch.testing.assert_close(replayed, eager)


def test_another_stream(kernels):
    arguments = _arguments()
    expected = _step(*arguments)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = _step(*arguments)
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_on_a_device_that_is_not_current(kernels):
    for a, b in zip(_step(*_arguments("cuda:1")), _step(*_arguments("cuda:0")), strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_rows_outside_the_store_are_clamped(kernels):
    images = torch.arange(3, dtype=torch.uint8, device="cuda").view(3, 1, 1, 1) * 50
    if _registry.absent("cuda"):
        pytest.skip("the reference asserts on the device")
    got = ops.replay_gather(images, torch.tensor([-5, 9], device="cuda"), dtype=torch.float32)
    torch.testing.assert_close(got.flatten() * 255, torch.tensor([0.0, 100.0], device="cuda"))


def test_large_tensor(kernels):
    """More than 2^31 elements, both layouts."""
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.ones((2**7, 2**6, 2**9, 2**9 + 1), dtype=torch.bfloat16, device="cuda").contiguous(memory_format=memory)
        x[-1, -1, -1, -1] = 3
        x.requires_grad_()
        one = torch.ones(2**6, device="cuda")
        sums = ops.bn_sums(x, one)
        assert sums[:, :-1].abs().sum() == 0 and sums[:, -1].tolist() == [2, 4]
        (dx,) = torch.autograd.grad(sums[1].sum(), x)
        assert dx[-1, -1, -1, -1] == 4 and dx[:1].abs().sum() == 0
        del dx
        y = ops.batch_norm_act(x.detach(), eps=1e-3, act="relu")
        assert y[-1, -1, -1, -1] > 50 and y[:1].abs().sum() == 0
        del x, y
        torch.cuda.empty_cache()


def test_large_maps(kernels):
    """The same of class activation maps: the last image lies beyond 2^31 elements."""
    for memory in (torch.contiguous_format, torch.channels_last):
        x = torch.ones((2**13 + 1, 2**12, 8, 8), dtype=torch.bfloat16, device="cuda").contiguous(memory_format=memory)
        x[-1, -1, -1, -1] = 3
        x.requires_grad_()
        m = ops.class_activation_map(x, torch.ones(1, 2**12, device="cuda"), torch.zeros(len(x), dtype=torch.int64, device="cuda"))
        assert (m[:-1] == 2**12).all() and m[-1, -1, -1] == 2**12 + 2
        (dx,) = torch.autograd.grad(m[-1, -1, -1], x)
        assert dx[-1, :, -1, -1].eq(1).all() and dx[:1].abs().sum() == 0
        del x, dx
        torch.cuda.empty_cache()
