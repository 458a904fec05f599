"""Common blocks, and SNGAN's networks, against torch's own layers or a formula written out."""
import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import sngan_iclevr as sngan
from common import blocks
from sngan_iclevr import Discriminator, Generator

NULL = 24


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise_norms(net: nn.Module) -> None:
    """Batch norms and label tables away from their initial values, null rows kept."""
    for module in net.modules():
        if isinstance(module, sngan.ConditionalBatchNorm):
            nn.init.normal_(module.gamma, 1, 0.3)
            nn.init.normal_(module.beta, 0, 0.3)
            for table in (module.gain, module.bias):
                nn.init.normal_(table.weight[:NULL], 0, 0.5)


# ---------------------------------------------------------------------- spectral norm

def test_spectral_norm_reaches_one_on_every_layer_of_d_but_the_joining_one():
    D = Discriminator(NULL, 4, 32, "resnet", "spectral", "linear", classifier=True)
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding)
    weighted = {name: m for name, m in D.named_modules() if isinstance(m, kinds)}
    assert len(weighted) == 3 * 4 + 4  # four blocks of three convolutions; linear, embed, join, classify
    for _ in range(60):
        with blocks.cached_spectral_norm(D):
            pass
    for name, module in weighted.items():
        norm = torch.linalg.matrix_norm(module.weight.flatten(1), 2).item()
        if name == "join":
            assert not nn.utils.parametrize.is_parametrized(module) and abs(norm - 1) > 1e-3
        else:
            assert norm == pytest.approx(1, abs=2e-3), name


def test_initialisation_is_not_lost_under_spectral_norm():
    block = sngan.DownBlock(16, 32, spectral_norm)
    for conv, gain in ((block.conv1, math.sqrt(2)), (block.conv2, math.sqrt(2)), (block.shortcut, 1.0)):
        weight = conv.parametrizations.weight.original
        fan = (weight.shape[0] + weight.shape[1]) * weight.shape[2] ** 2
        bound = gain * math.sqrt(6 / fan)  # Glorot & Bengio 2010, eq. 16
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not conv.bias.any()


def test_weights_are_normed_once_per_update_and_take_gradients():
    D = Discriminator(NULL, 2, 32, "resnet", "spectral", "sum", classifier=True)
    other = copy.deepcopy(D)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(25, (4, 3))
    with blocks.cached_spectral_norm(D):
        (score, logits), (more, _) = D(x[:2], y[:2]), D(x[2:], y[2:])
        twice = torch.cat([score, more])
        (twice.sum() + logits.sum()).backward()
    assert all(p.grad.any() for p in D.parameters())
    with blocks.cached_spectral_norm(other):
        once, _ = other(x, y)
    torch.testing.assert_close(twice, once)
    for a, b in zip(D.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    with blocks.cached_spectral_norm(D):
        pass
    assert not all(torch.equal(a, b) for a, b in zip(D.buffers(), other.buffers(), strict=True))


# ---------------------------------------------------------------------- SNGAN's blocks

def test_conditional_batch_norm_is_its_formula():
    norm = sngan.ConditionalBatchNorm(5, NULL)
    randomise_norms(norm)
    x = torch.randn(4, 5, 3, 3)
    ids = torch.tensor([[1, 2, 3], [4, 5, NULL], [6, NULL, NULL], [NULL, NULL, NULL]])
    out, plain = norm(x, ids), F.batch_norm(x, None, None, training=True)
    for b in range(4):
        gain, bias = norm.gamma.clone(), norm.beta.clone()
        for i in ids[b].tolist():
            if i != NULL:
                gain, bias = gain + norm.gain.weight[i], bias + norm.bias.weight[i]
        torch.testing.assert_close(out[b], plain[b] * gain[:, None, None] + bias[:, None, None])


def test_up_block_is_the_paper_s_order_of_layers():
    block = sngan.UpBlock(6, 4, NULL)
    randomise_norms(block)
    x, ids = torch.randn(3, 6, 4, 4), torch.randint(25, (3, 3))
    up = nn.Upsample(scale_factor=2)
    h = block.conv1(up(F.leaky_relu(block.bn1(x, ids), 0.01)))
    expected = block.conv2(F.leaky_relu(block.bn2(h, ids), 0.01)) + block.shortcut(up(x))
    torch.testing.assert_close(block(x, ids), expected)
    assert expected.shape == (3, 4, 8, 8)


@pytest.mark.parametrize("first", [False, True])
def test_down_block_is_the_paper_s_order_of_layers(first):
    block = sngan.DownBlock(3, 8, spectral_norm, first=first).eval()  # eval: no power iteration
    x = torch.randn(2, 3, 8, 8)
    h = block.conv2(F.leaky_relu(block.conv1(x if first else F.leaky_relu(x, 0.01)), 0.01))
    expected = F.avg_pool2d(h, 2) + F.avg_pool2d(block.shortcut(x), 2)
    torch.testing.assert_close(block(x), expected)
    assert block.conv1.out_channels == (8 if first else 3)


# ---------------------------------------------------------------------- labels in G and in D

def test_label_sets_become_multi_hot():
    found = blocks.multi_hot(torch.tensor([[3, 24, 24], [0, 5, 23], [1, 2, 24], [4, 4, 24]]), 24)
    assert found.shape == (4, 24) and found.max() == 1
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[3], [0, 5, 23], [1, 2], [4]]


def test_labels_are_a_set_to_g():
    G = Generator(NULL, 8, 4, 32)
    randomise_norms(G)
    G.eval()
    z = torch.randn(1, 8)
    image = G(z, torch.tensor([[1, 9, NULL]]))
    for other in ([2, 9, NULL], [1, 10, NULL], [1, 9, 3], [1, NULL, NULL]):
        assert (G(z, torch.tensor([other])) - image).abs().max() > 1e-3
    torch.testing.assert_close(G(z, torch.tensor([[NULL, 1, 9]])), image)


@pytest.mark.parametrize("net, label_embed", [("resnet", "linear"), ("resnet", "sum"), ("cnn", "sum")])
def test_d_s_score_is_its_formula_and_null_labels_add_exactly_zero(net, label_embed):
    D = Discriminator(NULL, 4, 32, net, "spectral", label_embed, classifier=True).eval()
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([[1, 9, NULL], [3, 4, 5]])
    h, vectors = D.layers(x), D.embed(y)
    h = F.leaky_relu(h).sum((2, 3)) if net == "resnet" else h.flatten(1)
    assert torch.equal(vectors.any(2), y < NULL)
    label = vectors.sum(1)
    if label_embed == "linear":  # where the order counts
        label = torch.einsum("nkf,okf->no", vectors, D.join.weight.unflatten(1, (3, -1)))
    score, logits = D(x, y)
    torch.testing.assert_close(score, D.linear(h)[:, 0] + (label * h).sum(1))
    torch.testing.assert_close(logits, D.classify(h))
    assert torch.equal(D(x, torch.full((2, 3), NULL))[0], D.linear(h)[:, 0])


def test_networks_have_the_report_s_widths_and_the_size_asked_for():
    G = Generator(NULL, 128, 64, 64)
    D = Discriminator(NULL, 64, 64, "resnet", "spectral", "linear", classifier=False)
    assert G.first.weight.shape == (16 * 64 * 4 * 4, 128)
    assert [b.conv1.weight.shape[:2] for b in G.blocks] == [(512, 1024), (256, 512), (128, 256), (64, 128)]
    widths = [64, 64, 128, 256, 512, 1024]
    assert [b.conv2.weight.shape[:2] for b in D.layers] == [(o, i) for i, o in pairwise(widths)]
    assert D.embed.weight.shape == (25, 1024) and D.join.weight.shape == (1024, 3 * 1024)
    for size in (32, 64, 128):
        y = torch.randint(25, (3, 3))
        x = Generator(NULL, 8, 2, size)(torch.randn(3, 8), y)
        assert x.shape == (3, 3, size, size) and x.abs().max() <= 1
        for net, norm in (("resnet", "none"), ("cnn", "spectral"), ("cnn", "none")):
            D = Discriminator(NULL, 2, size, net, norm, "sum", classifier=True)
            assert [out.shape for out in D(x, y)] == [(3,), (3, 24)] and D.join is None
            normed = [name for name, _ in D.named_parameters() if "original" in name]
            assert len(normed) == (norm == "spectral") * (len(D.layers) // 2 + 3)


# ---------------------------------------------------------------------- the average of G, moved images

def test_ema_is_its_recurrence():
    G = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema, expected = blocks.EMA(G, 0.8), {k: v.clone() for k, v in G.state_dict().items()}
    for step in range(1, 60):
        with torch.no_grad():
            G[0].weight.add_(torch.randn(3, 2))
        G(torch.randn(8, 2))  # moves batch norm's statistics
        ema.update(step)
        decay = min(0.8, step / (step + 10))
        for key, value in G.state_dict().items():
            average = decay * expected[key] + (1 - decay) * value
            expected[key] = average if value.is_floating_point() else value
    for key, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[key].to(value.dtype))
    x = torch.randn(4, 2, requires_grad=True)
    assert not ema(x).requires_grad and not ema.net.training
    torch.testing.assert_close(ema(x[:1]), ema(x)[:1])  # evaluation mode: no batch statistics


def test_images_are_mirrored_and_shifted_by_whole_pixels():
    x, found = torch.rand(99, 3, 16, 16) * 2 - 1, []
    given = blocks.random_flip_translate(x, 0.125)
    for image, source in zip(given, x, strict=True):
        found += [(mirrored, i, j) for mirrored, whole in enumerate((source, source.flip(2)))
                  for i in range(5) for j in range(5)
                  if torch.equal(image[:, 2:-2, 2:-2], whole[:, i:i + 12, j:j + 12])]
    assert len(found) == 99 and {i for _, i, _ in found} == {j for *_, j in found} == set(range(5))
    assert 30 < sum(mirrored for mirrored, *_ in found) < 70
    assert x.min() <= given.min() and given.max() <= x.max()  # edges are repeated outwards
    assert blocks.random_flip_translate(x, 0.0) is x
