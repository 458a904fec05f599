"""DCGAN on MNIST: its networks by the numbers, and the script as a user runs it."""
import csv
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import dcgan_mnist
from common import losses
from common.blocks import init_dcgan
from tests.conftest import CountReads, cut_off_and_resumed, main, make_mnist, same, script

SCRIPT = dcgan_mnist  # what `refuses` runs
TINY = ["--data", "drawn", "--n-drawn", "60", "--latent-dim", "5", "--hidden-dim", "3", "--batch-size", "8",
        "--judge-width", "8", "--judge-steps", "4", "--eval-images", "40", "--eval-draws", "2",
        "--log-every", "2", "--device", "cpu"]


# ------------------------------------------------------------------------------------------------- networks

@pytest.mark.parametrize("latent, h", [(16, 16), (100, 16), (1, 2)])
def test_the_conv_networks_are_the_write_up_s(latent, h):
    G, D = dcgan_mnist.generator("conv", latent, h), dcgan_mnist.discriminator("conv", h)
    shapes, x = [], torch.randn(2, latent)
    for layer in G:
        x = layer(x)
        shapes += [tuple(x.shape[1:])] if isinstance(layer, nn.ConvTranspose2d) else []
    assert shapes == [(4 * h, 4, 4), (2 * h, 8, 8), (h, 16, 16), (1, 32, 32)]
    assert x.abs().max() <= 1
    shapes = []
    for layer in D:
        x = layer(x)
        shapes += [tuple(x.shape[1:])] if isinstance(layer, nn.Conv2d) else []
    assert shapes == [(h, 16, 16), (2 * h, 8, 8), (4 * h, 4, 4), (1, 1, 1)] and x.shape == (2, 1)
    kernels = 16 * (latent * 4 * h + 4 * h * 2 * h + 2 * h * h + h)
    assert sum(p.numel() for p in G.parameters()) == kernels + 2 * 7 * h + 1
    assert [layer.negative_slope for layer in D if isinstance(layer, nn.LeakyReLU)] == [0.2] * 3


def test_the_mlp_networks_have_no_convolution():
    G, D = dcgan_mnist.generator("mlp", 7, 4), dcgan_mnist.discriminator("mlp", 4)
    assert D(G(torch.randn(3, 7))).shape == (3, 1) and G(torch.randn(3, 7)).shape == (3, 1, 32, 32)
    assert not any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for net in (G, D) for m in net.modules())


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_initialisation(net):
    torch.manual_seed(0)
    for module in init_dcgan(dcgan_mnist.generator(net, 100, 32)).modules():
        if isinstance(module, (nn.ConvTranspose2d, nn.Linear)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.02)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.5) and not module.bias.any()


def test_minimax_losses_are_binary_cross_entropies():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 50, 1, dtype=torch.float64) * 3
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    expected = F.binary_cross_entropy(real.sigmoid(), ones) + F.binary_cross_entropy(fake.sigmoid(), zeros)
    torch.testing.assert_close(losses.bce_d(real, fake), expected)
    torch.testing.assert_close(losses.bce_g(fake), -fake.sigmoid().log().mean())
    assert losses.bce_d(torch.tensor([-1e4]), torch.tensor([1e4])).isfinite()  # where a sigmoid is 0 or 1


# ------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(workdir):
    done = script("dcgan_mnist.py", *TINY, "--iters", "9", "--out", "runs/dcgan", "--sample-every", "3",
                  "--eval-every", "4", "--save-every", "4", "--pairs", "6", "--lr-g", "0.05", cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "dcgan", done.stdout


def test_a_run_leaves_everything(finished):
    folder, told = finished
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert list(rows[0]) == ["step", "seconds", "d_loss", "g_loss", "d_real", "d_fake_before", "d_fake_after",
                             "fd_judge", "tv_digits"]
    assert [r["step"] for r in rows if r["d_loss"]] == ["2", "4", "6", "8", "9"]
    assert [r["step"] for r in rows if r["fd_judge"]] == ["4", "8", "9"]
    for row in rows:
        for name in ("d_real", "d_fake_before", "d_fake_after"):
            assert not row[name] or 0 < float(row[name]) < 1
    assert len(list((folder / "samples").iterdir())) == 3
    for name in ("last.pt", "best.pt", "progress.gif", "samples.png", "real_beside_generated.png"):
        assert (folder / name).stat().st_size > 0, name
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["last"]["step"] == 9 and scores["data"] == "drawn digits"
    assert scores["summary"] == {name: scores["last"][name] for name in ("FD (judge)", "TV")}
    assert sum(scores["last"]["histogram"][0]) == pytest.approx(1)
    best = torch.load(folder / "best.pt", weights_only=True)
    fds = [float(r["fd_judge"]) for r in rows if r["fd_judge"]]
    assert best["best"] == pytest.approx(min(fds), rel=1e-5)
    assert best["step"] == [4, 8, 9][fds.index(min(fds))]
    for part in ("training images", "last.pt (step 9)", "held-out accuracy", "FD (judge)"):
        assert part in told
    assert "FID: not measured" in told and told.count("FID") == 1  # and nothing else goes by that name


def test_ways_from_one_z_to_another_and_beyond(finished):
    folder, _ = finished
    with Image.open(folder / "interpolation.png") as a, Image.open(folder / "extrapolation.png") as b:
        assert a.width == 10 * 66 + 2 and b.width == 20 * 66 + 2
        rows = a.crop((0, a.height - 6 * 66 - 2, a.width, a.height))  # six pairs, below the title
        beyond = b.crop((0, b.height - 6 * 66 - 2, b.width, b.height))
    inner = beyond.crop((5 * 66, 0, 5 * 66 + rows.width, rows.height))
    assert rows.tobytes() == inner.tobytes()  # i = 0 … 9 are the same images
    assert len({rows.crop((2 + 66 * i, 2, 66 + 66 * i, 66)).tobytes() for i in range(10)}) == 10


def test_sample_and_eval_read_a_run(finished, workdir, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(workdir)
    before = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    main(dcgan_mnist, "--eval", "runs/dcgan")
    after = json.loads((folder / "scores.json").read_text())
    assert set(after) == set(before)
    assert after["last"]["FD (judge)"] == pytest.approx(before["last"]["FD (judge)"], rel=1e-4)
    main(dcgan_mnist, "--sample", "runs/dcgan", "--pairs", "2")
    with Image.open(folder / "interpolation.png") as grid:
        assert grid.height < 3 * 66 + 20


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(workdir, finished, monkeypatch, tmp_path, net):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")  # digits and judge
    cut_off_and_resumed(dcgan_mnist, at=16, net=net, iters=25, data="drawn", n_drawn=60, latent_dim=5,
                        hidden_dim=3, batch_size=8, judge_width=8, judge_steps=4, eval_images=40, ema=0.9,
                        log_every=2, sample_every=7, eval_every=8, save_every=5, device="cpu")


def test_the_average_is_g_itself_by_default(finished):
    state = torch.load(finished[0] / "last.pt", weights_only=True)
    same(state["ema"], state["G"])
    assert state["ema"]["2.running_mean"].any()  # with batch norm's statistics


def test_an_iteration_reads_nothing_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = []
    for iters in (2, 2, 5):  # the first one draws the digits
        cfg = dcgan_mnist.Config(iters=iters, data="drawn", n_drawn=60, hidden_dim=2, batch_size=8,
                                 judge="none", log_every=100, device="cpu")
        with CountReads() as mode:
            assert dcgan_mnist.train(cfg) == 0
        counts.append(mode.reads)
    assert counts[1] == counts[2] > 0


def test_real_digits_under_a_path_are_named_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_mnist(tmp_path / "data")
    cfg = dcgan_mnist.Config(iters=2, batch_size=8, hidden_dim=2, judge_width=4, judge_steps=2,
                             eval_images=30, device="cpu", precision="bf16", deterministic=True)
    assert dcgan_mnist.train(cfg) == 0
    folder = tmp_path / "runs" / "dcgan_mnist"  # --data auto found them
    assert json.loads((folder / "scores.json").read_text())["data"] == "MNIST"
    assert json.loads((folder / "config.json").read_text())["config"]["data"] == "mnist"


def test_fid_is_printed_only_with_its_own_weights(finished, workdir, refuses, tmp_path, monkeypatch, capsys):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 1)

        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)

    folder = finished[0]
    (tmp_path / "other.pth").write_bytes(b"x" * 1000)
    refuses("--eval", str(folder), "--judge", judge_of(workdir), "--fid-weights", "other.pth",
            message="is not the FID Inception network")
    monkeypatch.setattr(dcgan_mnist.evaluator, "load_inception", lambda weights, device: Net())
    kept = (folder / "scores.json").read_text()
    main(dcgan_mnist, "--eval", str(folder), "--judge", judge_of(workdir), "--fid-weights", "weights.pth")
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["summary"]["FID"] == scores["last"]["FID"] and scores["last"]["FID"][0] > 0
    assert "FID" in capsys.readouterr().out.split("n_fake")[0]
    (folder / "scores.json").write_text(kept)


def judge_of(workdir) -> str:
    return str(next((workdir / "data" / "judges").glob("digits-*")))


# ------------------------------------------------------------------------------------------------- bad input

def test_bad_values(refuses, tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan_mnist.load_digits.__globals__["MNIST"], "mirrors", ["http://127.0.0.1:9/"])
    refuses("--latent-dim", "0", message="--latent-dim 0: must be at least 1")
    refuses("--hidden-dim", "0", message="--hidden-dim 0: must be at least 1")
    refuses("--net", "transformer", message="invalid choice")
    refuses("--ema", "1", message="must be below 1")
    refuses("--data", "mnist", message="can't be downloaded")
    refuses("--data", "nowhere", message="should hold MNIST's four files")
    make_mnist(tmp_path)
    refuses("--data", ".", "--batch-size", "41", message="more than the 40 training images")
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-9])
    refuses("--data", ".", message="damaged")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_a_short_run_on_cuda(tmp_path, net):
    args = [a for a in TINY if a not in ("--device", "cpu")]
    done = script("dcgan_mnist.py", *args, "--iters", "4", "--net", net, "--device", "cuda", "--precision",
                  "bf16", "--fid-weights", "none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
