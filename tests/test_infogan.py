"""InfoGAN: networks against the report's numbers, Q's losses, its grids, and the meaning of its codes."""
import json
import math
from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import one_hot

import infogan_mnist
from infogan_mnist import Config, join, q_losses
from synthetic.measures import category_digits, match
from tests.conftest import Reader, judge_of, rows_of, run_here


def networks(ch=64, image_size=64, n_categories=10, n_continuous=2):
    torch.manual_seed(0)
    features = infogan_mnist.widths(ch, image_size)[-1]
    return (infogan_mnist.Generator(62 + n_categories + n_continuous, ch, image_size),
            infogan_mnist.Body(ch, image_size), infogan_mnist.QHead(features, n_categories, n_continuous))


def test_the_networks_are_the_report_s():
    G, body, Q = networks()
    kernels = [layer.weight.shape for layer in G if isinstance(layer, nn.ConvTranspose2d)]
    assert kernels == [(i, o, 4, 4) for i, o in pairwise([74, 512, 256, 128, 64, 1])]
    kernels = [layer.weight.shape for layer in body if isinstance(layer, nn.Conv2d)]
    assert kernels == [(o, i, 4, 4) for i, o in pairwise([1, 64, 128, 256, 512])]
    x = G(join(torch.rand(2, 62), torch.tensor([3, 0]), torch.rand(2, 2), 10))
    assert x.shape == (2, 1, 64, 64) and x.abs().max() <= 1
    x = body(x)
    assert x.shape == (2, 512, 4, 4)
    assert not any(getattr(m, "bias", None) is not None for net in (G, body) for m in net.modules()
                   if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
    assert body[1].negative_slope == 0.2 and not isinstance(body[2], nn.BatchNorm2d)
    linear = [m for m in Q.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(8192, 100), (100, 10)]
    heads = [m for m in Q.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in heads] == [
        (10, 10, (1, 1)), (10, 2, (1, 1)), (10, 2, (1, 1))]


@pytest.mark.parametrize("size, k, c", [(32, 3, 1), (64, 12, 4)])
def test_other_sizes_and_numbers_of_codes(size, k, c):
    cfg = Config(ch=2, image_size=size, n_categories=k, n_continuous=c)
    G, body, Q = networks(ch=2, image_size=size, n_categories=k, n_continuous=c)
    x = G(join(*infogan_mnist.grid_codes(cfg, torch.Generator(), 2, None), k))
    assert x.shape == (2 * k, 1, size, size)
    assert [part.shape for part in Q(body(x))] == [(2 * k, k), (2 * k, c), (2 * k, c)]


def test_the_code_s_layout():
    z, continuous = torch.rand(3, 4), torch.rand(3, 2)
    code = join(z, torch.tensor([1, 0, 2]), continuous, 3)
    assert torch.equal(code[:, :4], z) and torch.equal(code[:, 7:], continuous)
    assert code[:, 4:7].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_q_s_losses_are_their_formulas():
    torch.manual_seed(0)
    logits, mean = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    variance, codes = torch.rand(5, 3, dtype=torch.float64) + 0.1, torch.randn(5, 3, dtype=torch.float64)
    category = torch.tensor([0, 3, 2, 2, 1])
    cross_entropy, likelihood = q_losses((logits, mean, variance), category, codes)
    rows = [-math.log(logits[i, k].exp() / logits[i].exp().sum()) for i, k in enumerate(category)]
    assert cross_entropy.item() == pytest.approx(sum(rows) / 5)
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(codes)
    torch.testing.assert_close(likelihood, -density.mean())


def test_the_variance_can_not_reach_zero():
    Q = infogan_mnist.QHead(4, 10, 2)
    nn.init.constant_(Q.variance.bias, -1e4)
    _, mean, variance = Q(torch.zeros(3, 4, 4, 4))
    assert (variance >= 0.01).all()
    assert q_losses((torch.zeros(3, 10), mean, variance), torch.zeros(3).long(), mean)[1].isfinite()


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_g_and_q_learn_by_their_losses_and_the_category_is_read_from_changed_images(augment):
    _, body, Q = networks(ch=2, image_size=32)
    D, seen, estimates = nn.Sequential(nn.Conv2d(4 * 2, 1, 4), nn.Flatten()), [], []
    body.register_forward_hook(lambda module, x, y: seen.append((x[0].detach(), y)))
    Q.register_forward_hook(lambda module, x, y: estimates.append(y))
    fake, changed = torch.rand(8, 1, 32, 32, requires_grad=True), torch.rand(8, 1, 32, 32)
    category, continuous = torch.randint(10, (8,)), torch.rand(8, 2) * 2 - 1
    cfg = Config(q_weight=0.3, augment=augment, precision="fp32")
    opt = torch.optim.SGD([fake, *Q.parameters()], 0.0)
    found = infogan_mnist.g_step(body, D, Q, opt, fake, changed, category, continuous, cfg)
    assert [torch.equal(x, images) for (x, _), images in zip(seen, (fake, changed), strict=False)] == (
        [True] * (1 + bool(augment)))
    of_g = nn.functional.softplus(-D(seen[0][1]))
    expected = of_g.mean(), q_losses(estimates[-1], category, continuous)[0], q_losses(
        estimates[0], category, continuous)[1]
    torch.testing.assert_close((found["g_loss"], found["q_category"], found["q_continuous"]), expected)
    # what G and Q go down is their sum, weighted
    grads = [fake.grad.clone(), *(p.grad.clone() for p in Q.parameters())]
    h, other = body(fake), Q(body(changed))[0] if augment else None
    logits, mean, variance = Q(h)
    of_q = q_losses((logits if other is None else other, mean, variance), category, continuous)
    loss = nn.functional.softplus(-D(h)).mean() + of_q[0] + 0.3 * of_q[1]
    torch.testing.assert_close(grads, list(torch.autograd.grad(loss, [fake, *Q.parameters()])))


def test_noise_is_on_all_images_of_d_and_q_and_falls_to_zero(here, monkeypatch):
    stds, steps = [], []
    monkeypatch.setattr(infogan_mnist, "instance_noise", lambda images, std: stds.append(std) or images + std)
    for name in ("d_step", "g_step"):
        monkeypatch.setattr(infogan_mnist, name, lambda *args: steps.extend(
            x.detach().amin().item() for x in args if isinstance(x, torch.Tensor) and x.ndim == 4) or {})
    monkeypatch.setattr(infogan_mnist.evaluator, "finish", lambda *args, **options: {})
    run_here("infogan_mnist", iters=5, noise=8.0, noise_iters=4, augment=1.0, judge="none", sample_every=0)
    assert stds == pytest.approx([std for std in (6, 4, 2, 0, 0) for _ in range(3)])
    assert all(x >= std - 1 for x, std in zip(steps, [s for s in stds[::3] for _ in range(4)], strict=True))
    monkeypatch.undo()
    assert infogan_mnist.instance_noise(torch.zeros(9999), 0.5).std() == pytest.approx(0.5, abs=0.03)


def test_the_grid_s_layout():
    cfg = Config(n_categories=5, n_continuous=3, z_dim=7)
    z, category, codes = infogan_mnist.grid_codes(cfg, torch.Generator().manual_seed(0), 10, 1)
    assert torch.equal(category.view(10, 5), torch.arange(5).expand(10, 5))  # constant down a column
    assert (z.view(10, 5, 7) == z.view(10, 5, 7)[0]).all()  # so is the noise
    assert len(z[:5].unique(dim=0)) == 5  # but columns differ
    codes = codes.view(10, 5, 3)
    torch.testing.assert_close(codes[:, 2, 1], torch.linspace(-1, 1, 10))
    assert not codes[..., [0, 2]].any()
    z, category, codes = infogan_mnist.grid_codes(cfg, torch.Generator().manual_seed(0), 10, None)
    assert len(z.unique(dim=0)) == 50 and codes.abs().max() <= 1 and z.abs().max() <= 1 and z.min() < -0.9


def test_match_finds_the_best_one_to_one_assignment():
    shares = torch.zeros(3, 10)
    shares[0, 7], shares[0, 1], shares[1, 7], shares[1, 4], shares[2, 5] = 0.9, 0.1, 0.8, 0.2, 1.0
    digit, agree = match(shares)  # 0 and 1 both look like 7
    assert digit == [7, 4, 5] and agree == pytest.approx((0.9 + 0.2 + 1) / 3)
    digit, agree = match(torch.eye(10)[torch.arange(12) % 10])  # more categories than digits
    assert sorted(digit)[:2] == [-1, -1] and agree == pytest.approx(10 / 12)


def test_category_digits_of_known_digits():
    """Category k shows digit (k + 3) % 10; a tenth of the images shows the next digit."""
    g = torch.Generator().manual_seed(1)

    def make(z, category, codes):
        wrong = (torch.rand(len(category), generator=g) < 0.1).long()
        return ((category + 3 + wrong) % 10)[:, None, None, None].float().expand(-1, 1, 32, 32)

    judge = judge_of("digits", Reader(lambda x: one_hot(x[:, 0, 0, 0].round().long(), 10).float()))
    found = category_digits(make, judge, 2000, 62, 10, 2, torch.Generator().manual_seed(0))
    assert match(found["shares"])[0] == [(k + 3) % 10 for k in range(10)]
    assert found["code → digit"] == pytest.approx(0.9, abs=0.02)
    assert found["shares"].max(1).values.tolist() == pytest.approx([0.9] * 10, abs=0.06)


def test_pictures_and_scores_of_a_run(here):
    folder = run_here("infogan_mnist", iters=2, eval_every=2, category=7)
    for name, columns in (("samples", 10), ("code_1", 10), ("code_2", 10), ("category_7_code_1", 21)):
        with Image.open(folder / f"{name}.png") as grid:
            assert grid.width == columns * 66 + 2
    assert {"accuracy_code", "q_category", "q_continuous"} < rows_of(folder)[-1].keys()
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    last, summary = scores["last"], scores["summary"]
    assert list(summary) == ["code → digit", "a code ~ slant", "a code ~ width", "FD (judge)"]
    assert summary["a code ~ width"][0] >= max(abs(last[f"code {c} ~ width"][0]) for c in (1, 2))
    assert 0.1 <= last["code → digit"][0] <= 1 and [len(row) for row in last["shares"][0]] == [10] * 10


def test_images_are_changed_each_in_its_own_way():
    torch.manual_seed(0)
    stroke = -torch.ones(64, 1, 32, 32)
    stroke[..., 8:24, 15:18] = 1  # an upright bar, three pixels wide
    assert infogan_mnist.random_affine(stroke, 0.0) is stroke
    changed = infogan_mnist.random_affine(stroke, 1.0)
    assert changed.shape == stroke.shape and changed.min() >= -1 and changed.max() <= 1
    ink = (changed + 1).sum((1, 2, 3)) / 2 / 48  # of the bar's
    assert ink.min() < 0.6 and ink.max() > 1.6  # thinner and thicker ones
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    weight = (changed[:, 0] + 1) / (changed[:, 0] + 1).sum((1, 2), keepdim=True)
    mean_x, mean_y = (weight * x).sum((1, 2)), (weight * y).sum((1, 2))
    slope = ((weight * (x - mean_x[:, None, None]) * (y - mean_y[:, None, None])).sum((1, 2))
             / (weight * (y - mean_y[:, None, None]).square()).sum((1, 2)))
    assert slope.min() < -0.2 and slope.max() > 0.2  # leaning to both sides
    assert mean_x.std() > 0.5 and mean_y.std() > 0.5
