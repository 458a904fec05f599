"""SNGAN: its tricks, its schedule, and what stays exactly zero through training."""
import pytest
import torch
import torch.nn.functional as F

import sngan_iclevr
from tests.conftest import TINY, run_here

Config = sngan_iclevr.Config


def test_null_rows_stay_exactly_zero_through_training(here):
    state = torch.load(run_here("sngan_iclevr", iters=5, judge="none") / "last.pt", weights_only=True)
    tables = {name: table for name, table in state["G"].items()
              if name.endswith(("gain.weight", "bias.weight")) and len(table) == 25}
    assert len(tables) == 2 * 2 * 3  # two tables in two norms of three blocks
    tables["D"] = state["D"]["embed.parametrizations.weight.original"]
    for name, table in tables.items():
        assert not table[24].any() and table[:24].any(), name


def test_rates_decay_to_the_end_and_the_sum_needs_no_joining_layer(here):
    folder = run_here("sngan_iclevr", iters=4, judge="none", lr_decay_from=2, label_embed="sum")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert "join.weight" not in state["D"]
    for opt, rate in (("opt_g", 3e-4), ("opt_d", 1e-4)):  # the last of two decaying steps
        assert state[opt]["param_groups"][0]["lr"] == pytest.approx(rate / 2)


def steps(**fields) -> tuple[dict, dict, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What a step of D and one of G return, the real images, and D's (images, scores) in both."""
    torch.manual_seed(0)
    cfg = Config(**TINY["sngan_iclevr"] | fields)
    G = sngan_iclevr.Generator(24, cfg.z_dim, cfg.ch, 32)
    D = sngan_iclevr.Discriminator(24, cfg.ch, 32, cfg.label_embed)
    real, labels, calls = torch.rand(16, 3, 32, 32) * 2 - 1, torch.randint(25, (16, 3)), []
    D.register_forward_hook(lambda _, args, score: calls.append((args[0], score.detach())))
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), 1e-3) for net in (D, G))
    d = sngan_iclevr.d_step(cfg, G, D, opt_d, real, labels)
    assert opt_d.state and all(p.grad is None for p in G.parameters())
    D.zero_grad()
    g = sngan_iclevr.g_step(cfg, G, D, opt_g, real, labels)
    assert opt_g.state and all(p.grad is None for p in D.parameters())
    return d, g, real, calls


def hinge(real, fake):
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def test_losses_are_hinges_and_relativistic_ones_swap_roles_for_g():
    d, g, _, [(_, both), (_, of_g)] = steps()
    real, fake = both.chunk(2)
    torch.testing.assert_close((d["d_loss"], g["g_loss"]), (hinge(real, fake), -of_g.mean()))
    d, _, _, [(_, both), _] = steps(flip_labels=1.0)
    torch.testing.assert_close(d["d_loss"], hinge(*both.chunk(2)[::-1]))
    d, g, _, [(_, both), (_, of_g), (_, of_real)] = steps(relativistic=True)
    real, fake = both.chunk(2)
    torch.testing.assert_close(d["d_loss"], hinge(real - fake.mean(), fake - real.mean()))
    torch.testing.assert_close(g["g_loss"], hinge(of_g - of_real.mean(), of_real - of_g.mean()))


def test_flipped_labels_swap_the_target_of_single_images(monkeypatch):
    chosen, rand = torch.ones(2, 16), torch.rand
    chosen[0, 3] = chosen[1, 7] = 0  # below the share: flipped
    monkeypatch.setattr(torch, "rand", lambda *s, **o: chosen if s == (2, 16) else rand(*s, **o))
    d, _, _, [(_, both), _] = steps(flip_labels=0.1)
    real, fake = both.chunk(2)
    real[3], fake[7] = -real[3], -fake[7]
    torch.testing.assert_close(d["d_loss"], hinge(real, fake))


@pytest.mark.parametrize("add_noise", [True, False])
def test_noise_is_added_to_all_that_d_is_given(add_noise):
    _, _, real, [(of_d, _), (of_g, _), (again, _)] = steps(add_noise=add_noise, relativistic=True)
    for noise in (of_d[:16] - real, again - real):
        assert -1e-6 < noise.min() and noise.max() < 1 / 128 + 1e-6
        assert noise.mean().item() == pytest.approx(add_noise / 256, rel=0.02, abs=1e-6)


def test_bad_values(refuses):
    refuses("sngan_iclevr", "--flip-labels", "1.1", message="--flip-labels 1.1: must be at most 1")
    refuses("sngan_iclevr", "--label-embed", "mean", message="invalid choice")
    refuses("sngan_iclevr", "--device", "cuda:99", message="cuda:99 is not available")
