"""Concat-conditioned DCGAN: its networks against the write-up's numbers, its label tricks and its rates."""
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import cdcgan_iclevr
from tests.conftest import rows_of, run_here

SETS = torch.tensor([[3, 24, 24], [0, 5, 23], [1, 2, 24]])


# ------------------------------------------------------------------------------------------------- networks

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
    assert images.shape == (3, 3, size, size) and images.abs().max() <= 1 and D(images, SETS).shape == (3,)


def test_the_labels_are_a_plane_beside_the_image_or_a_projection():
    x = torch.randn(3, 3, 64, 64)
    D, seen = cdcgan_iclevr.Discriminator(24, 4, 64, "plane").eval(), []
    D.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    D(x, SETS)
    linear, hot = D.plane[0], cdcgan_iclevr.multi_hot(SETS, 24)
    assert linear.weight.shape == (64 * 64, 24)
    assert torch.equal(seen[0][:, :3], x)
    torch.testing.assert_close(seen[0][:, 3], (hot @ linear.weight.T + linear.bias).view(3, 64, 64))
    D = cdcgan_iclevr.Discriminator(24, 4, 64, "projection").eval()
    h = D.layers(x)
    expected = D.last(h).flatten() + torch.einsum("ny,fy,nf->n", hot, D.embed.weight, h.flatten(1))
    torch.testing.assert_close(D(x, SETS), expected)


# ---------------------------------------------------------------------- training

def trained(**fields) -> tuple[list[dict], list[float]]:
    """The rows of a run, and both rates at its end."""
    name = ",".join(f"{k}={v}" for k, v in fields.items()) or "plain"
    folder = run_here("cdcgan_iclevr", **dict(judge="none", log_every=1, sample_every=0, out=name) | fields)
    state = torch.load(folder / "last.pt", weights_only=True)
    return rows_of(folder), [state[opt]["param_groups"][0]["lr"] for opt in ("opt_g", "opt_d")]


def test_label_tricks_change_d_s_targets(here):
    def first(**fields):
        row = trained(iters=1, **fields)[0][0]
        return row["d_loss"], row["d_real"], row["d_fake"]
    # flip_labels 1 swaps all targets: BCE(s, 1) - BCE(s, 0) = -s is the difference, s the logit
    plain, real, fake = first()
    swapped, *_ = first(flip_labels=1.0)
    logit = [math.log(p / (1 - p)) for p in (real, fake)]  # of the mean: near enough, D being untrained
    assert swapped - plain == pytest.approx(logit[0] - logit[1], abs=0.02) and swapped != plain
    assert min(plain, swapped) < first(flip_labels=0.5)[0] < max(plain, swapped)
    assert first(smooth_labels=True)[0] != plain


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
    for iters, halvings in ((18, 0), (19, 1), (37, 2)):  # an epoch is 9 batches
        rates = trained(iters=iters, halve_every=2, lr_g=0.008, lr_d=0.004)[1]
        assert rates == pytest.approx([0.008 / 2**halvings, 0.004 / 2**halvings]), iters
    assert trained(iters=19, halve_every=0)[1] == pytest.approx([2e-4, 1e-4])


def test_bad_values(refuses):
    refuses("cdcgan_iclevr", "--ema", "1", message="must be below 1")
    refuses("cdcgan_iclevr", "--flip-labels", "1.1", message="--flip-labels 1.1: must be at most 1")
    refuses("cdcgan_iclevr", "--d-cond", "linear", message="invalid choice")
