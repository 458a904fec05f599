"""VAE on faces: its loss against torch.distributions, and the script as a user runs it."""
import csv
import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributions import Normal, kl_divergence

import vae_celeba
from common.datasets import Faces, load_faces
from tests.conftest import CountReads, cut_off_and_resumed, main, script

SCRIPT = vae_celeba  # what `refuses` runs
FIELDS = dict(data="drawn", n_drawn=300, image_size=32, ch=1, z_dim=4, batch_size=8, judge_width=8,
              judge_steps=4, eval_images=20, eval_draws=2, log_every=2, device="cpu")
TINY = [text for name, value in FIELDS.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def test_the_networks_are_all_convolutional():
    vae = vae_celeba.VAE(128, 32, 128)
    layers = [m for m in vae.modules() if hasattr(m, "weight") and not isinstance(m, nn.BatchNorm2d)]
    assert all(isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) for layer in layers)
    assert [layer.out_channels for layer in layers] == [32, 64, 128, 256, 512, 256, 512, 256, 128, 64, 32, 3]
    x = torch.rand(2, 3, 128, 128)
    mean, log_variance = vae.encode(x)
    assert mean.shape == log_variance.shape == (2, 128)
    assert vae.decoder(mean).shape == x.shape and vae.decoder(mean).abs().max() <= 1


def test_kl_is_that_of_torch_distributions():
    mean, log_variance = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(vae_celeba.kl_divergence(mean, log_variance), expected)
    assert not vae_celeba.kl_divergence(torch.zeros(3, 4), torch.zeros(3, 4)).any()


@pytest.fixture(scope="module")
def finished(workdir):
    done = script("vae_celeba.py", *TINY, "--iters", "9", "--out", "runs/vae", "--sample-every", "1",
                  "--eval-every", "4", "--save-every", "4", cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "vae", done.stdout


def test_a_run_leaves_everything(finished):
    folder, told = finished
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert list(rows[0]) == ["step", "seconds", "loss", "mse", "kl", "fd_judge"]
    assert [r["step"] for r in rows if r["loss"]] == ["2", "4", "6", "8", "9"]
    assert [r["step"] for r in rows if r["fd_judge"]] == ["4", "8", "9"]
    for row in rows:
        if row["loss"]:  # both parts per pixel value
            expected = float(row["mse"]) + float(row["kl"]) / (3 * 32 * 32)
            assert float(row["loss"]) == pytest.approx(expected, rel=1e-4)
    for name in ("samples", "reconstructions", "interpolation", "arithmetic"):
        assert (folder / f"{name}.png").stat().st_size > 0, name
    with Image.open(folder / "samples.png") as s, Image.open(folder / "reconstructions.png") as r:
        assert s.width == 4 * 66 + 2 and s.height > 4 * 66 and r.width == 8 * 66 + 2
    with Image.open(folder / "interpolation.png") as i, Image.open(folder / "arithmetic.png") as a:
        assert i.width == 10 * 66 + 2 and a.height > 15 * 66
    with Image.open(folder / "progress.gif") as gif:
        assert gif.n_frames == 9
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["data"] == "drawn faces" and scores["n_real"] == 30
    assert list(scores["summary"]) == ["FD (judge)", "FD of reconstructions", "MSE", "attribute added"]
    for part in ("held-out accuracy", "white hair", "best.pt"):
        assert part in told
    assert "FID: not measured" in told and told.count("FID") == 1  # and nothing else goes by that name


def test_reconstructions_are_scored_as_they_are(finished, workdir, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(workdir)
    cfg = vae_celeba.Config(**FIELDS)
    data = load_faces("drawn", 32, n_drawn=300)
    vae, _ = vae_celeba.load(cfg, folder, "best.pt", torch.device("cpu"))
    x = data.test_images / 127.5 - 1
    mean, log_variance = vae.encode(x)
    best = json.loads((folder / "scores.json").read_text())["best"]
    assert best["MSE"][0] == pytest.approx((vae.decoder(mean) - x).square().mean().item(), rel=1e-4)
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert best["KL, nats"][0] == pytest.approx(kl.item(), rel=1e-4)


def test_directions_are_differences_of_mean_latents(finished, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    cfg = vae_celeba.Config(**FIELDS)
    data = load_faces("drawn", 32, n_drawn=300)
    vae, _ = vae_celeba.load(cfg, finished[0], "last.pt", torch.device("cpu"))
    z = vae.encode(data.images / 127.5 - 1)[0]
    blue = data.labels[:, 4] == 1
    torch.testing.assert_close(vae_celeba.directions(vae, data)[4], z[blue].mean(0) - z[~blue].mean(0),
                               atol=1e-5, rtol=1e-4)


class Plain(nn.Module):
    """A VAE whose latent is an image's mean, and a judge that sees attribute 0 in images brighter than 0."""
    size = 8

    def __init__(self):
        super().__init__()
        self.fc, self.weight = nn.Identity(), nn.Parameter(torch.zeros(1))

    def encode(self, x):
        return x.mean((2, 3))[:, :1], torch.zeros(len(x), 1)

    def decoder(self, z):
        return z[..., None, None].expand(-1, 3, 8, 8)

    def forward(self, x):
        bright = self.fc((x.mean((1, 2, 3)) > 0).float()[:, None])
        return torch.cat([bright, torch.ones_like(bright)], 1)


def test_what_adding_an_attribute_does_is_counted():
    levels = torch.tensor([0, 255, 51, 204])  # -1, 1, -0.6, 0.6: the bright ones are 1.6 brighter on average
    images = levels[:, None, None, None].expand(-1, 3, 8, 8).byte()
    labels = torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1]])
    test = torch.tensor([0, 20, 110, 140]).view(4, 1, 1, 1).expand(-1, 3, 8, 8).byte()
    data = Faces("", images, labels, test, torch.tensor([[0, 1]] * 4), ("bright", "all"), (), "")
    net = Plain()
    shares = vae_celeba.add_attributes(net, data, vae_celeba.evaluator.Judge(net, "", None))
    assert shares == {"bright": (0.25, 1.0)}  # all have the other: none lack it
    data.labels = labels.flip(1)  # nothing to tell "all" by now, and every training image is "bright"
    found = vae_celeba.add_attributes(net, data, vae_celeba.evaluator.Judge(net, "", None))
    assert found == {"bright": (0.25, 0.25)}


def test_sample_and_eval_read_a_run(finished, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    folder, _ = finished
    before = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    main(vae_celeba, "--eval", "runs/vae")
    after = json.loads((folder / "scores.json").read_text())
    assert after["best"]["FD (judge)"] == pytest.approx(before["best"]["FD (judge)"], rel=1e-4)
    (folder / "arithmetic.png").unlink()
    main(vae_celeba, "--sample", "runs/vae")
    assert (folder / "arithmetic.png").exists()


def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(workdir, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")  # faces and judge
    cut_off_and_resumed(vae_celeba, at=8, iters=12, sample_every=5, eval_every=4, save_every=3, **FIELDS)


def test_an_iteration_reads_nothing_back(workdir, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    counts = []
    for iters in (2, 5):
        fields = {**FIELDS, "iters": iters, "judge": "none", "log_every": 100, "kl_weight": 0.1}
        with CountReads() as mode:
            assert vae_celeba.train(vae_celeba.Config(**fields)) == 0
        counts.append(mode.reads)
    assert counts[0] == counts[1] > 0


def test_bad_values(refuses):
    refuses("--z-dim", "0", message="--z-dim 0: must be at least 1")
    refuses("--kl-weight", "-1", message="--kl-weight -1.0: must be at least 0")
    refuses("--data", "nowhere", message="there is no list_attr_celeba.txt or cartoon_attr.txt in it")
    refuses("--data", "drawn", "--n-drawn", "30", "--batch-size", "31", message="more than the 27 training")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_short_run_on_cuda(tmp_path):
    args = [a for a in TINY if a not in ("--device", "cpu")]
    done = script("vae_celeba.py", *args, "--iters", "4", "--device", "cuda", "--precision", "bf16",
                  "--fid-weights", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
