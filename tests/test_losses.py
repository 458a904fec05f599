"""Adversarial losses and penalties against their formulas, written out."""
import math

import pytest
import torch
from torch import nn

from common import losses


def test_binary_cross_entropy_is_finite_where_a_sigmoid_is_0_or_1():
    assert losses.bce_d(torch.tensor([-1e4]), torch.tensor([1e4])).isfinite()
    assert losses.bce_g(torch.tensor([-1e4])).isfinite()


class Critic(nn.Module):
    """w·x² / 2 + u·x per pixel: its gradient is w·x + u, known at every point."""

    def __init__(self, shape, seed=0):
        super().__init__()
        w, u = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.w, self.u = nn.Parameter(w), nn.Parameter(u)

    def forward(self, x):
        self.points = x.detach()
        return (self.w * x.square() / 2 + self.u * x).flatten(1).sum(1)


def batches(n=5, shape=(3, 4, 4)):
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, *shape, generator=g, dtype=torch.float64) for _ in range(2))


PENALTIES = {
    "gp": (losses.gradient_penalty, lambda norm: sum((n - 1) ** 2 for n in norm) / len(norm)),
    "div": (losses.wasserstein_divergence, lambda norm: 2 * sum(n**6 for n in norm) / len(norm)),
    "div-3-4": (lambda *a: losses.wasserstein_divergence(*a, k=3, p=4),
                lambda norm: 3 * sum(n**4 for n in norm) / len(norm)),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_their_formulas(name):
    penalty, formula = PENALTIES[name]
    critic, (real, fake) = Critic((3, 4, 4)), batches()
    found = penalty(critic, real, fake.requires_grad_())
    # the points lie on the lines between the pairs, each at a share of its own, the same for all pixels
    share = ((critic.points - real) / (fake - real)).detach()
    torch.testing.assert_close(share, share[:, :1, :1, :1].expand_as(share))
    share = share[:, 0, 0, 0]
    assert ((0 < share) & (share < 1)).all() and share.std() > 0.05
    # one norm over all the pixels and channels of an image, written out
    gradients = (critic.w * critic.points + critic.u).flatten(1).tolist()
    expected = formula([math.sqrt(sum(v * v for v in row)) for row in gradients])
    assert found.item() == pytest.approx(expected, rel=1e-12)
    # its slope by D's weights, which is what D learns by, against differences
    found.backward()
    assert fake.grad is None  # nothing for G
    step, at = 1e-6, (0, 1, 2)
    values = []
    for sign in (1, -1):
        w = critic.w.detach().clone()
        w[at] += sign * step
        rows = (w * critic.points + critic.u.detach()).flatten(1).tolist()
        values.append(formula([math.sqrt(sum(v * v for v in row)) for row in rows]))
    assert critic.w.grad[at].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_safe_where_the_gradient_is_zero(name):
    critic, (real, fake) = Critic((3, 4, 4)), batches()
    with torch.no_grad():
        critic.w.zero_(), critic.u.zero_()
    found = PENALTIES[name][0](critic, real, fake)
    found.backward()
    assert found.item() == (1 if name == "gp" else 0)
    assert critic.w.grad.isfinite().all() and critic.u.grad.isfinite().all()


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_computed_in_fp32_under_autocast(name):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    types, (real, fake) = set(), (x.float() for x in batches())
    for layer in critic:
        layer.register_forward_hook(lambda _m, _i, output: types.add(output.dtype))
    torch.manual_seed(1)
    plain = PENALTIES[name][0](critic, real, fake)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        critic(real)  # autocast is at work
        assert torch.bfloat16 in types
        types.clear()
        found = PENALTIES[name][0](critic, real, fake.bfloat16().float())
    assert types == {torch.float32} and found.dtype == torch.float32
    assert found.item() == pytest.approx(plain.item(), rel=0.02)


def test_the_zero_centred_penalty_is_its_formula():
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    penalty = losses.zero_centred_penalty(lambda images: weight * images.square().sum((1, 2, 3)), x)
    torch.testing.assert_close(penalty, (3 * x).square().sum((1, 2, 3)).mean() / 2)  # ∇D = 2 · 1.5 · x
    penalty.backward()
    assert weight.grad.item() == pytest.approx(2 * penalty.item() / 1.5)
