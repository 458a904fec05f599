"""ACGAN on faces: where the attributes enter, every variant of the loss, requested attributes, pictures."""
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize

import acgan_celeba
from common.datasets import load_faces
from synthetic import faces
from tests.conftest import TINY, run_here, settings


def networks(n=15, **fields):
    torch.manual_seed(0)
    cfg = acgan_celeba.Config(**{"ch": 2, "z_dim": 4, "image_size": 64, **fields})
    return (acgan_celeba.Generator(n, cfg.z_dim, cfg.ch, cfg.image_size, cfg.g_cond),
            acgan_celeba.Discriminator(n, cfg.ch, cfg.image_size, cfg.d_norm, cfg.d_cond))


def labels(n):
    return faces.render(n, 8)[1].float()


def test_the_networks_are_the_report_s():
    G, D = networks(ch=32, z_dim=128, image_size=128)
    assert G.first.weight.shape == (512 * 4 * 4, 128 + 15)
    widths = [512, 256, 128, 64, 32, 3]
    assert [conv.weight.shape for conv in G.convs] == [(i + 15, o, 4, 4) for i, o in pairwise(widths)]
    assert [conv.weight.shape[:2] for conv in D.convs] == [(o, i) for i, o in pairwise(widths[::-1])]
    for conv in [*G.convs, *D.convs]:
        assert conv.stride == (2, 2) and conv.padding == (1, 1)
    assert [type(norm) for norm in D.norms] == [nn.Identity] + [nn.BatchNorm2d] * 4
    assert D.score.in_features == 512 * 4 * 4 + 15 and D.attributes.weight.shape == (15, 512 * 4 * 4)
    images = G(torch.randn(2, 128), labels(2))
    assert images.shape == (2, 3, 128, 128) and images.abs().max() <= 1
    score, logits = D(images, labels(2))
    assert score.shape == (2,) and logits.shape == (2, 15)


@pytest.mark.parametrize("cond", ["concat", "projection"])
def test_spectral_norm_bounds_all_that_the_score_passes(cond):
    _, D = networks(d_norm="spectral", d_cond=cond)
    for _ in range(30):
        D(torch.zeros(1, 3, 64, 64), labels(1))  # power iterations
    for layer in [*D.convs, D.score, *([D.embed] if cond == "projection" else [])]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)
        raw = layer.parametrizations.weight.original  # initialised before it was wrapped
        assert raw.std().item() == pytest.approx(0.02, rel=0.3)
    assert not parametrize.is_parametrized(D.attributes)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in D.modules())


@pytest.mark.parametrize("cond", ["maps", "input"])
def test_the_condition_enters_every_layer_of_g_as_maps_and_only_the_first_as_input(cond):
    (G, _), y, z, inputs = networks(g_cond=cond), labels(6), torch.randn(6, 4), []
    for layer in (G.first, *G.convs):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    G(z, y)
    assert torch.equal(inputs[0], torch.cat([z, y], 1))
    for h, width in zip(inputs[1:], (32, 16, 8, 4), strict=True):
        assert h.shape[1] == width + (15 if cond == "maps" else 0)
        if cond == "maps":
            assert torch.equal(h[:, width:], y[:, :, None, None].expand(-1, -1, *h.shape[2:]))


@pytest.mark.parametrize("cond", ["concat", "projection"])
def test_concat_shifts_the_score_and_projection_weighs_the_features(cond):
    (_, D), x, y, features = networks(d_cond=cond), torch.randn(5, 3, 64, 64), labels(5), []
    D.attributes.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    (one, logits), (other, again) = D(x, y), D(x, y.roll(1, 1))
    assert torch.equal(logits, again)  # the attributes' logits are of the features alone
    if cond == "concat":
        shift = (y.roll(1, 1) - y) @ D.score.weight[0, -15:]
        torch.testing.assert_close(other - one, shift)
    else:
        h = features[0]
        expected = D.score(h)[:, 0] + torch.einsum("na,fa,nf->n", y, D.embed.weight, h)
        torch.testing.assert_close(one, expected)


VARIANTS = [*acgan_celeba.VARIANTS.values(), dict(loss="rpgan", d_norm="none", d_cond="projection"),
            dict(loss="rpgan", g_cond="input"), dict(loss="wgan-div", d_norm="spectral")]


def steps(**fields) -> tuple:
    """What one step of D and one of G return, D, the attributes, and (images, scores, logits) of D's calls."""
    cfg = acgan_celeba.Config(**TINY["acgan_celeba"] | dict(aux_weight=3.0, precision="fp32") | fields)
    _, D = networks(ch=1, image_size=32, d_norm=cfg.d_norm, d_cond=cfg.d_cond)
    real, fake, y, calls = *(torch.rand(2, 16, 3, 32, 32) * 2 - 1), labels(16), []
    fake.requires_grad_()
    D.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0].detach(), *out)))
    d = acgan_celeba.d_step(D, torch.optim.Adam(D.parameters(), 1e-3), real, fake.detach(), y, cfg)
    g = acgan_celeba.g_step(D, torch.optim.Adam([fake], 1e-3), real, fake, y, cfg)
    return d, g, D, y, calls


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_variant_s_loss_is_its_parts(variant):
    d, g, D, y, [(x, real, logits), (_, fake, _), *penalised] = steps(**variant)
    loss, aux = variant.get("loss", "wgan-gp"), F.binary_cross_entropy_with_logits
    of_real = penalised.pop() if loss == "rpgan" else None  # G's step has real images, too
    of_g = penalised.pop()
    if loss == "rpgan":
        assert torch.equal(of_real[0], x)
        for_d, for_g = F.softplus(fake - real).mean(), F.softplus(of_real[1] - of_g[1]).mean()
    else:
        for_d, for_g = fake.mean() - real.mean(), -of_g[1].mean()
    torch.testing.assert_close((d["aux_real"], g["aux_fake"]), (aux(logits, y), aux(of_g[2], y)))
    torch.testing.assert_close(d["d_loss"], for_d + d["penalty"] + 3 * d["aux_real"])
    torch.testing.assert_close(g["g_loss"], for_g + 3 * g["aux_fake"])
    assert [len(images) for images, *_ in penalised] == {"wgan-clip": [], "rpgan": [4]}.get(loss, [16])
    assert (d["penalty"] > 0) == (loss != "wgan-clip")
    critic, attributes = (max(p.abs().max().item() for name, p in D.named_parameters()
                              if name.startswith("attributes") == of) for of in (False, True))
    assert critic == pytest.approx(0.01) if loss == "wgan-clip" else critic > 0.03
    assert attributes > 0.03  # never clipped


def test_the_penalties_weights_are_settings():
    for fields in (dict(gp_weight=10.0), dict(loss="rpgan", gamma=0.5)):
        twice = {name: 2 * value if name != "loss" else value for name, value in fields.items()}
        assert steps(**twice)[0]["penalty"].item() == pytest.approx(2 * steps(**fields)[0]["penalty"].item())


def test_labels_are_requested_evenly_in_groups_and_else_as_they_are(here):
    data, g = load_faces(settings(n_synthetic=300)), torch.Generator().manual_seed(0)
    y = acgan_celeba.sample_attributes(data, 14400, g)
    combinations, counts = y.unique(dim=0, return_counts=True)
    assert len(combinations) == 144 and 60 < counts.min() and counts.max() < 145
    for columns in data.groups:
        assert (y[:, list(columns)].sum(1) == 1).all()
    brown = acgan_celeba.set_attribute(y[:50], 2, 1, data)  # brown hair
    assert (brown[:, :6] == F.one_hot(torch.tensor(2), 6)).all() and torch.equal(brown[:, 6:], y[:50, 6:])
    some = load_faces(settings(n_synthetic=300, attributes="with glasses,blue hair"))
    assert some.groups == ()  # blue hair alone is not a group
    y = acgan_celeba.sample_attributes(some, 6000, g)
    torch.testing.assert_close(y.mean(0), some.labels.mean(0), atol=0.03, rtol=0)
    without = acgan_celeba.set_attribute(y[:50], 1, 0, some)
    assert not without[:, 1].any() and torch.equal(without[:, 0], y[:50, 0])


def test_pictures_show_each_attribute(here):
    folder = run_here("acgan_celeba", iters=1)
    with Image.open(folder / "attributes.png") as grid:
        assert grid.width > 8 * 66 + 60 and grid.height > 15 * 66
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert scores["n_real"] == 30 and list(scores["summary"]) == ["FD (judge)", "accuracy", "exact"]
    rows = [scores[name] for name in ("training images", "their labels shuffled", "best", "last")]
    assert [len(row["by attribute"][0]) for row in rows] == [4] * 4
    folder = run_here("acgan_celeba", judge="none", iters=1, attributes="with glasses,blue hair")
    with Image.open(folder / "attributes.png") as grid:
        assert grid.height < 3 * 66 + 60
