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


def steps(n: int = 16, **fields) -> tuple[dict, dict, tuple, list[tuple[torch.Tensor, ...]]]:
    """What both steps return, the real images with labels, and D's (images, scores, logits) at each call."""
    torch.manual_seed(0)
    cfg = Config(**TINY["sngan_iclevr"] | fields)
    G = sngan_iclevr.Generator(24, cfg.z_dim, cfg.ch, 32)
    D = sngan_iclevr.Discriminator(24, cfg.ch, 32, cfg.d_net, cfg.d_norm, cfg.label_embed)
    real, calls = torch.rand(n, 3, 32, 32) * 2 - 1, []
    labels = torch.rand(n, 24).argsort(1)[:, :3]
    labels[:5, 1:] = 24
    D.register_forward_hook(lambda _, args, out: calls.append((args[0], *(x.detach() for x in out))))
    opt_d, opt_g = (torch.optim.Adam(net.parameters(), 1e-3) for net in (D, G))
    d = sngan_iclevr.d_step(cfg, G, D, opt_d, real, labels)
    assert opt_d.state and all(p.grad is None for p in G.parameters())
    D.zero_grad()
    g = sngan_iclevr.g_step(cfg, G, D, opt_g, real, labels)
    assert opt_g.state and all(p.grad is None for p in D.parameters())
    return d, g, (real, labels), calls


def hinge(real, fake):
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def test_losses_are_hinges_and_relativistic_ones_swap_roles_for_g():
    d, g, _, [(_, both, _), (_, of_g, _)] = steps()
    real, fake = both.chunk(2)
    torch.testing.assert_close((d["d_loss"], g["g_loss"]), (hinge(real, fake), -of_g.mean()))
    d, g, _, [(_, both, _), (_, of_g, _), (_, of_real, _)] = steps(loss="relativistic")
    real, fake = both.chunk(2)
    torch.testing.assert_close(d["d_loss"], hinge(real - fake.mean(), fake - real.mean()))
    torch.testing.assert_close(g["g_loss"], hinge(of_g - of_real.mean(), of_real - of_g.mean()))


def test_pairs_penalty_and_classifier_are_their_formulas():
    d, g, (_, labels), [(given, both, logits), (x, _, _), (_, of_g, logits_g), (_, of_real, _)] = steps(
        loss="paired", gamma=0.5, aux_weight=3.0, d_net="cnn", d_norm="none")
    real, fake = both.chunk(2)
    target = torch.zeros(16, 25).scatter_(1, labels, 1)[:, :24]
    of_real_images = F.binary_cross_entropy_with_logits(logits[:16], target)
    torch.testing.assert_close(d["aux_real"], of_real_images)
    assert len(x) == 4 and torch.equal(x, given[::8])  # an eighth of the real and of the generated images
    pairs = F.softplus(fake - real).mean()
    torch.testing.assert_close(d["d_loss"], pairs + 0.5 * d["penalty"] + 3 * of_real_images)
    of_fake_images = F.binary_cross_entropy_with_logits(logits_g, target)
    torch.testing.assert_close(g["g_loss"], F.softplus(of_real - of_g).mean() + 3 * of_fake_images)


@pytest.mark.parametrize("net, norm", [("resnet", "none"), ("cnn", "spectral"), ("cnn", "none")])
def test_every_kind_of_d_scores_at_every_size(net, norm):
    for size in (32, 64, 128):
        D = sngan_iclevr.Discriminator(24, 2, size, net, norm, "sum")
        scores, logits = D(torch.rand(2, 3, size, size), torch.tensor([[0, 24, 24], [1, 2, 3]]))
        assert scores.shape == (2,) and logits.shape == (2, 24)
        normed = [name for name, _ in D.named_parameters() if "original" in name]
        assert len(normed) == (norm == "spectral") * (len(D.layers) // 2 + 3)


def test_flipped_labels_swap_the_target_of_single_images(monkeypatch):
    chosen, rand = torch.ones(2, 16), torch.rand
    chosen[0, 3] = chosen[1, 7] = 0  # below the share: flipped
    monkeypatch.setattr(torch, "rand", lambda *s, **o: chosen if s == (2, 16) else rand(*s, **o))
    d, _, _, [(_, both, _), _] = steps(flip_labels=0.1)
    real, fake = both.chunk(2)
    real[3], fake[7] = -real[3], -fake[7]
    torch.testing.assert_close(d["d_loss"], hinge(real, fake))


def test_flipped_pairs_are_swapped_as_pairs():
    scores = torch.randn(2, 99)
    for offset in (0.0, 20.0):  # which no pair's loss may depend on
        torch.manual_seed(0)
        flipped = sngan_iclevr.adversarial("paired", *(scores + offset), flip=0.3)
        torch.manual_seed(0)
        swapped = torch.rand(1, 99) < 0.3
        real, fake = torch.where(swapped, scores.flip(0), scores)
        torch.testing.assert_close(flipped, F.softplus(fake - real).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("add_noise", [True, False])
def test_noise_is_added_to_all_that_d_is_given(add_noise):
    _, _, (real, _), [(of_d, *_), (of_g, *_), (again, *_)] = steps(add_noise=add_noise, loss="relativistic")
    for noise in (of_d[:16] - real, again - real):
        assert -1e-6 < noise.min() and noise.max() < 1 / 128 + 1e-6
        assert noise.mean().item() == pytest.approx(add_noise / 256, rel=0.02, abs=1e-6)


def test_d_may_be_given_mirrored_images_shifted_by_whole_pixels():
    x = torch.rand(99, 3, 16, 16) * 2 - 1
    given, found = sngan_iclevr.perturbed(x, add_noise=False, augment=0.125), []
    for image, source in zip(given, x, strict=True):
        found += [(mirrored, i, j) for mirrored, whole in enumerate((source, source.flip(2)))
                  for i in range(5) for j in range(5)
                  if torch.allclose(image[:, 2:-2, 2:-2], whole[:, i:i + 12, j:j + 12], atol=1e-4)]
    assert len(found) == 99 and {i for _, i, _ in found} == {j for *_, j in found} == set(range(5))
    assert 30 < sum(mirrored for mirrored, *_ in found) < 70
    assert x.min() <= given.min() and given.max() <= x.max()  # the edge is repeated outwards
    _, _, (real, _), calls = steps(add_noise=False, augment=0.25)
    assert not any((images[:16] == real).all() for images, *_ in calls)


def test_few_images_are_penalised_by_both_kinds():
    _, _, _, [(given, _, _), (penalised, _, _), *_] = steps(n=4, gamma=0.5)  # such as a process's share
    assert torch.equal(penalised, given[[0, 4]])
