"""SNGAN: its tricks, its schedule, and what stays exactly zero through training."""
import pytest
import torch

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


def step_losses(**fields) -> tuple[dict, dict]:
    """One step of D and one of G with tiny networks, from one seed."""
    torch.manual_seed(0)
    cfg = Config(**TINY["sngan_iclevr"] | fields)
    G = sngan_iclevr.Generator(24, cfg.z_dim, cfg.ch, 32)
    D = sngan_iclevr.Discriminator(24, cfg.ch, 32, cfg.label_embed)
    real, labels = torch.rand(16, 3, 32, 32) * 2 - 1, torch.randint(25, (16, 3))
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), 1e-3) for net in (D, G))
    before = [p.clone() for p in G.parameters()]
    d = sngan_iclevr.d_step(cfg, G, D, opt_d, real, labels)
    assert all(torch.equal(a, b) for a, b in zip(before, G.parameters(), strict=True))
    after = [p.clone() for p in D.parameters()]
    g = sngan_iclevr.g_step(cfg, G, D, opt_g, real, labels)
    assert all(torch.equal(a, b) for a, b in zip(after, D.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, G.parameters(), strict=True))
    return {k: v.item() for k, v in d.items()}, {k: v.item() for k, v in g.items()}


def test_losses_are_hinges_and_each_trick_changes_them():
    d, g = step_losses()
    assert d["d_loss"] == pytest.approx(2 - d["d_real"] + d["d_fake"], abs=1e-4)  # scores within ±1
    for trick in (dict(add_noise=False), dict(flip_labels=0.5), dict(relativistic=True)):
        other_d, other_g = step_losses(**trick)
        assert other_d["d_loss"] != d["d_loss"], trick
    assert other_g["g_loss"] == pytest.approx(2, abs=0.2) != g["g_loss"]  # relativistic: hinges of both
    flipped, _ = step_losses(flip_labels=1.0)
    assert flipped["d_loss"] == pytest.approx(2 + flipped["d_real"] - flipped["d_fake"], abs=1e-4)


def test_a_folder_of_the_real_layout_trains_to_the_end(here, iclevr):
    folder = run_here("sngan_iclevr", iters=2, data=str(iclevr), batch_size=4, judge="none", save_every=0)
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 2
    assert (folder / "interpolation.png").exists() and not (folder / "best.pt").exists()


def test_bad_values(refuses, iclevr, tmp_path):
    net = sngan_iclevr.evaluator.JudgeNet(23, 8)
    torch.save({"model": net.state_dict()}, tmp_path / "judge.pth")
    base = ["--data", iclevr, "--batch-size", "4", "--image-size", "32", "--ch", "2"]
    refuses("sngan_iclevr", *base, "--judge", "judge.pth", message="has 23 classes, the data has 24")
    refuses("sngan_iclevr", *base, "--batch-size", "19", message="more than the 18 training images")
    refuses("sngan_iclevr", *base, "--out", "judge.pth/run", message="is not a writable folder")
    refuses("sngan_iclevr", "--image-size", "48", message="invalid choice")
    refuses("sngan_iclevr", "--device", "cuda:99", message="cuda:99 is not available")
