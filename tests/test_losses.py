"""Adversarial losses and penalties against their formulas, written out."""
import math
from statistics import mean

import pytest
import torch
from torch import nn

from acgan_celeba import wgan_div, wgan_gp
from common import losses


def minus_log_sigmoid(x):
    return math.log(1 + math.exp(-x))


def hinge(real, fake):
    return mean(max(0, 1 - r) for r in real) + mean(max(0, 1 + f) for f in fake)


LOSSES = {
    "minimax_d": lambda r, f: mean(map(minus_log_sigmoid, r)) + mean(minus_log_sigmoid(-x) for x in f),
    "nonsaturating_g": lambda f: mean(map(minus_log_sigmoid, f)),
    "hinge_d": hinge,
    "rahinge": lambda r, f: hinge([x - mean(f) for x in r], [x - mean(r) for x in f]),
    "rpgan": lambda r, f: mean(minus_log_sigmoid(a - b) for a, b in zip(r, f, strict=True)),
}


@pytest.mark.parametrize("name, formula", LOSSES.items())
def test_losses_are_their_formulas_and_finite_at_extreme_scores(name, formula):
    scores = 2 * torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = scores[:formula.__code__.co_argcount]
    loss = getattr(losses, name)
    assert loss(*scores).item() == pytest.approx(formula(*scores.tolist()), rel=1e-12)
    assert all(loss(*sign * torch.tensor([[1e4], [-1e4]])[:len(scores)]).isfinite() for sign in (1, -1))


def test_the_relativistic_hinge_takes_another_mean():
    first, second = torch.tensor([0.5, -0.2]), torch.tensor([0.1, 0.3])
    found = losses.rahinge(first, second, mean=lambda scores: scores.sum() + 1)
    assert found.item() == pytest.approx(hinge([0.5 - 1.4, -0.2 - 1.4], [0.1 - 1.3, 0.3 - 1.3]))


def test_the_classifier_s_loss_is_the_cross_entropy_of_all_classes():
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.3, 0.1, -0.4]], dtype=torch.float64)
    found = losses.aux_classification_loss(logits, torch.tensor([[0, 2, 3], [1, 3, 3]]))  # 3: no label
    (a, b, c), (d, e, f) = logits.tolist()
    assert found.item() == pytest.approx(mean(map(minus_log_sigmoid, (a, -b, c, -d, e, -f))), rel=1e-6)


class Critic(nn.Module):
    """w·x² / 2 + u·x per pixel: its gradient is w·x + u, known at every point."""

    def __init__(self, *shape):
        super().__init__()
        w, u = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.w, self.u = nn.Parameter(w), nn.Parameter(u)

    def forward(self, x):
        self.points = x.detach()
        return (self.w * x.square() / 2 + self.u * x).flatten(1).sum(1)

    def norms(self, w):
        """‖∇‖₂ over all the pixels and channels of each point, written out, if D's weights were w."""
        gradients = (w * self.points + self.u).flatten(1).tolist()
        return [math.sqrt(sum(v * v for v in row)) for row in gradients]


def setting():
    """A critic of fp64 weights, five real images and five generated ones."""
    g = torch.Generator().manual_seed(1)
    return Critic(3, 4, 4), *(torch.randn(5, 3, 4, 4, generator=g) for _ in range(2))


GAMMA = 0.7
PENALTIES = {  # of a critic, real and generated images; of the gradients' norms, first real images' if both
    "wgan-gp": (wgan_gp, lambda n: mean((x - 1) ** 2 for x in n)),
    "wgan-div": (wgan_div, lambda n: 2 * mean(x**6 for x in n)),
    "wgan-div-3-4": (lambda *a: wgan_div(*a, k=3, p=4), lambda n: 3 * mean(x**4 for x in n)),
    "γ/2 (R1 + R2)": (lambda D, real, fake: GAMMA * losses.r1r2_penalty(D, torch.cat([real, fake])),
                      lambda n: GAMMA / 2 * (mean(x**2 for x in n[:5]) + mean(x**2 for x in n[5:]))),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_and_their_slopes_are_their_formulas(name):
    (penalty, formula), (critic, real, fake) = PENALTIES[name], setting()
    state = torch.get_rng_state()
    found = penalty(critic, real, fake)
    if "wgan" in name:  # on the lines between the pairs, each at a share of its own, the same for all pixels
        line = fake - real
        share = ((critic.points - real) * line).sum((1, 2, 3)) / line.square().sum((1, 2, 3))
        torch.testing.assert_close(critic.points, torch.lerp(real, fake, share.view(-1, 1, 1, 1)))
        assert ((0 < share) & (share < 1)).all() and share.std() > 0.05
    else:  # at the images themselves, which takes no random numbers
        assert torch.equal(critic.points, torch.cat([real, fake]))
        assert torch.equal(torch.get_rng_state(), state)
    assert found.item() == pytest.approx(formula(critic.norms(critic.w)), rel=1e-5)
    # the slope by D's weights, which is what D learns by, against differences
    found.backward()
    step, at, values = 1e-6, (0, 1, 2), []
    for sign in (1, -1):
        w = critic.w.detach().clone()
        w[at] += sign * step
        values.append(formula(critic.norms(w)))
    assert critic.w.grad[at].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_safe_where_the_gradient_is_zero_and_in_fp32_under_autocast(name):
    penalty, (critic, real, fake) = PENALTIES[name][0], setting()
    nn.init.zeros_(critic.w), nn.init.zeros_(critic.u)
    found = penalty(critic, real, fake)
    found.backward()
    assert found.item() == (name == "wgan-gp")
    assert critic.w.grad.isfinite().all() and critic.u.grad.isfinite().all()
    torch.manual_seed(0)
    D, types = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)), set()
    for layer in D:
        layer.register_forward_hook(lambda _m, _i, output: types.add(output.dtype))
    plain = penalty(D, real, fake)
    with torch.autocast("cpu", torch.bfloat16):
        D(real)  # autocast is at work
        assert torch.bfloat16 in types
        types.clear()
        found = penalty(D, real, fake.bfloat16())
    assert types == {torch.float32} and found.dtype == torch.float32
    assert found.item() == pytest.approx(plain.item(), rel=0.02)
