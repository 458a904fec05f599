"""Grids with titles, labels and captions, glyphs, the GIF and curves."""
import ast
import json
import string

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from harness import pictures
from harness.cli import Settings
from tests.conftest import ROOT

GREYS = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 64, 64)


def grid(folder, *args, **options) -> np.ndarray:
    pictures.save_grid(folder / "grid.png", *args, **options)
    return np.array(Image.open(folder / "grid.png"))


@pytest.mark.parametrize("rows, captions", [((), ()), (("one", "other"), (["red cube"], [], ["blue cube"]))])
def test_title_labels_images_and_captions_are_where_they_belong(tmp_path, rows, captions):
    found = grid(tmp_path, GREYS, "a title", nrow=2, rows=rows, captions=captions)
    below, left = (pictures.OBJECT_SIZE + 2) * bool(captions), found.shape[1] - 2 * 66 - 2
    assert found.shape[0] == 16 + 2 * (66 + below) + 2 and found[:16, :60].min() < 100
    assert left == (int(ImageFont.load_default(size=11).getlength("other")) + 6 if rows else 0)
    for k, value in enumerate((0, 128, 255)):  # two images in the first row, one in the second
        y, x = 18 + k // 2 * (66 + below), left + 2 + k % 2 * 66
        assert (found[y:y + 64, x:x + 64] == value).all() and (found[y - 2:y, x:x + 64] == 255).all()
        if captions:  # the glyph's middle
            assert tuple(found[y + 64 + 7, x + 5]) == ((255, 0, 0), (255,) * 3, (0, 0, 255))[k]
        if rows:  # ink in the middle of the row alone
            ink = np.nonzero(found[y - 2:y + 64, :left].min((1, 2)) < 100)[0]
            assert 24 < ink[0] < 33 < ink[-1] < 42


def test_small_images_are_enlarged_and_long_titles_wrap(tmp_path):
    images = torch.rand(2, 1, 24, 24) * 2 - 1
    found = grid(tmp_path, images, "every word of it counts " * 6)
    expected = np.kron((images[0, 0].numpy() / 2 + 0.5) * 255, np.ones((3, 3)))
    assert np.abs(found[-74:-2, 2:74] - expected[..., None]).max() < 0.51  # pixel by pixel
    title, rest = found[:-76 - 2], (len(found) - 76 - 2) % 14
    assert found.shape[1] == 150 and rest == 0 and len(title) / 14 >= 143 * 6 / 150 - 1
    for line in np.split(title, len(title) // 14):  # there is ink in each, and none is cut off at the right
        assert line.min() < 100 and (line[:, -1] == 255).all()


def test_real_images_stand_above_generated_ones_and_are_named():
    real, fake = torch.arange(8).view(8, 1, 1, 1).byte(), torch.arange(8.0).view(8, 1, 1, 1)
    both = pictures.real_above_generated(real, fake, nrow=4).view(4, 4)
    torch.testing.assert_close(both[::2].flatten(), torch.arange(8) / 127.5 - 1)
    assert torch.equal(both[1::2].flatten(), torch.arange(8.0))
    sets, attributes = torch.tensor([[0, 1, 2], [1, 2, 2]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert pictures.names_of(sets, ("red cube", "hat")) == [["red cube", "hat"], ["hat"]]
    assert pictures.names_of(attributes, ("red cube", "hat")) == [["red cube"], []]


def test_the_font_has_every_character_that_is_written():
    text, calls = string.printable[:95] + "×→…·–±−", ("save_grid", "log_images", "register", "save")
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):  # all strings of calls that end in a picture
            name = getattr(call, "func", None)
            if getattr(name, "attr", getattr(name, "id", "")) in calls:
                text += "".join(str(n.value) for n in ast.walk(call) if isinstance(n, ast.Constant))
    text = "é\ue000" + text.translate(pictures.FONT_LACKS)  # no font has the second, and this one lacks é
    masks = {c: bytes(ImageFont.load_default(size=11).getmask(c)) for c in text}
    assert [c for c in masks if masks[c] == masks["\ue000"]] == ["é", "\ue000"]


def test_glyphs_tell_shapes_and_colours_apart():
    glyphs = set()
    for name in "red cube", "red sphere", "red cylinder", "gray cube", "gray sphere", "gray cylinder":
        canvas = Image.new("RGB", (pictures.OBJECT_SIZE,) * 2, "white")
        pictures.draw_object(ImageDraw.Draw(canvas), 0, 0, name)
        assert canvas.getpixel((5, 5)) == ((255, 0, 0) if "red" in name else (128,) * 3)
        glyphs |= {canvas.tobytes(), canvas.convert("L").point(lambda v: v == 255).tobytes()}
    assert len(glyphs) == 6 + 3  # shapes differ in outline, too


def test_names_that_are_no_coloured_shapes_are_captions_in_words(tmp_path):
    """Each in a line of its own, below an image of the same width as the words at most."""
    for odd in ("hat", "red hat", "teal-ish cube", "red cube again"):
        captions = [["red cube", odd], [], ["blue cube"]]
        found = grid(tmp_path, GREYS, "a title", nrow=2, captions=captions)
        below = 2 * (pictures.OBJECT_SIZE + 2)
        assert found.shape[0] == 16 + 2 * (66 + below) + 2
        assert (found.max(-1) == found.min(-1)).all()  # no glyph's colour
        for k, lines in enumerate(captions):
            y, x = 18 + k // 2 * (66 + below) + 64, 2 + k % 2 * 66
            for line in range(2):  # written or empty
                ink = found[y + 1 + 13 * line:y + 13 + 13 * line, x:x + 64] < 100
                assert ink.any() == (line < len(lines)), (odd, k, line)
                assert found[y + 1 + 13 * line:y + 13 + 13 * line, x - 2:x].min() == 255


def test_single_images_are_numbered_in_the_order_of_their_labels(tmp_path):
    """One of each of the labels, or as many as are asked for."""
    calls = []

    def sample(n, g, y=None):
        calls.append((n, y is None))
        y = torch.randint(256, (n,), generator=g) if y is None else y
        return (y.view(-1, 1, 1, 1) / 127.5 - 1).expand(-1, 1, 2, 2), y

    def described(labels):
        return [{"grey": x} for x in labels.tolist()]
    labels = (torch.arange(101) * 7) % 256  # more than are made at once
    for wanted, n, made in ((labels, 5, [(100, False), (1, False)]), (None, 7, [(7, True)])):
        folder = tmp_path / str(n)
        calls.clear()
        pictures.save_images(sample, Settings(to=str(folder), n=n), described, wanted)
        files, named = sorted(folder.glob("*.png")), json.loads((folder / "labels.json").read_text())
        assert calls == made and list(named) == [path.name for path in files]
        greys = [np.asarray(Image.open(path)).max().item() for path in files]
        assert greys == [x["grey"] for x in named.values()] and len(greys) == (n if wanted is None else 101)
        assert wanted is None or greys == labels.tolist()
    assert files[0].name == "0.png" and (tmp_path / "5" / "000.png").exists()
    pictures.save_images(lambda n, g: (torch.zeros(n, 1, 2, 2), None), Settings(to=str(tmp_path / "x")), None)
    assert len([*(tmp_path / "x").iterdir()]) == 100  # no labels.json


def test_captions_keep_their_colours_in_the_gif(tmp_path):
    colours = "gray red blue green brown purple cyan yellow".split()
    images = torch.rand(40, 3, 64, 64) * torch.linspace(0, 0.6, 64) - 0.5  # many colours besides
    captions = [[f"{colour} cube"] for colour in colours * 5]
    grid = pictures.save_grid(tmp_path / "0.png", images, "x", captions=captions)
    pictures.save_gif(tmp_path / "x.gif", [tmp_path / "0.png"])
    shown = Image.open(tmp_path / "x.gif").convert("RGB")
    for colour in map(ImageColor.getrgb, colours):
        y, x = (np.asarray(grid) == colour).all(-1).nonzero()
        found = np.abs(np.asarray(shown)[y, x] - np.array(colour, dtype=int))
        assert len(y) > 100 and found.max() < 20, colour


@pytest.mark.parametrize("n, size, frames", [(3, 8, 3), (130, 8, 60), (14, 1000, 12)])
def test_the_gif_has_few_frames_from_first_to_last(tmp_path, n, size, frames):
    paths = [tmp_path / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.new("RGB", (size, size), (i, 255 - i, 0)).save(path)
    pictures.save_gif(tmp_path / "x.gif", paths)
    for frame, i, duration in ((0, 0, 250), (frames - 1, n - 1, 2000)):
        with Image.open(tmp_path / "x.gif") as gif:
            gif.seek(frame)
            pixel = gif.convert("RGB").getpixel((0, 0))
            assert (gif.n_frames, gif.info["duration"], pixel) == (frames, duration, (i, 255 - i, 0))


def test_curves_have_a_panel_each(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    made, curves, original = [], tmp_path / "curves.png", figure.Figure
    monkeypatch.setattr(figure, "Figure", lambda *a, **o: made.append(original(*a, **o)) or made[-1])
    losses = dict(g_loss="1", d_real="2", d_fake="3", kl="4")
    rows = [{"step": 2, "seconds": 1.0} | losses,
            {"step": "4", "seconds": "2"} | losses | dict(accuracy_val="5", tv_digits="6", fd_judge="7")]
    pictures.save_curves(rows, curves, "a title")
    assert Image.open(curves).format == "PNG"
    found = [(ax.get_ylabel(), " ".join(line.get_label() for line in ax.lines)) for ax in made[0].axes]
    assert found == [("accuracy or TV", "accuracy_val tv_digits"), ("Fréchet distance", "fd_judge"),
                     ("D's output", "d_real d_fake"), ("losses", "g_loss kl")]
