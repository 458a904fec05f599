"""Grids with titles, labels and captions, glyphs, the GIF, curves and the grids of scenes."""
import math
import re
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from common import pictures
from tests.conftest import ROOT

WHITE, GREYS = (255,) * 3, [-1.0, 0.0, 1.0]
PRIVATE = "\ue000"  # a character that no font has: it is rendered as the sign for what is missing


def grid(path, *args, **options) -> np.ndarray:
    pictures.save_grid(path, *args, **options)
    return np.array(Image.open(path))


def test_images_are_below_the_title_a_pixel_apart_from_captions_and_labels(tmp_path):
    images = torch.stack([torch.full((3, 64, 64), v) for v in GREYS])
    plain = grid(tmp_path / "a.png", images, "a title", nrow=2)
    assert plain.shape == (16 + 2 * 66 + 2, 2 * 66 + 2, 3)
    for k, value in enumerate((0, 128, 255)):  # two in the first line, one in the second
        row, column = divmod(k, 2)
        y, x = 16 + 2 + row * 66, 2 + column * 66
        assert (plain[y:y + 64, x:x + 64] == value).all(), k
    assert (plain[16:18] == 255).all() and (plain[18:82, 66:68] == 255).all()  # between images it is white
    assert plain[:16].min() < 100  # ink
    names, below = ["one", "another"], pictures.OBJECT_SIZE + 2
    found = grid(tmp_path / "b.png", images, "a title", nrow=2, rows=names, captions=[["red cube"], [], ["blue cube"]])
    left = found.shape[1] - plain.shape[1]
    assert left > ImageFont.load_default(size=11).getlength("another")
    assert found.shape[0] == plain.shape[0] + 2 * below
    for k, value in enumerate((0, 128, 255)):
        row, column = divmod(k, 2)
        y, x = 18 + row * (66 + below), left + 2 + column * 66
        assert (found[y:y + 64, x:x + 64] == value).all(), k
        middle = found[y + 24:y + 40, :left]
        assert middle.min() < 100 and (found[y:y + 16, :left] == 255).all()  # the line's label, and nothing else
        colour = {0: (255, 0, 0), 2: (0, 0, 255)}.get(k, WHITE)
        assert tuple(found[y + 64 + 5, x + 5]) == colour, k  # in the caption, inside of the glyph
    for y in (34, 34 + 66 + below):  # in the middle of its line: as far above as below
        ink = np.nonzero(found[y - 16:y + 48, :left].min((1, 2)) < 100)[0]
        assert abs((ink[0] + ink[-1]) / 2 - 32) < 4


def test_small_images_are_enlarged_pixel_by_pixel(tmp_path):
    images = torch.rand(1, 1, 24, 24) * 2 - 1
    found = grid(tmp_path / "a.png", images, "", nrow=1)[-74:-2, 2:-2]  # without a title, three times 24
    expected = np.kron(((images[0, 0] / 2 + 0.5) * 255).round().numpy(), np.ones((3, 3)))
    assert found.shape == (72, 72, 3) and np.abs(found - expected[..., None]).max() <= 1


def test_long_titles_wrap_and_none_is_cut_off(tmp_path):
    image, words = torch.ones(1, 3, 64, 64), "every word of it counts " * 3
    one, more = (grid(tmp_path / "a.png", image, text, nrow=1) for text in ("word", words))
    assert one.shape[1] == more.shape[1] and (more.shape[0] - one.shape[0]) % pictures.LINE == 0
    lines = (more.shape[0] - 68 - 2) // pictures.LINE
    assert lines >= math.ceil(len(words) * 6 / 68)
    for i in range(lines):  # ink in each, and none at the right edge
        line = more[i * pictures.LINE:(i + 1) * pictures.LINE]
        assert line.min() < 100 and line[:, -1].min() == 255


def test_the_font_has_every_character_of_a_title():
    font = ImageFont.load_default(size=11)

    def drawn(character):
        return bytes(font.getmask(character))
    source = "".join(path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "common" / "pictures.py"])
    special = set(re.findall(r"[^\x00-\x7f]", source)) & set(pictures.FONT_LACKS and map(chr, pictures.FONT_LACKS))
    assert special and len(drawn(PRIVATE)) > 0
