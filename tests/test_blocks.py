"""Common blocks against torch's own layers or a formula written out."""
import copy

import pytest
import torch
from torch import nn

from common import blocks
from sngan_iclevr import Discriminator


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_weights_are_normed_once_per_update_and_take_gradients():
    D = Discriminator(24, 2, 32, "resnet", "spectral", "sum", classifier=False)
    other = copy.deepcopy(D)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(25, (4, 3))
    with blocks.cached_spectral_norm(D):
        twice = torch.cat([D(x[:2], y[:2]), D(x[2:], y[2:])])
        twice.sum().backward()
    assert all(p.grad.any() for p in D.parameters())
    with blocks.cached_spectral_norm(other):
        once = other(x, y)
    torch.testing.assert_close(twice, once)
    for a, b in zip(D.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)
    with blocks.cached_spectral_norm(D):
        pass
    assert not all(torch.equal(a, b) for a, b in zip(D.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_an_object_anywhere_is_found_from_the_pixels_around_it_alone(size):
    """The logits are a soft maximum over 16×16 places, most labels being absent at first."""
    C = blocks.LocalClassifier(5, 4, size)
    x = torch.randn(2, 3, size, size)
    places = nn.Sequential.forward(C, x)
    assert places.shape == (2, 5, 256)
    torch.testing.assert_close(C(x), places.exp().mean(2).log())
    assert C(torch.zeros_like(x)).sigmoid().max() < 0.3
    changed = x.clone()
    changed[..., :size // 2, :size // 2] = 1  # the upper left quarter
    moved = (nn.Sequential.forward(C, changed) != places).any(1).view(2, 16, 16).any(0)
    assert moved[:7, :7].all() and not moved[10:].any() and not moved[:, 10:].any()


def test_label_sets_become_multi_hot():
    found = blocks.multi_hot(torch.tensor([[3, 24, 24], [0, 5, 23], [1, 2, 24], [4, 4, 24]]), 24)
    assert found.shape == (4, 24) and found.max() == 1
    assert [row.nonzero()[:, 0].tolist() for row in found] == [[3], [0, 5, 23], [1, 2], [4]]


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


def test_images_are_shifted_by_whole_pixels_and_not_mirrored():
    x = torch.rand(99, 3, 16, 16) * 2 - 1
    given, edges = blocks.random_translate(x, 0.125), nn.ReplicationPad2d(2)(x)  # repeated outwards
    found = [(i, j) for image, source in zip(given, edges, strict=True) for i in range(5) for j in range(5)
             if torch.equal(image, source[:, i:i + 16, j:j + 16])]
    assert len(found) == 99 and {i for i, _ in found} == {j for _, j in found} == set(range(5))
    assert blocks.random_translate(x, 0.0) is x
