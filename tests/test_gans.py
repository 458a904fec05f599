"""What single GAN scripts have of their own: rates, noise, targets, clipping, attributes, pictures."""
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import acgan_celeba
import cdcgan_iclevr
import evaluator
import sngan_iclevr
from common.datasets import Data, load_faces
from tests.conftest import run_here, settings
from tests.test_networks import SCRIPTS

# ---------------------------------------------------------------------- i-CLEVR

def test_sngan_s_null_rows_stay_exactly_zero_and_rates_fall_to_the_end(here):
    state = torch.load(run_here("sngan_iclevr", iters=4, judge="none", lr_decay_from=2) / "last.pt")
    tables = {name: table for name, table in state["G"].items()
              if name.endswith(("gain.weight", "bias.weight")) and len(table) == 25}
    assert len(tables) == 2 * 2 * 3  # two tables in two norms of three blocks
    tables["D"] = state["D"]["embed.parametrizations.weight.original"]
    for name, table in tables.items():
        assert not table[24].any() and table[:24].any(), name
    for opt, rate in (("opt_g", 3e-4), ("opt_d", 1e-4)):  # the last of two decaying steps
        assert state[opt]["param_groups"][0]["lr"] == pytest.approx(rate / 2)


@pytest.mark.parametrize("add_noise", [True, False])
def test_sngan_s_noise_is_added_to_all_that_d_is_given(here, monkeypatch, add_noise):
    before, given = [], []
    monkeypatch.setattr(sngan_iclevr.blocks, "random_translate", lambda x, share: before.append(x) or x)
    monkeypatch.setattr(sngan_iclevr, "d_step", lambda *args: given.extend(args[2:4]) or {})
    monkeypatch.setattr(sngan_iclevr, "g_step", lambda *args: {})
    monkeypatch.setattr(evaluator, "finish", lambda *args, **options: {})
    run_here("sngan_iclevr", iters=1, judge="none", sample_every=0, add_noise=add_noise)
    for x, noisy in zip(before, given, strict=True):
        noise = noisy - x
        assert -1e-6 < noise.min() and noise.max() < 1 / 128 + 1e-6
        assert noise.mean().item() == pytest.approx(add_noise / 256, rel=0.02, abs=1e-6)


def test_cdcgan_s_smooth_and_flipped_targets_have_the_report_s_ranges():
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


@pytest.mark.parametrize("name, fields", [
    ("dcgan_mnist", {}), ("acgan_celeba", dict(n_dis=1)), ("cdcgan_iclevr", dict(halve_every=2))])
def test_rates_fall_as_the_settings_say(here, monkeypatch, name, fields):
    rates = {"d_step": [], "g_step": []}
    for step in rates:
        monkeypatch.setattr(SCRIPTS[name], step, lambda D, opt, *args, step=step: (
            rates[step].append(opt.param_groups[0]["lr"]) or {}))
    run_here(name, judge="none", sample_every=0, iters=37, lr_g=8e-3, lr_d=4e-3, lr_decay_from=33, **fields)
    epochs = [0.5 ** (step // 18) if "halve_every" in fields else 1 for step in range(37)]  # of 9 batches
    expected = [share * epoch for share, epoch in zip([1] * 34 + [0.75, 0.5, 0.25], epochs, strict=True)]
    assert rates == {"g_step": pytest.approx([8e-3 * x for x in expected]),
                     "d_step": pytest.approx([4e-3 * x for x in expected])}


# ---------------------------------------------------------------------- digits

def test_dcgan_s_interpolation_and_extrapolation_share_their_middle(here):
    folder = run_here("dcgan_mnist", iters=4, lr_g=0.05, pairs=6, judge="none")
    with Image.open(folder / "interpolation.png") as a, Image.open(folder / "extrapolation.png") as b:
        assert a.width == 10 * 66 + 2 and b.width == 20 * 66 + 2
        rows = a.crop((0, a.height - 6 * 66 - 2, a.width, a.height))  # six pairs, below the title
        beyond = b.crop((0, b.height - 6 * 66 - 2, b.width, b.height))
    inner = beyond.crop((5 * 66, 0, 5 * 66 + rows.width, rows.height))
    assert rows.tobytes() == inner.tobytes()  # i = 0 … 9 are the same images
    assert len({rows.crop((2 + 66 * i, 2, 66 + 66 * i, 66)).tobytes() for i in range(10)}) == 10


def test_fid_is_printed_where_its_weights_are_named(here, monkeypatch, capsys):
    def net(x):
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)
    net.fc = nn.Linear(1, 1)
    folder = run_here("dcgan_mnist", iters=2)
    monkeypatch.setattr(evaluator, "load_inception", lambda weights, device: net)
    run_here("dcgan_mnist", "eval", folder, fid_weights="weights.pth")
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["summary"]["FID"] == scores["last"]["FID"] and scores["last"]["FID"][0] > 0
    assert " FID\n" in capsys.readouterr().out


# ---------------------------------------------------------------------- faces

def test_clipping_bounds_the_critic_but_not_the_attributes_classifier(here):
    folder = run_here("acgan_celeba", iters=4, judge="none", loss="wgan-clip", clip=0.005)
    D = torch.load(folder / "last.pt", weights_only=True)["D"]
    largest = {name: D[name].abs().max().item() for name in D if name.endswith(("weight", "bias"))}
    free = [largest.pop(name) for name in ("attributes.weight", "attributes.bias")]
    assert max(largest.values()) == pytest.approx(0.005) and free[0] > 0.03


def test_acgan_s_labels_are_requested_evenly_in_groups_and_else_as_they_are(here):
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


def test_acgan_s_pictures_show_each_attribute(here):
    folder = run_here("acgan_celeba", iters=1)
    with Image.open(folder / "attributes.png") as grid:
        assert grid.width > 8 * 66 + 60 and grid.height > 15 * 66
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    assert scores["n_real"] == 30 and list(scores["summary"]) == ["FD (judge)", "accuracy", "exact"]
    assert list(scores["training images"]) == ["FD (judge)"]
    assert {"accuracy", "exact"} <= scores["held-out images"].keys()
    assert [len(scores[name]["by attribute"][0]) for name in ("best", "last")] == [4] * 2
    folder = run_here("acgan_celeba", judge="none", iters=1, attributes="with glasses,blue hair")
    with Image.open(folder / "attributes.png") as grid:
        assert grid.height < 3 * 66 + 60


def test_a_picture_of_each_attribute_has_at_most_forty_rows(tmp_path):
    for n, rows in ((40, 40), (45, 40)):
        data = Data("", "faces", "", torch.zeros(0, 3, 8, 8), torch.eye(n), tuple(map(str, range(n))), "",
                    groups=(tuple(range(n)),))
        run = settings(folder=tmp_path, title="x", cfg=settings(seed=0, z_dim=4))
        acgan_celeba.save_pictures(lambda z, y: torch.zeros(len(z), 3, 8, 8), data, run)
        with Image.open(tmp_path / "attributes.png") as grid:
            assert 0 < grid.height - rows * (64 + 2) < 66
