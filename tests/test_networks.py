"""Networks against the report's numbers, and their parts against a formula written out."""
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

import acgan_celeba as acgan
import cdcgan_iclevr as cdcgan
import dcgan_mnist as dcgan
import infogan_mnist as infogan
import sngan_iclevr as sngan
import vae_celeba as vae
from common.blocks import multi_hot
from tests.conftest import TINY

SCRIPTS = {name: importlib.import_module(name) for name in TINY}
NULL = 24
SETS = torch.tensor([[3, NULL, NULL], [0, 5, 23], [1, 2, NULL]])
# of a script, or a copy of its definitions, and its settings
BUILD = {
    "dcgan_mnist": lambda m, c: (m.Generator(c.net, c.latent_dim, c.hidden_dim),
                                 m.Discriminator(c.net, c.hidden_dim, c.d_norm)),
    "acgan_celeba": lambda m, c: (m.Generator(15, c.z_dim, c.ch, c.image_size, c.g_cond),
                                  m.Discriminator(15, c.ch, c.image_size, c.d_norm, c.d_cond)),
    "cdcgan_iclevr": lambda m, c: (m.Generator(24, c.z_dim, c.ch, c.image_size),
                                   m.Discriminator(24, c.ch, c.image_size, c.d_cond, c.d_norm, c.aux_weight > 0)),
    "sngan_iclevr": lambda m, c: (m.Generator(24, c.z_dim, c.ch, c.image_size),
                                  m.Discriminator(24, c.ch, c.image_size, c.d_net, c.d_norm, c.label_embed,
                                                  c.aux_weight > 0)),
}


def build(name: str, **fields) -> tuple:
    """G and D of a script, and its settings: TINY but for the fields given."""
    torch.manual_seed(0)
    cfg = SCRIPTS[name].Config(**TINY[name] | dict(precision="fp32") | fields)
    return *BUILD[name](SCRIPTS[name], cfg), cfg


def labels_of(name: str, n: int) -> list[torch.Tensor]:
    """What the networks of a script are given beside z or images."""
    if name == "acgan_celeba":
        return [torch.rand(n, 15).round()]
    return [] if name == "dcgan_mnist" else [torch.rand(n, 24).argsort(1)[:, :3]]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------- the report's numbers

@pytest.mark.parametrize("net, channels", [
    (dcgan.Generator("conv", 100, 16), [100, 64, 32, 16, 1]),
    (dcgan.Discriminator("conv", 16), [1, 16, 32, 64, 1]),
    (infogan.Generator(74, 64, 64), [74, 512, 256, 128, 64, 1]),
    (infogan.Body(64, 64), [1, 64, 128, 256, 512]),
    (acgan.Discriminator(15, 32, 128, "batch", "concat"), [3, 32, 64, 128, 256, 512]),
    (acgan.Generator(15, 128, 32, 128, "input"), [512, 256, 128, 64, 32, 3]),
    (cdcgan.Generator(24, 100, 64, 64), [124, 512, 256, 128, 64, 3]),
    (cdcgan.Discriminator(24, 64, 64, "plane", "batch", False), [4, 64, 128, 256, 512, 1]),
    (vae.encoder(128, 32, 128), [3, 32, 64, 128, 256, 512, 256]),
    (vae.decoder(128, 32, 128), [128, 512, 256, 128, 64, 32, 3])], ids=lambda x: type(x).__module__)
def test_convolutions_are_the_report_s(net, channels):
    """4×4 kernels, batch norm between them, but next to the image; initialised as in the paper."""
    convs = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [convs[0].in_channels, *(m.out_channels for m in convs)] == channels
    assert {m.kernel_size for m in convs} == {(4, 4)} and {m.stride for m in convs} <= {(1, 1), (2, 2)}
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    inner = channels[:-1] if len(channels) > len(norms) + 2 or channels[0] > 4 else channels
    assert [m.num_features for m in norms] == [c for c in inner[1:] if c not in (1, 3)][-len(norms):]
    for module in [m for m in net.modules() if hasattr(m, "weight")]:
        norm = int(isinstance(module, nn.BatchNorm2d))
        if not isinstance(net, infogan.Body | infogan.Generator):
            assert module.weight.mean().item() == pytest.approx(norm, abs=0.02)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.5 if norm else 0.1)
            assert module.bias is None or not module.bias.any()
