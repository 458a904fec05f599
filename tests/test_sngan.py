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


def steps(**fields) -> tuple[dict, dict, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """What a step of D and one of G return, the real images, and D's inputs and scores in both."""
    torch.manual_seed(0)
    cfg = Config(**TINY["sngan_iclevr"] | fields)
    G = sngan_iclevr.Generator(24, cfg.z_dim, cfg.ch, 32)
    D = sngan_iclevr.Discriminator(24, cfg.ch, 32, cfg.label_embed)
    real, labels, inputs, scores = torch.rand(16, 3, 32, 32) * 2 - 1, torch.randint(25, (16, 3)), [], []
    D.register_forward_hook(lambda _, args, score: (inputs.append(args[0]), scores.append(score.detach())))
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), 1e-3) for net in (D, G))
    before = [p.clone() for p in G.parameters()]
    d = sngan_iclevr.d_step(cfg, G, D, opt_d, real, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, G.parameters(), strict=True))
    after = [p.clone() for p in D.parameters()]
    g = sngan_iclevr.g_step(cfg, G, D, opt_g, real, labels)
    assert all(torch.equal(a, b) for a, b in zip(after, D.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, G.parameters(), strict=True))
    return d, g, real, inputs, scores


def test_losses_are_hinges_and_relativistic_ones_swap_roles_for_g():
    def hinge(a, b):
        return F.relu(1 - a).mean() + F.relu(1 + b).mean()
    d, g, _, _, (both, of_g) = steps()
    real, fake = both.chunk(2)
    torch.testing.assert_close((d["d_loss"], g["g_loss"]), (hinge(real, fake), -of_g.mean()))
    flipped = steps(flip_labels=1.0)[0]["d_loss"]
    torch.testing.assert_close(flipped, hinge(fake, real), atol=0.01, rtol=0)  # other noise
    assert not torch.isclose(flipped, d["d_loss"], atol=0.02)
    d, g, _, _, (both, of_g, of_real) = steps(relativistic=True)
    real, fake = both.chunk(2)
    torch.testing.assert_close(d["d_loss"], hinge(real - fake.mean(), fake - real.mean()))
    torch.testing.assert_close(g["g_loss"], hinge(of_g - of_real.mean(), of_real - of_g.mean()))


@pytest.mark.parametrize("add_noise", [True, False])
def test_noise_is_added_to_all_that_d_is_given(add_noise):
    _, _, real, (of_d, of_g, again), _ = steps(add_noise=add_noise, relativistic=True)
    for noise in (of_d[:16] - real, again - real):
        assert 0 <= noise.min() + 1e-6 and noise.max() <= 1 / 128 + 1e-6
        assert noise.mean().item() == pytest.approx(add_noise / 256, rel=0.02, abs=1e-6)
    assert (of_d[16:].max() <= 1 and of_g.max() <= 1) or add_noise


def test_a_folder_of_the_real_layout_trains_to_the_end(here, iclevr):
    folder = run_here("sngan_iclevr", iters=2, data=str(iclevr), batch_size=4, judge="none", save_every=0)
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 2
    assert (folder / "interpolation.png").exists() and not (folder / "best.pt").exists()


def test_bad_values(refuses):
    refuses("sngan_iclevr", "--flip-labels", "1.1", message="--flip-labels 1.1: must be at most 1")
    refuses("sngan_iclevr", "--label-embed", "mean", message="invalid choice")
    refuses("sngan_iclevr", "--device", "cuda:99", message="cuda:99 is not available")
