"""Concat-conditioned DCGAN: its networks against the write-up's numbers, its label tricks and its rates."""
import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import cdcgan_iclevr
from tests.conftest import run_here

SETS = torch.tensor([[3, 24, 24], [0, 5, 23], [1, 2, 24]])


def test_label_sets_become_multi_hot():
    found = cdcgan_iclevr.multi_hot(torch.cat([SETS, torch.tensor([[4, 4, 24]])]), 24)
    assert found.shape == (4, 24) and found.max() == 1
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[3], [0, 5, 23], [1, 2], [4]]


@pytest.mark.parametrize("size, times", [(32, [4, 2, 1]), (64, [8, 4, 2, 1]), (128, [16, 8, 4, 2, 1])])
def test_the_networks_are_the_write_up_s(size, times):
    G, D = cdcgan_iclevr.Generator(24, 100, 6, size), cdcgan_iclevr.Discriminator(24, 6, size, "plane")
    kernels = [m.weight.shape for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    widths = [100 + 24, *(6 * t for t in times), 3]
    assert kernels == [(i, o, 4, 4) for i, o in pairwise(widths)]
    kernels = [m.weight.shape for m in D.modules() if isinstance(m, nn.Conv2d)]
    widths = [4, *(6 * t for t in times[::-1]), 1]
    assert kernels == [(o, i, 4, 4) for i, o in pairwise(widths)]
    assert len([m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]) == len(times)
    assert len([m for m in D.modules() if isinstance(m, nn.BatchNorm2d)]) == len(times) - 1
    images = G(torch.randn(3, 100), SETS)
    assert images.shape == (3, 3, size, size) and images.abs().max() <= 1
    assert [x.shape for x in D(images, SETS)] == [(3,), (3, 24)]


def test_the_labels_are_a_plane_beside_the_image_or_a_projection():
    x = torch.randn(3, 3, 64, 64)
    D, inputs = cdcgan_iclevr.Discriminator(24, 4, 64, "plane").eval(), []
    D.layers.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    D(x, SETS)
    linear, hot = D.plane[0], cdcgan_iclevr.multi_hot(SETS, 24)
    assert linear.weight.shape == (64 * 64, 24)
    assert torch.equal(inputs[0][:, :3], x)
    torch.testing.assert_close(inputs[0][:, 3], (hot @ linear.weight.T + linear.bias).view(3, 64, 64))
    D = cdcgan_iclevr.Discriminator(24, 4, 64, "projection").eval()
    h = D.layers(x)
    expected = D.last(h).flatten() + torch.einsum("ny,fy,nf->n", hot, D.embed.weight, h.flatten(1))
    torch.testing.assert_close(D(x, SETS)[0], expected)
    torch.testing.assert_close(D(x, SETS)[1], D.classify(h.flatten(1)))


@pytest.mark.parametrize("cond, flip", [("plane", 0.0), ("projection", 0.0), ("plane", 1 - 1e-9)])
def test_each_step_is_of_its_own_network_and_by_bce_with_d_s_targets(cond, flip):
    torch.manual_seed(0)
    weight = 2.0 if cond == "projection" else 0.0
    cfg = cdcgan_iclevr.Config(d_cond=cond, flip_labels=flip, aux_weight=weight)
    G, D = cdcgan_iclevr.Generator(24, 8, 2, 32), cdcgan_iclevr.Discriminator(24, 2, 32, cond)
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-2) for net in (G, D))
    real, fake, score = torch.rand(3, 3, 32, 32), G(torch.randn(3, 8), SETS), copy.deepcopy(D)
    found = cdcgan_iclevr.d_step(cfg, D, opt_d, real, fake, SETS)
    (p, logits), (q, _) = score(real, SETS), score(fake, SETS)
    p, q = p.sigmoid(), q.sigmoid()
    bce, hot = nn.BCEWithLogitsLoss(), cdcgan_iclevr.multi_hot(SETS, 24)
    torch.testing.assert_close((found["d_real"], found["d_fake"]), (p.mean(), q.mean()))
    if flip:
        p, q = 1 - p, 1 - q
    expected = -p.log().mean() - (1 - q).log().mean() + weight * bce(logits, hot)
    torch.testing.assert_close(found["d_loss"], expected)
    assert opt_d.state and all(p.grad is None for p in G.parameters())
    D.zero_grad()
    score = copy.deepcopy(D)
    found = cdcgan_iclevr.g_step(cfg, D, opt_g, real, fake, SETS)
    q, logits = score(fake, SETS)
    torch.testing.assert_close(found["g_loss"], -q.sigmoid().log().mean() + weight * bce(logits, hot))
    assert opt_g.state and all(p.grad is None for p in D.parameters())


def test_smooth_and_flipped_targets_have_the_write_up_s_ranges():
    def targets(n, **fields):
        return cdcgan_iclevr.targets(cdcgan_iclevr.Config(**fields), n, torch.device("cpu"))
    torch.manual_seed(0)
    real, fake = targets(300, smooth_labels=True)
    assert 0.8 <= real.min() < 0.82 and 1.18 < real.max() <= 1.2
    assert 0 <= fake.min() < 0.02 and 0.18 < fake.max() <= 0.2
    real, fake = targets(300, flip_labels=0.25)
    assert set(real.tolist()) == set(fake.tolist()) == {0.0, 1.0}
    assert 0.15 < (real == 0).float().mean() < 0.35 and 0.15 < (fake == 1).float().mean() < 0.35
    assert targets(3).tolist() == [[1.0] * 3, [0.0] * 3]


def test_rates_are_halved_by_epochs(here):
    def rates(**fields):
        folder = run_here("cdcgan_iclevr", judge="none", sample_every=0, **fields)
        state = torch.load(folder / "last.pt", weights_only=True)
        return [state[opt]["param_groups"][0]["lr"] for opt in ("opt_g", "opt_d")]
    for iters, halvings in ((18, 0), (19, 1), (37, 2)):  # an epoch is 9 batches
        expected = [0.008 / 2**halvings, 0.004 / 2**halvings]
        assert rates(iters=iters, halve_every=2, lr_g=0.008, lr_d=0.004) == pytest.approx(expected), iters
    assert rates(iters=19, halve_every=0) == pytest.approx([2e-4, 1e-4])


def test_pairs_and_their_penalty_are_their_formulas():
    torch.manual_seed(0)
    cfg = cdcgan_iclevr.Config(loss="paired", gamma=0.5, d_norm="none")
    G = cdcgan_iclevr.Generator(24, 8, 2, 32)
    D = cdcgan_iclevr.Discriminator(24, 2, 32, "projection", "none")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in D.modules())
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-2) for net in (G, D))
    real, fake, before = torch.rand(3, 3, 32, 32), G(torch.randn(3, 8), SETS), copy.deepcopy(D)
    found = cdcgan_iclevr.d_step(cfg, D, opt_d, real, fake, SETS)
    pairs = nn.functional.softplus(before(fake, SETS)[0] - before(real, SETS)[0]).mean()
    first = torch.stack([real[0], fake[0].detach()]).requires_grad_()  # an eighth of each kind, rounded up
    gradient, = torch.autograd.grad(before(first, SETS[[0, 0]])[0].sum(), first)
    torch.testing.assert_close(found["penalty"], gradient.square().sum() / 2 / 2)
    torch.testing.assert_close(found["d_loss"], pairs + 0.5 * found["penalty"])
    after = copy.deepcopy(D)
    found = cdcgan_iclevr.g_step(cfg, D, opt_g, real, fake, SETS)
    expected = nn.functional.softplus(after(real, SETS)[0] - after(fake, SETS)[0]).mean()
    torch.testing.assert_close(found["g_loss"], expected)
