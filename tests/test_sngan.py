"""SNGAN: its losses and tricks, its schedule, and what stays exactly zero through training."""
import pytest
import torch
import torch.nn.functional as F

import sngan_iclevr
from tests.conftest import TINY, run_here


def test_null_rows_stay_exactly_zero_and_rates_fall_to_the_end(here):
    state = torch.load(run_here("sngan_iclevr", iters=4, judge="none", lr_decay_from=2) / "last.pt")
    tables = {name: table for name, table in state["G"].items()
              if name.endswith(("gain.weight", "bias.weight")) and len(table) == 25}
    assert len(tables) == 2 * 2 * 3  # two tables in two norms of three blocks
    tables["D"] = state["D"]["embed.parametrizations.weight.original"]
    for name, table in tables.items():
        assert not table[24].any() and table[:24].any(), name
    for opt, rate in (("opt_g", 3e-4), ("opt_d", 1e-4)):  # the last of two decaying steps
        assert state[opt]["param_groups"][0]["lr"] == pytest.approx(rate / 2)


def steps(n: int = 16, **fields) -> tuple:
    """What both steps return, and D's (images, scores, logits) at each call; D's step draws from seed 1."""
    torch.manual_seed(0)
    cfg = sngan_iclevr.Config(**TINY["sngan_iclevr"] | dict(precision="fp32") | fields)
    D = sngan_iclevr.Discriminator(24, 2, 32, cfg.d_net, cfg.d_norm, cfg.label_embed, cfg.aux_weight > 0)
    real, fake, calls = torch.rand(n, 3, 32, 32) * 2 - 1, torch.rand(n, 3, 32, 32, requires_grad=True), []
    y = torch.rand(n, 24).argsort(1)[:, :3]
    y[:5, 1:] = 24
    D.register_forward_hook(lambda _, args, out: calls.append((args[0].detach(), *out)))
    torch.manual_seed(1)
    d = sngan_iclevr.d_step(D, torch.optim.Adam(D.parameters(), 1e-3), real, fake.detach(), y, cfg)
    g = sngan_iclevr.g_step(D, torch.optim.Adam([fake], 1e-3), real, fake, y, cfg)
    return d, g, y, calls


def hinge(real, fake):
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def rahinge(one, other):
    return hinge(one - other.mean(), other - one.mean())


def pairing(one, other):
    return F.softplus(other - one).mean()


@pytest.mark.parametrize("flip", [0.0, 0.3])
@pytest.mark.parametrize("loss, formula", [("hinge", hinge), ("rahinge", rahinge), ("rpgan", pairing)])
def test_losses_are_their_formulas_and_relativistic_ones_swap_roles_for_g(loss, formula, flip):
    d, g, _, [(_, both, _), *of_g] = steps(loss=loss, flip_labels=flip)
    torch.manual_seed(1)
    swapped = torch.rand(16) < flip  # in D's step, the targets of these pairs
    assert swapped.any() == (flip > 0)
    real, fake = torch.where(swapped, both.view(2, 16).flip(0), both.view(2, 16))
    torch.testing.assert_close(d["d_loss"], formula(real, fake))
    scores = [score for _, score, _ in of_g]
    torch.testing.assert_close(g["g_loss"], -scores[0].mean() if loss == "hinge" else formula(*scores))
    assert len(scores) == 1 + (loss != "hinge")  # then of real images


@pytest.mark.parametrize("n", [16, 4])  # 4: such as a process's share
def test_penalty_and_classifier_are_their_formulas(n):
    d, g, y, [(given, both, logits), (x, of_x, _), (_, of_g, logits_g), (_, of_real, _)] = steps(
        n, loss="rpgan", gamma=0.5, aux_weight=3.0, d_net="cnn", d_norm="none")
    target = torch.zeros(n, 25).scatter_(1, y, 1)[:, :24]
    aux = F.binary_cross_entropy_with_logits(logits[:n], target)  # of real images only
    torch.testing.assert_close(d["aux_real"], aux)
    some = given.unflatten(0, (2, n))[:, ::8]  # an eighth, rounded up, of each kind
    assert torch.equal(x, some.flatten(0, 1))
    torch.testing.assert_close(d["d_loss"], pairing(*both.chunk(2)) + 0.5 * d["penalty"] + 3 * aux)
    aux = F.binary_cross_entropy_with_logits(logits_g, target)
    torch.testing.assert_close(g["g_loss"], pairing(of_g, of_real) + 3 * aux)


@pytest.mark.parametrize("add_noise", [True, False])
def test_noise_is_added_to_all_that_d_is_given(here, monkeypatch, add_noise):
    before, given = [], []
    monkeypatch.setattr(sngan_iclevr, "random_flip_translate", lambda x, share: before.append(x) or x)
    monkeypatch.setattr(sngan_iclevr, "d_step", lambda *args: given.extend(args[2:4]) or {})
    monkeypatch.setattr(sngan_iclevr, "g_step", lambda *args: {})
    monkeypatch.setattr(sngan_iclevr.evaluator, "finish", lambda *args, **options: {})
    run_here("sngan_iclevr", iters=1, judge="none", sample_every=0, add_noise=add_noise)
    for x, noisy in zip(before, given, strict=True):
        noise = noisy - x
        assert -1e-6 < noise.min() and noise.max() < 1 / 128 + 1e-6
        assert noise.mean().item() == pytest.approx(add_noise / 256, rel=0.02, abs=1e-6)
