"""Concat-conditioned DCGAN: its networks by the numbers, its label tricks, and runs of the script."""
import csv
import json
import math

import pytest
import torch
from torch import nn

import cdcgan_iclevr
from common.datasets import load_iclevr
from tests.conftest import CountReads, cut_off_and_resumed, main, script

SCRIPT = cdcgan_iclevr  # what `refuses` runs
FIELDS = dict(data="drawn", n_scenes=24, image_size=32, ch=2, z_dim=8, batch_size=8, judge_width=8,
              judge_steps=4, eval_draws=2, log_every=2, device="cpu")
TINY = [text for name, value in FIELDS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
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
    assert kernels == [(i, o, 4, 4) for i, o in zip(widths, widths[1:])]
    kernels = [m.weight.shape for m in D.modules() if isinstance(m, nn.Conv2d)]
    widths = [4, *(6 * t for t in times[::-1]), 1]
    assert kernels == [(o, i, 4, 4) for i, o in zip(widths, widths[1:])]
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


# ------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(workdir):
    done = script("cdcgan_iclevr.py", *TINY, "--iters", "9", "--out", "runs/cdcgan", "--sample-every", "3",
                  "--eval-every", "4", "--save-every", "4", cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "cdcgan", done.stdout


def rows_of(folder):
    return [row for row in csv.DictReader(open(folder / "metrics.csv")) if row["d_loss"]]


def test_a_run_leaves_everything(finished):
    folder, told = finished
    assert [r["step"] for r in rows_of(folder)] == ["2", "4", "6", "8", "9"]
    for row in rows_of(folder):
        assert 0 < float(row["d_real"]) < 1 and 0 < float(row["d_fake"]) < 1
    for name in ("last.pt", "best.pt", "progress.gif", "test.png", "new_test.png", "objects.png",
                 "real_beside_generated.png", "interpolation.png"):
        assert (folder / name).stat().st_size > 0, name
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["data"] == "drawn scenes" and scores["last"]["step"] == 9 and "held-out accuracy" in told
    assert scores["summary"] == {f"accuracy {test}": scores["best"][test]["accuracy"]
                                 for test in ("test", "new_test")}


def test_sample_and_eval_read_a_run(finished, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    folder, _ = finished
    (folder / "objects.png").unlink()
    main(cdcgan_iclevr, "--sample", "runs/cdcgan")
    assert (folder / "objects.png").exists()
    before = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    main(cdcgan_iclevr, "--eval", "runs/cdcgan")
    after = json.loads((folder / "scores.json").read_text())
    assert after["best"]["test"]["accuracy"] == pytest.approx(before["best"]["test"]["accuracy"], abs=0.02)


TRICKS = dict(d_cond="projection", smooth_labels=True, flip_labels=0.2, ema=0.9)


@pytest.mark.parametrize("fields", [{}, TRICKS], ids=["plain", "tricks"])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(workdir, finished, monkeypatch, tmp_path, fields):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")  # scenes and judge
    cut_off_and_resumed(cdcgan_iclevr, at=8, iters=12, halve_every=1, sample_every=5, eval_every=4,
                        save_every=3, **FIELDS, **fields)


def trained(workdir, monkeypatch, tmp_path, **fields):
    """Losses of a run, and both rates at its end."""
    monkeypatch.chdir(tmp_path)
    if not (tmp_path / "data").exists():
        (tmp_path / "data").symlink_to(workdir / "data")
    monkeypatch.setattr(cdcgan_iclevr, "draw", lambda *_: None)
    name = ",".join(f"{k}={v}" for k, v in fields.items()) or "plain"
    fields = {**FIELDS, "judge": "none", "log_every": 1, **fields}
    assert cdcgan_iclevr.train(cdcgan_iclevr.Config(out=name, **fields)) == 0
    state = torch.load(tmp_path / name / "last.pt", weights_only=True)
    return rows_of(tmp_path / name), [float(state[o]["param_groups"][0]["lr"]) for o in ("opt_g", "opt_d")]


def test_label_tricks_change_d_s_targets(workdir, finished, monkeypatch, tmp_path):
    def first(**fields):
        row = trained(workdir, monkeypatch, tmp_path, iters=1, **fields)[0][0]
        return float(row["d_loss"]), float(row["d_real"]), float(row["d_fake"])
    # with flip_labels 1 all are swapped: BCE(s, 1) - BCE(s, 0) = -s is what that changes, s the logit
    plain, real, fake = first()
    swapped, *_ = first(flip_labels=1.0)
    logit = [math.log(p / (1 - p)) for p in (real, fake)]  # of the mean: near enough, D being untrained
    assert swapped - plain == pytest.approx(logit[0] - logit[1], abs=0.02) and swapped != plain
    assert min(plain, swapped) < first(flip_labels=0.5)[0] < max(plain, swapped)
    assert first(smooth_labels=True)[0] != plain


def test_smooth_and_flipped_targets_have_the_write_up_s_ranges(workdir, finished, monkeypatch, tmp_path):
    seen, original = [], torch.nn.functional.binary_cross_entropy_with_logits
    monkeypatch.setattr(cdcgan_iclevr.F, "binary_cross_entropy_with_logits",
                        lambda score, target: seen.append(target) or original(score, target))
    trained(workdir, monkeypatch, tmp_path, iters=40, smooth_labels=True)
    real, fake = torch.cat(seen[::2]), torch.cat(seen[1::2])
    assert len(real) == 320 and 0.8 <= real.min() < 0.82 and 1.18 < real.max() <= 1.2
    assert 0 <= fake.min() < 0.02 and 0.18 < fake.max() <= 0.2
    seen.clear()
    trained(workdir, monkeypatch, tmp_path, iters=40, flip_labels=0.25)
    real, fake = torch.cat(seen[::2]), torch.cat(seen[1::2])
    assert set(real.tolist()) == set(fake.tolist()) == {0.0, 1.0}
    assert 0.15 < (real == 0).float().mean() < 0.35 and 0.15 < (fake == 1).float().mean() < 0.35
    seen.clear()
    trained(workdir, monkeypatch, tmp_path, iters=2)
    assert all(set(t.tolist()) == {1.0 - k % 2} for k, t in enumerate(seen))


def test_rates_are_halved_by_epochs(workdir, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(workdir)
    per_epoch = len(load_iclevr("drawn", 32, 24).images) // 8
    assert per_epoch == 9
    for iters, halvings in ((18, 0), (19, 1), (36, 1), (37, 2)):
        rates = trained(workdir, monkeypatch, tmp_path, iters=iters, halve_every=2, lr_g=0.008, lr_d=0.004)[1]
        assert rates == pytest.approx([0.008 / 2**halvings, 0.004 / 2**halvings]), iters
    assert trained(workdir, monkeypatch, tmp_path, iters=19, halve_every=0)[1] == pytest.approx([2e-4, 1e-4])


def test_an_iteration_reads_nothing_back(workdir, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    counts = []
    for iters in (2, 5):
        fields = {**FIELDS, "iters": iters, "judge": "none", "log_every": 100, "smooth_labels": True,
                  "flip_labels": 0.1}
        with CountReads() as mode:
            assert cdcgan_iclevr.train(cdcgan_iclevr.Config(**fields)) == 0
        counts.append(mode.reads)
    assert counts[0] == counts[1] > 0


def test_bad_values(refuses):
    refuses("--ema", "1", message="must be below 1")
    refuses("--flip-labels", "1.1", message="--flip-labels 1.1 at most 1")
    refuses("--d-cond", "linear", message="invalid choice")
    refuses("--data", "nowhere", message="there is no such folder")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cond", ["plane", "projection"])
def test_a_short_run_on_cuda(tmp_path, cond):
    args = [a for a in TINY if a not in ("--device", "cpu")]
    done = script("cdcgan_iclevr.py", *args, "--iters", "4", "--device", "cuda", "--precision", "bf16",
                  "--d-cond", cond, "--smooth-labels", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
