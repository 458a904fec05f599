"""Grids with titles, labels and captions, glyphs, the GIF, curves and the grids of scenes."""
import ast
import csv
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from common import pictures
from tests.conftest import ROOT

GREYS = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 64, 64)


def grid(folder, *args, **options) -> np.ndarray:
    pictures.save_grid(folder / "grid.png", *args, **options)
    return np.array(Image.open(folder / "grid.png"))


@pytest.mark.parametrize("rows, captions", [([], []), (["one", "another"], [["red cube"], [], ["blue cube"]])])
def test_title_labels_images_and_captions_are_where_they_belong(tmp_path, rows, captions):
    found = grid(tmp_path, GREYS, "a title", nrow=2, rows=rows, captions=captions)
    below, left = (pictures.OBJECT_SIZE + 2) * bool(captions), found.shape[1] - 2 * 66 - 2
    assert found.shape[0] == 16 + 2 * (66 + below) + 2 and found[:16, :60].min() < 100
    assert left == (int(ImageFont.load_default(size=11).getlength("another")) + 6 if rows else 0)
    for k, value in enumerate((0, 128, 255)):  # two images in the first line, one in the second
        y, x = 18 + k // 2 * (66 + below), left + 2 + k % 2 * 66
        assert (found[y:y + 64, x:x + 64] == value).all() and (found[y - 2:y, x:x + 64] == 255).all()
        if captions:  # the glyph's middle
            assert tuple(found[y + 64 + 7, x + 5]) == ((255, 0, 0), (255,) * 3, (0, 0, 255))[k]
        if rows:  # ink in the middle of the line alone
            ink = np.nonzero(found[y - 2:y + 64, :left].min((1, 2)) < 100)[0]
            assert 24 < ink[0] < 33 < ink[-1] < 42


def test_small_images_are_enlarged_pixel_by_pixel(tmp_path):
    images = torch.rand(1, 1, 24, 24) * 2 - 1
    expected = np.kron((images[0, 0].numpy() / 2 + 0.5) * 255, np.ones((3, 3)))
    found = grid(tmp_path, images, "a title")[-74:-2, 2:-2]
    assert found.shape == (72, 72, 3) and np.abs(found - expected[..., None]).max() < 0.51


def test_a_long_title_wraps(tmp_path):
    found = grid(tmp_path, GREYS[:1], "every word of it counts " * 4)
    lines = (len(found) - 68 - 2) // pictures.LINE
    assert found.shape[1] == 68 and lines * pictures.LINE + 2 + 68 == len(found) and lines >= 96 * 6 / 68 - 1
    for i in range(lines):  # there is ink in each, and none is cut off at the right
        line = found[i * pictures.LINE:(i + 1) * pictures.LINE]
        assert line.min() < 100 and (line[:, -1] == 255).all()


def test_the_font_has_every_character_that_is_written():
    def mask(character):
        return bytes(font.getmask(character))
    font, text = ImageFont.load_default(size=11), string.printable[:95] + "".join(map(chr, pictures.FONT_LACKS))
    for path in [*ROOT.glob("*.py"), ROOT / "common" / "run.py", ROOT / "common" / "pictures.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(call, "func", None)
            if getattr(name, "attr", getattr(name, "id", "")) in ("save_grid", "picture", "title", "save"):
                text += "".join(str(n.value) for n in ast.walk(call) if isinstance(n, ast.Constant))
    missing = mask("\ue000")  # no font has a character for private use
    assert mask("×") == missing  # so the comparison can tell
    assert [c for c in sorted(set(text.translate(pictures.FONT_LACKS)) - {" "}) if mask(c) == missing] == []


def test_glyphs_tell_shapes_and_colours_apart():
    glyphs = set()
    for name in [f"{colour} {shape}" for colour in ("red", "gray", "cyan") for shape in ("cube", "sphere", "cylinder")]:
        canvas = Image.new("RGB", (pictures.OBJECT_SIZE,) * 2, "white")
        pictures.draw_object(ImageDraw.Draw(canvas), 0, 0, name)
        glyphs.add(canvas.tobytes())
        assert canvas.getpixel((5, 5)) == Image.new("RGB", (1, 1), name.split()[0]).getpixel((0, 0))
    assert len(glyphs) == 9


@pytest.mark.parametrize("n, size, frames", [(3, 8, 3), (130, 8, 60), (30, 1000, 12), (0, 8, 0)])
def test_the_gif_has_few_frames_from_first_to_last(tmp_path, n, size, frames):
    paths = [tmp_path / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.new("RGB", (size, size), (i, 255 - i, 0)).save(path)
    pictures.save_gif(tmp_path / "x.gif", paths)
    assert (tmp_path / "x.gif").exists() == bool(n)
    if n:
        with Image.open(tmp_path / "x.gif") as gif:
            assert gif.n_frames == frames and gif.convert("RGB").getpixel((0, 0)) == (0, 255, 0)
            gif.seek(frames - 1)
            assert gif.convert("RGB").getpixel((0, 0)) == (n - 1, 256 - n, 0) and gif.info["duration"] == 2000


def test_curves_have_a_panel_each(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    made, table, original = [], tmp_path / "metrics.csv", figure.Figure
    monkeypatch.setattr(figure, "Figure", lambda *a, **o: made.append(original(*a, **o)) or made[-1])
    names = ["g_loss", "d_real", "d_fake", "kl", "accuracy_val", "tv_digits", "fd_judge"]
    with open(table, "w", newline="") as f:
        csv.writer(f).writerows([["step", "seconds", *names], [2, 1, 1, 2, 3, 4, "", "", ""], [4, 2, *range(1, 8)]])
    assert pictures.save_curves(table, tmp_path / "curves.png", "a title")
    panels = {ax.get_ylabel(): [line.get_label() for line in ax.lines] for ax in made[0].axes}
    assert panels == {"accuracy": names[4:6], "Fréchet distance": names[6:], "D's output": names[1:3],
                      "losses": [names[0], names[3]]}
    assert [len(line.get_xdata()) for ax in made[0].axes for line in ax.lines] == [1, 1, 1, 2, 2, 2, 2]
    assert made[0].axes[0].get_title() == "a title" and Image.open(tmp_path / "curves.png").width == 880


def test_scenes_leave_five_grids(tmp_path):
    labels = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 2, 2], [0, 1, 2]])
    data = SimpleNamespace(tests={"test": labels, "new_test": labels[:2]}, images=torch.full((4, 3, 64, 64), 255).byte(),
                           labels=labels, classes=("red cube", "blue sphere"))
    asked = []

    def sample(z, y):
        asked.append((z, y))
        return torch.full((len(z), 3, 64, 64), -1.0)
    pictures.save_scenes(sample, 5, data, tmp_path, "title", 0)
    assert {p.stem for p in tmp_path.iterdir()} == {"test", "new_test", "real_beside_generated", "objects",
                                                    "interpolation"}
    found = np.array(Image.open(tmp_path / "real_beside_generated.png"))[-8 * 79 - 2:]
    for row in range(8):  # real lines, white here, above generated ones, black, with the same captions
        assert (found[2 + row * 79:66 + row * 79, 2:66] == 255 * (1 - row % 2)).all()
    captions = [found[68 + row * 79:79 + row * 79] for row in range(8)]
    assert all((a == b).all() for a, b in zip(captions[::2], captions[1::2], strict=True)) and captions[0].min() == 0
    (z, alone), (lines, same_labels) = asked[-2:]
    assert alone.tolist() == [[0, 2, 2], [1, 2, 2]] and (z == z[0]).all()
    lines, same_labels = lines.view(4, 8, 5), same_labels.view(4, 8, 3)
    torch.testing.assert_close(lines.diff(dim=1), (lines[:, -1:] - lines[:, :1]).expand(4, 7, 5) / 7)
    assert (same_labels == same_labels[:, :1]).all() and (lines[:, 0] != lines[:, -1]).all()
    assert pictures.names_of(labels[:2], data.classes) == [["red cube", "blue sphere"], ["red cube"]]
