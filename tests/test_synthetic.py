"""The synthetic scenes, digits and faces show what their labels and factors say; measures of digits."""
import math

import pytest
import scipy
import torch
from torch.nn.functional import avg_pool2d, normalize

from synthetic import digits, faces, measures, scenes
from tests.conftest import same


@pytest.mark.parametrize("renderer, n, size", [(scenes, 12, 64), (digits, 100, 28), (faces, 20, 45)])
def test_one_seed_renders_the_same_images_for_any_batch_size(renderer, n, size):
    state = torch.get_rng_state()
    first = renderer.render(n, size, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    same(first, renderer.render(n, size, seed=3, batch=7))
    images, labels, *_ = renderer.render(n, size, seed=4)
    assert not torch.equal(images, first[0]) and not torch.equal(labels, first[1])


@pytest.mark.parametrize("renderer, most", [(digits, 2.5), (faces, 2)])
def test_images_are_the_same_at_any_size(renderer, most):
    half, full = (renderer.render(48, size, seed=5)[0].float() for size in (32, 64))
    assert half.shape[2:] == (32, 32) and full.shape[2:] == (64, 64)
    shrunk = avg_pool2d(full, 2)
    # only the edges differ, which are as many pixels wide in either
    assert (shrunk - half).abs().mean() < most < (shrunk[1:] - half[:-1]).abs().mean() / 10


# ---------------------------------------------------------------------- scenes

@pytest.fixture(scope="module")
def rendered():
    return scenes.render(100, 64, seed=5)


def test_frames_are_nested_and_labels_padded(rendered):
    images, labels, scene = rendered
    assert images.dtype == torch.uint8 and images.shape == (300, 3, 64, 64)
    assert scene.tolist() == [i // 3 for i in range(300)] and (labels.sort(1).values == labels).all()
    for frames, ids in zip(images.split(3), labels.split(3), strict=True):
        sets = [set(row.tolist()) - {scenes.NULL} for row in ids]
        assert [len(s) for s in sets] == [1, 2, 3] and sets[0] < sets[1] < sets[2]
        changed = (frames[1:] != frames[:-1]).any(1).float().mean((1, 2))
        assert (changed > 0.005).all() and (changed < 0.3).all()  # one object and its shadow more
    assert [scenes.OBJECTS[i] for i in (0, 9, 23)] == ["gray cube", "red sphere", "yellow cylinder"]


def test_objects_do_not_overlap():
    f, size = scenes._sample_factors(400, 0), scenes.SIZE
    # footprints: a disc for round things, the disc around it for a cube
    radius = torch.tensor([size["cube"] * math.sqrt(2), size["sphere"], size["cylinder"]])[f["object"] // 8]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart = (f["place"][:, a] - f["place"][:, b]).norm(dim=1)
        assert (apart >= radius[:, a] + radius[:, b] + scenes.GAP - 1e-5).all()
    assert (f["object"].sort(1).values.diff(dim=1) > 0).all()  # no object twice
    assert f["object"].flatten().bincount(minlength=24).min() > 20


def test_objects_have_their_colour(rendered):
    middle = rendered[0][0::3, :, 25:31, 30:34].float().mean((2, 3))  # the first object stands there
    named = torch.tensor(list(scenes.COLOURS.values())).float()

    def hue(rgb):  # direction away from grey
        return normalize(rgb - rgb.mean(-1, keepdim=True), dim=-1)
    colour, grey = rendered[1][0::3, 0] % 8, middle[rendered[1][0::3, 0] % 8 == 0]
    found = (hue(middle) @ hue(named[1:]).T).argmax(1) + 1
    assert (found == colour)[colour > 0].float().mean() > 0.97
    assert len(grey) > 3 and (grey.amax(1) - grey.amin(1)).max() < 12


# ---------------------------------------------------------------------- digits

def test_digits_look_like_mnist_s_and_have_the_factors_said():
    images, labels, factors = digits.render(3000, seed=3)
    assert images.dtype == torch.uint8 and images.shape == (3000, 1, 28, 28) and labels.dtype == torch.int64
    assert labels.bincount(minlength=10).min() > 240 and labels.bincount().max() < 360  # 300 ± 16
    said = {"slant": (-0.55, 0.95), "width": (1.2, 5.3), "size": (12, 20 + 1e-4)}
    assert set(factors) == set(said)
    for name, (low, high) in said.items():
        x = factors[name]
        assert x.dtype == torch.float32 and low <= x.min() and x.max() <= high and x.std() > (high - low) / 20
    rows = (images[:, 0] > 127).any(2)
    wrong = 28.0 - rows.int().argmax(1) - rows.flip(1).int().argmax(1) - factors["size"]
    assert wrong.abs().max() < 2 and wrong.mean().abs() < 0.4
    assert images.amax((1, 2, 3)).min() > 200  # no stroke is too thin to be white
    x, at = images[:, 0].double() / 255, torch.arange(28).double()
    assert 0.12 < x.mean() < 0.14  # MNIST: 0.131
    for axis in (1, 2):
        centre = (x.sum(3 - axis) * at).sum(1) / x.sum((1, 2))
        assert abs(centre.mean() - 14) < 0.1 and (centre - 14).abs().max() < 2.5
    x[:, 1:-1, 1:-1] = 0
    assert x.max() == 0  # the border


def test_slant_and_width_are_the_true_ones():
    for size in (28, 64):
        images, labels, factors = digits.render(1000, image_size=size)
        slant, width = measures.slant_and_width(images / 127.5 - 1)
        for digit in range(10):
            one = labels == digit
            assert measures.spearman(slant[one], factors["slant"][one]) > 0.85
            assert measures.spearman(width[one], factors["width"][one]) > 0.95
        ones = labels == 1  # a plain stroke in most of them
        assert (slant - factors["slant"])[ones].abs().median() < 0.05
        assert slant[ones].std() / factors["slant"][ones].std() == pytest.approx(1, abs=0.05)
        assert (width / factors["width"]).median() == pytest.approx(0.98, abs=0.03)
    assert measures.slant_and_width(-torch.ones(2, 1, 28, 28))[0].isnan().all()
    tied = torch.stack([slant, width, slant * 0]).round(decimals=1)
    expected = scipy.stats.spearmanr(tied[0], tied[1]).statistic
    assert measures.spearman(tied[:1], tied[1:]).tolist() == pytest.approx([expected, 0])


def test_code_effects_are_those_of_each_code():
    """Code 1 shears a bar, code 2 thins it; noise and category must not matter."""
    def make(z, category, codes):
        at = torch.linspace(-1, 1, 32)
        x = at[None, None, :] + 0.4 * codes[:, 0, None, None] * at[None, :, None] + 0.1 * z[:, :1, None]
        width = 0.14 - 0.04 * codes[:, 1, None, None]
        ink = ((width - x.abs()) / 0.04 + 0.5).clamp(0, 1) * (at.abs() < 0.8)[None, :, None]
        return ink[:, None] * 2 - 1

    result = measures.code_effects(make, 3, 10, 2, torch.Generator().manual_seed(0), n_paths=20)
    assert result["code 1 ~ slant"] > 0.99 and result["code 2 ~ width"] < -0.99
    assert result["a code ~ slant"] > 0.99 and result["a code ~ width"] > 0.99  # whichever, whatever its sign
    assert result["code 1: change of slant"] == pytest.approx(0.8, abs=0.1)
    assert -0.16 * 14 < result["code 2: change of width"] < -0.08 * 14  # ends count, too
    assert abs(result["code 2: change of slant"]) < 0.1
    both = measures.code_effects(lambda z, k, codes: make(z, k, codes[:, :1].repeat(1, 2)), 3, 10, 2,
                                 torch.Generator().manual_seed(0), n_paths=20)  # code 2 does nothing
    assert both["code 1 ~ width"] < -0.7 and both["a code ~ slant"] > 0.9 and both["a code ~ width"] < 0.1
    blank = -torch.ones(4, 1, 32, 32)
    assert measures.code_effects(lambda *_: blank, 3, 10, 1, torch.Generator(), 4)["code 1 ~ slant"] == 0


def test_codes_are_matched_one_to_one_with_slant_and_width():
    def matched(*rows):
        effects = {f"code {c} ~ {name}": value for c, row in enumerate(rows, 1)
                   for name, value in zip(("slant", "width"), row, strict=True)}
        return [pytest.approx(value) for value in measures.match_codes(effects, len(rows)).values()]
    assert matched((-0.9, 0.1), (0.2, 0.8)) == [0.9, 0.8]
    assert matched((0.1, -0.9), (0.8, 0.2)) == [0.8, 0.9]
    assert matched((0.9, 0.8), (0.3, 0.1)) == [0.3, 0.8]  # 0.9 + 0.1 is less
    assert matched((0.9, 0.8), (0.1, 0.1), (0.0, -0.7)) == [0.9, 0.7]
    assert matched((0.5, -0.6)) == [0.0, 0.6]  # no code is left for slant


# ---------------------------------------------------------------------- faces

def test_every_combination_of_attributes_comes_equally_often():
    names, groups = faces.FACE_ATTRIBUTES, faces.FACE_GROUPS
    assert {name: len(x) for name, x in groups.items()} == {"hair": 6, "eyes": 4, "face": 3, "glasses": 2}
    assert len(set(names)) == 15 and not any("," in name for name in names)
    assert names[0] == "blonde hair" and names[6] == "brown eyes" and names[14] == "without glasses"
    for n, least, most in ((288, 2, 2), (200, 1, 2), (100, 1, 1)):
        images, labels = faces.render(n, 4, seed=1)
        assert images.dtype == torch.uint8 and images.shape == (n, 3, 4, 4)
        assert labels.dtype == torch.int64 and set(labels.flatten().tolist()) == {0, 1}
        assert all((part.sum(1) == 1).all() for part in labels.split([6, 4, 3, 2], 1))
        counts = labels.unique(dim=0, return_counts=True)[1]
        assert len(counts) == min(n, 144) and counts.min() == least and counts.max() == most
    assert (labels[:, :6].argmax(1).diff() < 0).sum() > 20  # shuffled


def test_a_face_s_colours_and_nothing_else_tell_its_attributes():
    looks, factors = faces._sample_factors(2880, 5)
    for part, (group, colours) in zip(looks.split([6, 4, 3, 2], 1), faces.FACE_COLOURS.items(), strict=False):
        named = torch.tensor(list(colours.values())) / 255
        assert torch.equal(torch.cdist(factors[group], named).argmin(1), part.argmax(1))
    assert (factors["backdrop"] - factors["hair"]).norm(dim=1).min() > 0.15
    for name in set(factors) - set(faces.FACE_GROUPS):
        both = torch.cat([looks, factors[name].flatten(1)], 1).T
        both = both[both.std(1) > 0]
        assert torch.corrcoef(both)[:15, 15:].abs().max() < 0.1, name  # by chance 0.02
    images, labels = faces.render(720, 24, seed=3)
    corner, labels = images[:, :, 0, 0].double(), labels.double()
    left = corner - labels @ torch.linalg.lstsq(labels, corner, driver="gelsd").solution
    assert (left.var(0) / corner.var(0)).min() > 0.95  # by chance 0.98
