"""The drawn scenes: what they are said to show is what they show."""
import math

import pytest
import torch

from common import worlds


@pytest.fixture(scope="module")
def drawn():
    return worlds.scenes(30, 64, seed=3)


def test_one_seed_gives_the_same_pixels_for_any_batch_size(drawn):
    again = worlds.scenes(30, 64, seed=3, batch=7)
    for a, b in zip(drawn, again):
        assert torch.equal(a, b)
    assert not torch.equal(worlds.scenes(30, 64, seed=4)[0], drawn[0])


def test_frames_are_nested_and_labels_padded(drawn):
    images, labels, scene = drawn
    assert images.dtype == torch.uint8 and images.shape == (90, 3, 64, 64)
    assert scene.tolist() == [i // 3 for i in range(90)]
    for i in range(30):
        sets = [set(row.tolist()) - {worlds.NULL} for row in labels[3 * i:3 * i + 3]]
        assert [len(s) for s in sets] == [1, 2, 3] and sets[0] < sets[1] < sets[2]
        frames = images[3 * i:3 * i + 3].int()
        changed = (frames[1:] != frames[:-1]).any(1).float().mean((1, 2))
        assert (changed > 0.005).all() and (changed < 0.3).all()  # one object and its shadow more
    assert (labels.sort(1).values == labels).all()


def test_objects_do_not_overlap():
    f = worlds._draw_factors(400, 0)
    shape = f["object"] // 8
    # footprints: a disc for round things, the disc around it for a cube
    radius = torch.tensor(
        [worlds.SIZE["cube"] * math.sqrt(2), worlds.SIZE["sphere"], worlds.SIZE["cylinder"]]
    )[shape]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        apart = (f["place"][:, a] - f["place"][:, b]).norm(dim=1)
        assert (apart >= radius[:, a] + radius[:, b] + worlds.GAP - 1e-5).all()
    assert (f["object"].sort(1).values.diff(dim=1) > 0).all()  # no object twice
    assert f["object"].flatten().bincount(minlength=24).min() > 20


def test_classes_are_in_i_clevr_s_order():
    assert worlds.OBJECTS[0] == "gray cube" and worlds.OBJECTS[9] == "red sphere"
    assert worlds.OBJECTS[23] == "yellow cylinder" and len(worlds.OBJECTS) == worlds.NULL == 24


def test_objects_have_their_colour():
    images, labels, _ = worlds.scenes(200, 64, seed=5)
    middle = images[0::3, :, 25:31, 30:34].float().mean((2, 3))  # the first object stands there
    named = torch.tensor(list(worlds.COLOURS.values())).float()

    def hue(rgb):  # direction away from grey
        return torch.nn.functional.normalize(rgb - rgb.mean(-1, keepdim=True), dim=-1)
    colour = labels[0::3, 0] % 8
    coloured = colour > 0
    found = (hue(middle) @ hue(named[1:]).T).argmax(1) + 1
    assert (found == colour)[coloured].float().mean() > 0.97
    grey = middle[~coloured]
    assert (grey.amax(1) - grey.amin(1)).max() < 12


@pytest.mark.parametrize("shape", worlds.SHAPES)
def test_intersection_lies_on_the_surface(shape):
    g = torch.Generator().manual_seed(0)
    o = torch.nn.functional.normalize(torch.randn(2000, 3, generator=g), dim=1) * 5
    d = torch.randn(2000, 3, generator=g) * 0.4 - o
    t, hit, normal = worlds._intersect(shape, o, d)
    p, r = (o + t[:, None] * d)[hit], worlds.SIZE[shape]
    assert 0.2 < hit.float().mean() < 1
    if shape == "sphere":
        surface = p.norm(dim=1) - r
    elif shape == "cube":
        surface = p.abs().amax(1) - r
    else:
        surface = torch.maximum(p[:, :2].norm(dim=1) - r, p[:, 2].abs() - worlds.CYLINDER_HALF_HEIGHT)
    assert surface.abs().max() < 1e-4
    assert ((normal[hit] * d[hit]).sum(1) < 0).all()  # faces the viewer
    torch.testing.assert_close(normal[hit].norm(dim=1), torch.ones(len(p)), atol=1e-4, rtol=0)
