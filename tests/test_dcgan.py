"""DCGAN and the fully connected GAN: networks against the report's numbers, losses, interpolations."""
import copy
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import dcgan_mnist
from dcgan_mnist import Discriminator, Generator
from tests.conftest import run_here


@pytest.mark.parametrize("latent, h", [(16, 16), (100, 16), (1, 2)])
def test_the_conv_networks_are_the_report_s(latent, h):
    G, D = Generator("conv", latent, h), Discriminator("conv", h)
    kernels = [layer.weight for layer in G if isinstance(layer, nn.ConvTranspose2d)]
    assert [k.shape for k in kernels] == [(i, o, 4, 4) for i, o in pairwise([latent, 4 * h, 2 * h, h, 1])]
    biases = 2 * (4 * h + 2 * h + h) + 1  # of batch norm, with its gains, and of the last layer
    assert sum(p.numel() for p in G.parameters()) == sum(k.numel() for k in kernels) + biases
    kernels = [layer.weight.shape for layer in D if isinstance(layer, nn.Conv2d)]
    assert kernels == [(o, i, 4, 4) for i, o in pairwise([1, h, 2 * h, 4 * h, 1])]
    x = G(torch.randn(2, latent))
    assert x.shape == (2, 1, 32, 32) and x.abs().max() <= 1 and D(x).shape == (2, 1)
    assert [layer.negative_slope for layer in D if isinstance(layer, nn.LeakyReLU)] == [0.2] * 3


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_both_networks_are_initialised_as_in_the_paper(net):
    torch.manual_seed(0)
    for network in (Generator(net, 100, 32), Discriminator(net, 32)):
        for module in network:
            if hasattr(module, "weight"):
                norm = int(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)))
                assert module.weight.mean().item() == pytest.approx(norm, abs=0.02)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.5 if norm else 0.1)
                assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("loss", ["bce", "rpgan"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_steps_losses_are_their_formulas(net, loss, gamma):
    torch.manual_seed(0)
    D = Discriminator(net, 3, "batch" if loss == "bce" else "none")
    assert any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in D) == (loss == "bce")
    cfg = dcgan_mnist.Config(net=net, loss=loss, gamma=gamma, precision="fp32")
    real, fake = torch.rand(16, 1, 32, 32), torch.rand(16, 1, 32, 32, requires_grad=True)
    before = copy.deepcopy(D)
    found = dcgan_mnist.d_step(D, torch.optim.Adam(D.parameters(), 1e-2), real, fake.detach(), cfg)
    p, q = before(real), before(fake)
    if gamma:  # an eighth of the images of each kind
        x = torch.cat([real[[0, 8]], fake.detach()[[0, 8]]]).requires_grad_()
        slope, = torch.autograd.grad(before(x).sum(), x)
        gamma *= slope.square().sum() / 4
        assert gamma > 0
    minimax = -(p.sigmoid().log() + (1 - q.sigmoid()).log()).mean()
    expected = F.softplus(q - p).mean() if loss == "rpgan" else minimax
    torch.testing.assert_close(found["d_loss"], expected + gamma)
    torch.testing.assert_close((found["d_real"], found["d_fake"]), (p.sigmoid().mean(), q.sigmoid().mean()))
    p, q = D(real), D(fake)
    found = dcgan_mnist.g_step(D, torch.optim.SGD([fake], 0.0), real, fake, cfg)
    expected = F.softplus(p - q).mean() if loss == "rpgan" else -q.sigmoid().log().mean()
    torch.testing.assert_close((found["g_loss"], found["d_fake_updated"]), (expected, q.sigmoid().mean()))


def test_interpolation_and_extrapolation_share_their_middle(here):
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
    monkeypatch.setattr(dcgan_mnist.evaluator, "load_inception", lambda weights, device: net)
    run_here("dcgan_mnist", "eval", folder, fid_weights="weights.pth")
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["summary"]["FID"] == scores["last"]["FID"] and scores["last"]["FID"][0] > 0
    assert " FID\n" in capsys.readouterr().out
