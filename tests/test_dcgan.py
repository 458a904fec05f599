"""DCGAN and the fully connected GAN: networks against the write-up's numbers, losses, interpolations."""
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
def test_the_conv_networks_are_the_write_up_s(latent, h):
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
        convolutions = [m for m in network if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert len(convolutions) == (4 if net == "conv" else 0)
        for module in network.modules():
            if hasattr(module, "weight"):
                norm = int(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)))
                assert module.weight.mean().item() == pytest.approx(norm, abs=0.02)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.5 if norm else 0.1)
                assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("loss", ["bce", "paired"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_each_step_is_of_its_own_network(net, loss):
    torch.manual_seed(0)
    G, D = Generator(net, 5, 3), Discriminator(net, 3, "batch" if loss == "bce" else "none")
    assert any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in D) == (loss == "bce")
    opt_g, opt_d = (torch.optim.Adam(n.parameters(), 1e-2) for n in (G, D))
    real, fake = torch.rand(8, 1, 32, 32), G(torch.randn(8, 5))

    def reached() -> list[bool]:
        return [any(p.grad is not None for p in n.parameters()) for n in (G, D)]
    found = dcgan_mnist.d_step(D, opt_d, real, fake, loss)
    assert opt_d.state and reached() == [False, True] and 0 < found["d_real"] < 1 and 0 < found["d_fake"] < 1
    D.zero_grad()
    after = dcgan_mnist.g_step(D, opt_g, real, fake, loss)
    assert opt_g.state and reached() == [True, False]
    assert loss == "paired" or after["d_fake_updated"] < found["d_fake"]  # D has learned meanwhile
    expected = -after["d_fake_updated"].log() if loss == "bce" else F.softplus(D(real) - D(fake)).mean()
    assert after["g_loss"].item() == pytest.approx(expected.item(), abs=0.05)


def test_the_penalty_is_of_real_and_generated_images():
    def loss(gamma: float, real: torch.Tensor, fake: torch.Tensor) -> float:
        torch.manual_seed(0)
        D = Discriminator("conv", 3, "none")
        opt = torch.optim.SGD(D.parameters(), 0.0)
        return dcgan_mnist.d_step(D, opt, real, fake, "paired", gamma)["d_loss"].item()
    real, fake = torch.rand(2, 16, 1, 32, 32)
    one = loss(1e6, real, fake) - loss(0, real, fake)
    assert one > 0 and loss(2e6, real, fake) - loss(0, real, fake) == pytest.approx(2 * one, rel=1e-3)
    other = [loss(1e6, *pair) - loss(0, *pair) for pair in ((real - 1, fake), (real, fake - 1))]
    assert all(value != pytest.approx(one, rel=1e-6) for value in other)


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
