"""Each loss against an independent calculation in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastkd import losses

pytestmark = pytest.mark.usefixtures("fp64")


def softmax(x, tau=1.0):
    e = np.exp(x / tau - (x / tau).max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def logits(fp64):
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 5)) * 3, rng.normal(size=(6, 5)) * 3


@pytest.mark.parametrize("tau", [1.0, 4.0, 20.0])
def test_kl_tau(logits, tau):
    t, s = logits
    p, q = softmax(t, tau), softmax(s, tau)
    expected = tau**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert losses.kl_tau(torch.tensor(t), torch.tensor(s), tau).item() == pytest.approx(expected, rel=1e-12)


def test_kl_gradient_is_that_of_the_card(logits):
    t, s = (torch.tensor(x) for x in logits)
    s.requires_grad_()
    (g,) = torch.autograd.grad(losses.kl_tau(t, s, 20.0), s)
    expected = 20 * (torch.softmax(s / 20, 1) - torch.softmax(t / 20, 1)) / len(s)
    torch.testing.assert_close(g, expected.detach())


def test_kl_is_zero_only_where_logits_differ_by_a_constant_per_row(logits):
    t = torch.tensor(logits[0])
    assert losses.kl_tau(t, t + torch.arange(6.0)[:, None], 3.0).abs() < 1e-12
    assert losses.kl_tau(t, t * 1.1, 3.0) > 1e-4
    order = torch.randperm(6)
    s = torch.tensor(logits[1])
    torch.testing.assert_close(losses.kl_tau(t[order], s[order], 3.0), losses.kl_tau(t, s, 3.0))


def test_adv_masked_kl(logits):
    t, s = logits
    s[:3] = t[:3] + np.array([0.3, -0.2, 0.1, 0.0, 0.05]) * (t[:3].argmax(1) == t[:3].argmax(1))[:, None]
    mask = t.argmax(1) == s.argmax(1)
    assert 0 < mask.sum() < 6
    p, q = softmax(t), softmax(s)
    expected = -(mask * (p * (np.log(p) - np.log(q))).sum(1)).sum() / 6  # the whole batch, not the mask's count
    got = losses.adv_masked_kl(torch.tensor(t), torch.tensor(s))
    assert got.item() == pytest.approx(expected, rel=1e-12) and got < 0


def test_adv_masked_kl_is_zero_with_zero_gradient_where_no_row_agrees():
    t, s = torch.eye(4).requires_grad_(), torch.eye(4).roll(1, 0).requires_grad_()
    value = losses.adv_masked_kl(t, s)
    assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, [t, s]))


def test_adv_gradient_reaches_both_networks(logits):
    t, s = torch.tensor(logits[0], requires_grad=True), torch.tensor(logits[0] * 0.5, requires_grad=True)
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(losses.adv_masked_kl(t, s), [t, s]))


def test_l1_and_cross_entropy(logits):
    t, s = logits
    assert losses.l1_logit(torch.tensor(t), torch.tensor(s)).item() == pytest.approx(np.abs(t - s).mean())
    y = np.array([0, 1, 2, 3, 4, 0])
    expected = -np.log(softmax(t)[np.arange(6), y]).mean()
    assert losses.cross_entropy(torch.tensor(t), torch.tensor(y)).item() == pytest.approx(expected)


@pytest.mark.parametrize("h,w", [(3, 3), (4, 4), (5, 7), (2, 2)])
def test_gaussian_mask(h, w):
    mask = losses.gaussian_mask(h, w, h / 4, like=torch.zeros(()))
    i, j = np.mgrid[:h, :w]
    expected = np.exp(-((i - (h - 1) / 2) ** 2 + (j - (w - 1) / 2) ** 2) / (2 * (h / 4) ** 2))
    np.testing.assert_allclose(mask.numpy(), expected)
    assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.flip(1))
    assert mask.max() == 1 or h % 2 == 0 or w % 2 == 0
    assert losses.cam_to_mask(mask.expand(3, h, w), mask) == 0


def test_hinge_is_zero_with_zero_gradient_inside_its_radius():
    projected, target = torch.full((4, 8), 0.1, requires_grad=True), torch.zeros(4, 8)
    distance = losses.embedding_distance(projected, target)  # 0.01 each
    inside = losses.hinge_batch(distance, 0.015)
    assert inside == 0 and (torch.autograd.grad(inside, projected, retain_graph=True)[0] == 0).all()
    assert losses.hinge_batch(distance, 0.0).item() == pytest.approx(0.01)
    assert losses.hinge_batch(distance, 0.004).item() == pytest.approx(0.006)
    # The mean is taken before the hinge: rows inside pay for rows outside.
    assert losses.hinge_batch(torch.tensor([0.0, 0.02]), 0.015) == 0


def test_adv_embedding():
    m, mask = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 1.0])
    assert losses.adv_embedding(m, mask, None).item() == pytest.approx(-5 / 3)
    assert losses.adv_embedding(m, None, None).item() == pytest.approx(-7 / 3)
    assert losses.adv_embedding(m, None, 1.5).item() == pytest.approx(-4 / 3)
    assert losses.adv_embedding(m, torch.zeros(3), None) == 0


@pytest.fixture
def images(fp64):
    return np.random.default_rng(1).normal(size=(3, 2, 5, 6))


def directions(x):
    """Horizontal, vertical and diagonal differences by loops over pixels."""
    n, c, h, w = x.shape
    out = []
    for di, dj in ((0, 1), (1, 0), (1, 1), (1, -1)):
        pairs = [(i, j, i + di, j + dj) for i in range(h) for j in range(w) if i + di < h and 0 <= j + dj < w]
        out.append(np.stack([x[:, :, a, b] - x[:, :, i, j] for i, j, a, b in pairs], -1))
    return out


def test_total_variation(images):
    x = torch.tensor(images)
    assert losses.tv1(x).item() == pytest.approx(sum(np.abs(d).mean() for d in directions(images)))
    assert losses.tv2(x).item() == pytest.approx(sum(np.sqrt((d**2).sum()) for d in directions(images)))
    for loss in (losses.tv1, losses.tv2):
        torch.testing.assert_close(loss(x.flip(3)), loss(x))
        torch.testing.assert_close(loss(x.flip(2)), loss(x))
        flat = torch.full((2, 1, 4, 4), 0.3, requires_grad=True)
        value = loss(flat)
        assert value == 0 and (torch.autograd.grad(value, flat)[0] == 0).all()


def test_norms_of_images(images):
    x = torch.tensor(images, requires_grad=True)
    assert losses.l2_batch(x).item() == pytest.approx(np.sqrt((images**2).sum()))
    assert losses.l2_image(x).item() == pytest.approx(np.sqrt((images**2).sum((1, 2, 3))).mean())
    (g,) = torch.autograd.grad(losses.l2_batch(x), x)
    np.testing.assert_allclose(g.numpy(), images / np.sqrt((images**2).sum()))
    zero = torch.zeros(2, 3, requires_grad=True)
    assert all((torch.autograd.grad(f(zero), zero)[0] == 0).all() for f in (losses.l2_batch, losses.l2_image))


def test_jensen_shannon_as_coded_and_as_in_the_textbook(logits):
    t, s = logits[0] * 3, logits[1] * 3
    p, q = softmax(t, 3.0), softmax(s, 3.0)
    m = (p + q) / 2
    textbook = 0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(1).mean()
    cp, cq, cm = (v.clip(0.01, 0.99) for v in (p, q, m))
    coded = 0.5 * (cm * np.log(cm / cp) + cm * np.log(cm / cq)).sum(1).mean()
    a, b = torch.tensor(t), torch.tensor(s)
    assert (p < 0.01).any() and abs(coded - textbook) > 1e-3
    assert losses.jsd(a, b).item() == pytest.approx(coded) and losses.jsd(b, a).item() == pytest.approx(coded)
    assert losses.jsd(a, b, form="textbook").item() == pytest.approx(textbook)
    assert losses.jsd(a, a).abs() < 1e-12 and losses.jsd(a, a, form="textbook").abs() < 1e-12
    assert losses.jsd(a / 9, b / 9) > 1e-3
    assert losses.adv_compete(a, b).item() == pytest.approx(1 - min(coded, 1))
    far = torch.eye(5).roll(1, 0) * 90
    assert losses.adv_compete(torch.eye(5) * 90, far) == 0 and losses.jsd(torch.eye(5) * 90, far) > 1  # clipped


def test_coded_jensen_shannon_has_no_gradient_to_a_class_that_is_clamped_everywhere():
    p, q = torch.tensor([[0.6, 0.395, 0.005]]), torch.tensor([[0.3, 0.694, 0.006]])
    q.requires_grad_()

    def coded(q):  # the same sum on probabilities
        m = ((p + q) / 2).clamp(0.01, 0.99)
        return 0.5 * (m * (2 * m.log() - p.clamp(0.01, 0.99).log() - q.clamp(0.01, 0.99).log())).sum()

    assert losses.jsd(3 * p.log(), 3 * q.detach().log()).item() == pytest.approx(coded(q).item())
    (g,) = torch.autograd.grad(coded(q), q)
    assert g[0, 2] == 0 and (g[0, :2] != 0).all()
    moved = q.detach() + torch.tensor([[0.0, 0.0, 0.002]])
    assert coded(moved).item() == pytest.approx(coded(q).item())


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_contrast():
    rng = np.random.default_rng(2)
    local, view, old_local, old_view = unit(rng, 4, 6), unit(rng, 4, 6), unit(rng, 5, 6), unit(rng, 5, 6)
    stored, T = np.array([True, False, True, True, False]), 0.2
    rows, columns = np.concatenate([local, old_local[stored]]), np.concatenate([view, old_view[stored]])
    a = rows @ columns.T / T
    c = np.log(np.exp(a).sum(1)) - a.diagonal()
    expected = c[:4].mean() + c[4:].mean()
    tensors = [torch.tensor(v, requires_grad=v.dtype == float) for v in (local, view, old_local, old_view, stored)]
    got = losses.contrast(*tensors, T)
    assert got.item() == pytest.approx(expected)
    gradients = torch.autograd.grad(got, tensors[:4], allow_unused=True)
    assert gradients[1] is None and gradients[3] is None  # the global rows are constants
    assert gradients[0].isfinite().all() and (gradients[2][~tensors[4]] == 0).all() and (gradients[2][tensors[4]] != 0).any()
    empty = losses.contrast(*tensors[:4], torch.zeros(5, dtype=torch.bool), T)
    a = local @ view.T / T
    assert empty.item() == pytest.approx((np.log(np.exp(a).sum(1)) - a.diagonal()).mean())


def test_contrast_of_equal_features_is_log_b_and_falls_when_pairs_are_close():
    one, none = torch.ones(4, 3) / 3**0.5, torch.zeros(2, dtype=torch.bool)
    empty = torch.zeros(2, 3)
    assert losses.contrast(one, one, empty, empty, none, 0.1).item() == pytest.approx(np.log(4))
    near = torch.eye(4)
    assert losses.contrast(near, near, torch.zeros(2, 4), torch.zeros(2, 4), none, 0.1) < 0.01
    assert losses.contrast(near, near.roll(1, 0), torch.zeros(2, 4), torch.zeros(2, 4), none, 0.1) > 5


def test_attention(images):
    maps = images.reshape(3, 2, 30)
    square = (maps**2).mean(1)
    expected = square / np.linalg.norm(square, axis=1, keepdims=True)
    x = torch.tensor(images)
    np.testing.assert_allclose(losses.attention(x).numpy(), expected)
    torch.testing.assert_close(losses.attention(5 * x), losses.attention(x))
    other = torch.tensor(np.random.default_rng(3).normal(size=(3, 7, 5, 6)))
    a, b = losses.attention(x), losses.attention(other)
    assert losses.at(a, b).item() == pytest.approx(((expected - b.numpy()) ** 2).mean()) and losses.at(a, a) == 0


def test_half_precision_is_computed_in_fp32(logits):
    t, s = (torch.tensor(x).bfloat16() for x in logits)
    for value in (losses.kl_tau(t, s, 4.0), losses.adv_masked_kl(t, s), losses.l1_logit(t, s)):
        assert value.dtype == torch.float32
