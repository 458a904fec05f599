"""Concat-conditioned DCGAN: its networks against the report's numbers, its losses, targets and rates."""
import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import cdcgan_iclevr
from cdcgan_iclevr import Config, Discriminator, Generator
from common.blocks import multi_hot
from tests.conftest import run_here

SETS = torch.tensor([[3, 24, 24], [0, 5, 23], [1, 2, 24]])


@pytest.mark.parametrize("size, times", [(32, [4, 2, 1]), (64, [8, 4, 2, 1]), (128, [16, 8, 4, 2, 1])])
def test_the_networks_are_the_report_s(size, times):
    G, D = Generator(24, 100, 6, size), Discriminator(24, 6, size, "plane", "batch", False)
    kernels = [m.weight.shape for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert kernels == [(i, o, 4, 4) for i, o in pairwise([100 + 24, *(6 * t for t in times), 3])]
    kernels = [m.weight.shape for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert kernels == [(o, i, 4, 4) for i, o in pairwise([4, *(6 * t for t in times[::-1]), 1])]
    norms = [len([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]) for net in (G, D)]
    assert norms == [len(times), len(times) - 1]
    images = G(torch.randn(3, 100), SETS)
    assert images.shape == (3, 3, size, size) and images.abs().max() <= 1
    score, logits = D(images, SETS)
    assert score.shape == (3,) and logits is None


def test_the_labels_are_a_plane_beside_the_image_or_a_projection():
    x, inputs = torch.randn(3, 3, 64, 64), []
    D = Discriminator(24, 4, 64, "plane", "batch", False)
    D.layers.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    D(x, SETS)
    linear, hot = D.plane[0], multi_hot(SETS, 24)
    assert linear.weight.shape == (64 * 64, 24)
    assert torch.equal(inputs[0][:, :3], x)
    torch.testing.assert_close(inputs[0][:, 3], (hot @ linear.weight.T + linear.bias).view(3, 64, 64))
    D = Discriminator(24, 4, 64, "projection", "none", True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in D.modules())
    h = D.layers(x)
    expected = D.last(h).flatten() + torch.einsum("ny,fy,nf->n", hot, D.embed.weight, h.flatten(1))
    torch.testing.assert_close(D(x, SETS), (expected, D.classify(h.flatten(1))))


@pytest.mark.parametrize("fields", [
    {}, dict(flip_labels=1 - 1e-9), dict(d_cond="projection", aux_weight=2.0),
    dict(loss="rpgan", d_norm="none", d_cond="projection", gamma=0.5, aux_weight=2.0)], ids=str)
def test_steps_losses_are_their_formulas(fields):
    torch.manual_seed(0)
    cfg = Config(**fields, precision="fp32")
    D, bce = Discriminator(24, 2, 32, cfg.d_cond, cfg.d_norm, cfg.aux_weight > 0), nn.BCEWithLogitsLoss()
    real, fake = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32, requires_grad=True)
    before, hot = copy.deepcopy(D), multi_hot(SETS, 24)
    found = cdcgan_iclevr.d_step(D, torch.optim.Adam(D.parameters(), 1e-2), real, fake.detach(), SETS, cfg)
    (p, logits), (q, _) = before(real, SETS), before(fake, SETS)
    torch.testing.assert_close((found["d_real"], found["d_fake"]), (p.sigmoid().mean(), q.sigmoid().mean()))
    p, q = (-p, -q) if cfg.flip_labels else (p, q)
    expected = softplus(q - p).mean() if cfg.loss == "rpgan" else softplus(-p).mean() + softplus(q).mean()
    if cfg.aux_weight:  # of real images only
        expected = expected + 2 * bce(logits, hot)
    if cfg.gamma:
        first = torch.stack([real[0], fake[0].detach()]).requires_grad_()  # an eighth of each, rounded up
        gradient, = torch.autograd.grad(before(first, SETS[[0, 0]])[0].sum(), first)
        torch.testing.assert_close(found["penalty"], gradient.square().sum() / 2)
        expected = expected + 0.5 * found["penalty"]
    torch.testing.assert_close(found["d_loss"], expected)
    (p, _), (q, logits) = D(real, SETS), D(fake, SETS)
    found = cdcgan_iclevr.g_step(D, torch.optim.SGD([fake], 1e-2), real, fake, SETS, cfg)
    expected = softplus(p - q).mean() if cfg.loss == "rpgan" else softplus(-q).mean()
    torch.testing.assert_close(found["g_loss"], expected + (2 * bce(logits, hot) if cfg.aux_weight else 0))
    torch.testing.assert_close(found["d_fake_updated"], q.sigmoid().mean())


def test_smooth_and_flipped_targets_have_the_report_s_ranges():
    def targets(n, **fields):
        return cdcgan_iclevr.targets(Config(**fields), n, torch.device("cpu"))
    torch.manual_seed(0)
    real, fake = targets(300, smooth_labels=True)
    assert 0.8 <= real.min() < 0.82 and 1.18 < real.max() <= 1.2
    assert 0 <= fake.min() < 0.02 and 0.18 < fake.max() <= 0.2
    real, fake = targets(300, flip_labels=0.25)
    assert set(real.tolist()) == set(fake.tolist()) == {0.0, 1.0}
    assert 0.15 < (real == 0).float().mean() < 0.35 and 0.15 < (fake == 1).float().mean() < 0.35
    assert targets(3).tolist() == [[1.0] * 3, [0.0] * 3]


def test_rates_are_halved_by_epochs(here, monkeypatch):
    rates = {"d_step": [], "g_step": []}
    for name in rates:
        monkeypatch.setattr(cdcgan_iclevr, name, lambda D, opt, *args, name=name: (
            rates[name].append(opt.param_groups[0]["lr"]) or {}))
    for every in (2, 0):  # an epoch is 9 batches
        run_here("cdcgan_iclevr", judge="none", sample_every=0, iters=37, halve_every=every, lr_g=8e-3,
                 lr_d=4e-3)
    for name, rate in (("g_step", 8e-3), ("d_step", 4e-3)):
        assert rates[name] == pytest.approx([rate] * 18 + [rate / 2] * 18 + [rate / 4] + [rate] * 37)
