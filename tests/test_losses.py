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
    for loss in (losses.pseudo_label, losses.act, losses.balance_ln, losses.h_inst):
        assert loss(t).dtype == torch.float32


def test_kl_elem_is_batchmean_over_classes(logits):
    t, s = logits
    for tau in (1.0, 4.0):
        p, q = softmax(t, tau), softmax(s, tau)
        expected = (p * (np.log(p) - np.log(q))).mean()
        assert losses.kl_elem(torch.tensor(t), torch.tensor(s), tau).item() == pytest.approx(expected, rel=1e-12)
    whole = losses.kl_tau(torch.tensor(t), torch.tensor(s), 1.0)
    torch.testing.assert_close(5 * losses.kl_elem(torch.tensor(t), torch.tensor(s)), whole)


def test_adversaries_are_the_distances_negated(logits):
    t, s = (torch.tensor(x, requires_grad=True) for x in logits)
    d = np.abs(logits[0] - logits[1]).mean()
    p, q = softmax(logits[0]), softmax(logits[1])
    kl = (p * (np.log(p) - np.log(q))).sum(1).mean()
    for value, expected in (
        (losses.adv_kl(t, s), -kl),
        (losses.adv_l1(t, s), -d),
        (losses.adv_log_l1(t, s), -np.log(d + 1)),
    ):
        assert value.item() == pytest.approx(expected, rel=1e-12)
        assert all(g.abs().max() > 1e-4 for g in torch.autograd.grad(value, [t, s]))
    (plain,), (log,) = (torch.autograd.grad(f(t, s), [t]) for f in (losses.adv_l1, losses.adv_log_l1))
    torch.testing.assert_close(log, plain / (d + 1))
    assert losses.adv_l1(t, t) == losses.adv_kl(t, t) == losses.adv_log_l1(t, t) == 0


def test_pseudo_label_is_the_surprise_of_the_named_class(logits):
    t = torch.tensor(logits[0], requires_grad=True)
    value = losses.pseudo_label(t)
    assert value.item() == pytest.approx(-np.log(softmax(logits[0]).max(1)).mean()) and value > 0
    assert torch.autograd.grad(value, t)[0].abs().max() > 1e-3


def test_act():
    f = np.random.default_rng(2).normal(size=(3, 7))
    assert losses.act(torch.tensor(f)).item() == pytest.approx(-np.abs(f).mean())


def test_balance(logits):
    t = logits[0]
    mean = softmax(t).mean(0)
    assert losses.balance_ln(torch.tensor(t)).item() == pytest.approx((mean * np.log(mean)).sum())
    assert losses.balance_log10(torch.tensor(t)).item() == pytest.approx((mean * np.log10(mean)).sum())
    dense = torch.tensor(t).view(3, 2, 5).transpose(1, 2)  # two pixels an image: the same rows
    torch.testing.assert_close(losses.balance_ln(dense), losses.balance_ln(torch.tensor(t)))


@pytest.mark.parametrize("classes, least", [(10, -1), (100, -2)])
def test_balance_has_its_minimum_where_classes_are_even(classes, least):
    even = torch.eye(classes) * 1e3  # confident rows, one a class
    assert losses.balance_log10(even).item() == pytest.approx(least) == losses.balance_log10(torch.zeros(4, classes)).item()
    assert losses.balance_log10(torch.randn(8, classes)) > least
    one = (torch.arange(classes) == 0) * 1e3 + torch.zeros(4, classes, requires_grad=True)  # every row the same class
    value = losses.balance_ln(one)
    assert value.abs() < 1e-9 and torch.autograd.grad(value, one)[0].isfinite().all()


def test_h_inst(logits):
    p = softmax(logits[0])
    assert losses.h_inst(torch.tensor(logits[0])).item() == pytest.approx(-(p * np.log(p)).sum(1).mean())
    assert losses.h_inst(torch.zeros(3, 5)).item() == pytest.approx(np.log(5)) and losses.h_inst(torch.eye(5) * 1e4) == 0


def test_attention_can_be_differentiated_twice_in_either_memory_layout():
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.to(memory_format=layout).requires_grad_()
        assert torch.autograd.gradcheck(losses.attention, y) and torch.autograd.gradgradcheck(losses.attention, y)
        (g,) = torch.autograd.grad(losses.attention(y)[:, 0].sum(), y)
        assert g.is_contiguous(memory_format=layout)


def test_attention_transfer():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(4, 6, 3, 2)), rng.normal(size=(4, 2, 3, 2))  # the numbers of channels may differ

    def attention(x):
        q = (x**2).mean(1).reshape(4, -1)
        return q / np.sqrt((q**2).sum(1, keepdims=True))

    t, s = losses.attention(torch.tensor(a)), losses.attention(torch.tensor(b))
    np.testing.assert_allclose(t.numpy(), attention(a))
    assert losses.at(t, s).item() == pytest.approx(((attention(a) - attention(b)) ** 2).mean())
    assert losses.at_norm(t, s).item() == pytest.approx(np.sqrt(((attention(a) - attention(b)) ** 2).sum(1)).mean())
    scaled = losses.attention(torch.tensor(a) * torch.tensor([0.1, 2.0, 7.0, 1e3])[:, None, None, None])
    assert losses.at(t, scaled) < 1e-24 and losses.at(t, t) == 0


def test_attention_of_a_dead_map_stays_finite():
    x = torch.zeros(2, 3, 2, 2, requires_grad=True)
    value = losses.at_norm(losses.attention(torch.zeros(2, 1, 2, 2)), losses.attention(x))
    assert value == 0 and torch.autograd.grad(value, x)[0].isfinite().all()


def coded_jsd(t, s, tau):
    p, q = softmax(t, tau), softmax(s, tau)
    m = np.clip((p + q) / 2, 0.01, 0.99)
    p, q = np.clip(p, 0.01, 0.99), np.clip(q, 0.01, 0.99)
    return 0.5 * (m * (np.log(m) - np.log(p))).mean() + 0.5 * (m * (np.log(m) - np.log(q))).mean()


def textbook_jsd(t, s, tau):
    p, q = softmax(t, tau), softmax(s, tau)
    m = (p + q) / 2
    return 0.5 * (p * (np.log(p) - np.log(m))).mean() + 0.5 * (q * (np.log(q) - np.log(m))).mean()


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("form, expected", [("coded", coded_jsd), ("textbook", textbook_jsd)])
def test_adv_jsd_elem(logits, tau, form, expected):
    t, s = (torch.tensor(x) for x in logits)
    value = losses.adv_jsd_elem(t, s, tau, form)
    assert value.item() == pytest.approx(1 - min(max(expected(*logits, tau), 0), 1), rel=1e-12)
    torch.testing.assert_close(value, losses.adv_jsd_elem(s, t, tau, form))
    assert losses.adv_jsd_elem(t, t + 1, tau, form).item() == pytest.approx(1)
    assert abs(coded_jsd(*logits, tau) - textbook_jsd(*logits, tau)) > 1e-3  # the two forms differ


def test_adv_jsd_elem_has_no_gradient_for_the_teacher_and_none_below_one_percent():
    t = torch.tensor([[8.0, 0.0, -8.0], [1.0, 0.5, 0.0]], requires_grad=True)
    q = torch.tensor([[0.7, 0.295, 0.005], [0.3, 0.3, 0.4]])
    s = q.log().requires_grad_()  # probabilities q at tau 1
    value = losses.adv_jsd_elem(t, s, 1.0)
    assert 0 <= value <= 1 and torch.autograd.grad(value, t, allow_unused=True, retain_graph=True)[0] is None
    (g,) = torch.autograd.grad(value, s)
    # d/ds_c = q_c (a_c - Σ_k q_k a_k) with a = dL/dq: solve for a, known up to a constant, and compare with finite differences in q.
    p = softmax(t.detach().numpy())

    def by_probability(q):
        m = np.clip((p + q) / 2, 0.01, 0.99)
        return 1 - 0.5 * (m * (2 * np.log(m) - np.log(np.clip(p, 0.01, 0.99)) - np.log(np.clip(q, 0.01, 0.99)))).mean()

    a = np.zeros((2, 3))
    for i, c in np.ndindex(2, 3):
        d = np.zeros((2, 3))
        d[i, c] = 1e-6
        a[i, c] = (by_probability(q.numpy() + d) - by_probability(q.numpy() - d)) / 2e-6
    assert a[0, 2] == 0 and np.abs(a[1]).min() > 1e-4  # clamped in Q and M: no gradient at all
    expected = q.numpy() * (a - (q.numpy() * a).sum(1, keepdims=True))
    np.testing.assert_allclose(g.numpy(), expected, atol=1e-8)


def test_latent_prior():
    z = np.random.default_rng(0).normal(size=(6, 4)) * 2 + 0.5
    expected = ((z.var(0, ddof=1) - 1) ** 2).mean() + (z.mean(0) ** 2).mean()
    assert losses.latent_prior(torch.tensor(z)).item() == pytest.approx(expected, rel=1e-12)


def test_kl_normal():
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    expected = (-0.5 * (1 + logvar - mean**2 - np.exp(logvar))).sum(1).mean()
    assert losses.kl_normal(torch.tensor(mean), torch.tensor(logvar)).item() == pytest.approx(expected, rel=1e-12)
    assert losses.kl_normal(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


def test_l1(logits):
    x, y = logits
    assert losses.l1(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(np.abs(x - y).mean())


def test_ssd_modulation():
    share, p = np.array([[0.5, 0.0], [0.25, 1.0]]), np.array([[0.2, 0.9], [1.0, 0.1]])
    for gamma in (0.0, 1.0, 2.0):
        got = losses.modulation(torch.tensor(share), torch.tensor(p), gamma)
        np.testing.assert_allclose(got, (1 - share) * (1 - p) ** gamma, rtol=1e-12)
        assert ((got >= 0) & (got <= 1)).all()
    assert losses.modulation(torch.tensor(0.5), torch.tensor(1.0), 0.0) == 0.5  # not 0: the factor is off


def test_rows_of_cross_entropy_confidence_and_majority_of_images_and_maps(logits):
    t = logits[0]
    maps = np.random.default_rng(1).normal(size=(4, 5, 3, 2)) * 3
    for x in (t, maps):
        p = softmax(x)
        y = np.arange(x.size // x.shape[1]).reshape(x.shape[0], *x.shape[2:]) % 5
        expected = -np.log(np.take_along_axis(p, y[:, None], 1)[:, 0])
        np.testing.assert_allclose(losses.cross_entropy_rows(torch.tensor(x), torch.tensor(y)), expected, rtol=1e-12)
        np.testing.assert_allclose(losses.confidence(torch.tensor(x)), p.max(1), rtol=1e-12)
        most = [np.bincount(named.ravel(), minlength=5).argmax() for named in x.argmax(1)]
        assert losses.majority(torch.tensor(x)).tolist() == most
        np.testing.assert_allclose(losses.per_image(torch.tensor(expected)), expected.reshape(len(x), -1).mean(1), rtol=1e-12)


def test_importance_weights():
    p = np.array([0.1, 0.25, 0.05, 0.25])
    got = losses.importance(torch.tensor(p), torch.tensor(8), torch.tensor(0.4))
    np.testing.assert_allclose(got, (8 * p) ** -0.4, rtol=1e-12)
    np.testing.assert_allclose(losses.to_batch_max(got), (8 * p) ** -0.4 / (8 * 0.05) ** -0.4, rtol=1e-12)
    assert losses.importance(torch.tensor(p), torch.tensor(8), torch.tensor(0.0)).tolist() == [1] * 4


def test_pixel_cross_entropy_counts_labelled_pixels_only():
    rng = np.random.default_rng(3)
    logits, labels = rng.standard_normal((2, 4, 3, 5)), rng.integers(0, 4, (2, 3, 5))
    labels[0, 0], labels[1, 2, 1] = 255, 255
    log_p = np.moveaxis(np.log(softmax(logits)), 1, -1)
    for smoothing in (0.0, 0.3):
        rows = [
            -(1 - smoothing) * log_p[i][labels[i]] - smoothing * log_p[i].mean()
            for i in np.ndindex(labels.shape)
            if labels[i] != 255
        ]
        found = losses.pixel_cross_entropy(torch.tensor(logits), torch.tensor(labels), 255, smoothing)
        assert len(rows) == 24 and found.item() == pytest.approx(np.mean(rows))
    x = torch.tensor(logits, requires_grad=True)
    nothing = losses.pixel_cross_entropy(x, torch.full((2, 3, 5), 255), 255)
    (gradient,) = torch.autograd.grad(nothing, x)
    assert nothing.item() == 0 and torch.equal(gradient, torch.zeros_like(x))


def test_pixel_cross_entropy_of_ranks_with_unlike_numbers_of_labels_is_that_of_the_global_batch(monkeypatch):
    rng = np.random.default_rng(5)
    logits, labels = torch.tensor(rng.standard_normal((4, 3, 2, 2))), torch.tensor(rng.integers(0, 3, (4, 2, 2)))
    labels[0] = labels[1, 0] = 255
    whole = losses.pixel_cross_entropy(logits, labels, 255)
    monkeypatch.setattr(losses.ranks, "mean", lambda count: torch.tensor((2 + 8) / 2, dtype=count.dtype))
    parts = [losses.pixel_cross_entropy(logits[own], labels[own], 255) for own in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


@pytest.mark.parametrize(
    "loss",
    [lambda t, s: losses.kl_tau(t, s, 20.0), losses.l1_logit, losses.adv_masked_kl, losses.adv_l1, losses.adv_log_l1, losses.adv_kl,
     lambda t, s: losses.pseudo_label(t), lambda t, s: losses.balance_ln(t), lambda t, s: losses.cross_entropy(s, t.argmax(1))],
)  # fmt: skip
def test_dense_logits_count_as_one_row_a_pixel(loss):
    t, s = (torch.tensor(v) for v in np.random.default_rng(4).standard_normal((2, 3, 5, 4, 2)))
    rows = [v.movedim(1, -1).reshape(-1, 5) for v in (t, s)]
    torch.testing.assert_close(loss(t, s), loss(*rows))


def test_gan_losses():
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0], dtype=torch.float64)
    p = 1 / (1 + np.exp(-x.numpy()))
    assert losses.gan_real(x).item() == pytest.approx(-np.log(p).mean())
    assert losses.gan_fake(x).item() == pytest.approx(-np.log(1 / (1 + np.exp(x.numpy()))).mean())
    assert losses.gan_real(x.to(torch.bfloat16)).dtype == torch.float32
