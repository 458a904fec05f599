"""Grids with a title and captions, single images, the GIF of a run's progress, curves of its metrics."""
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from common.datasets import Data, to_float
from common.files import atomic_write, write_json
from harness.cli import Settings

FONT_LACKS = str.maketrans({"×": "x", "→": "to", "…": "...", "·": " ", "–": "-", "±": "+-", "−": "-"})
OBJECT_SIZE = 11  # pixels a caption's glyph takes
SHAPES = ("cube", "sphere", "cylinder")


def save_grid(path: Path, images: torch.Tensor, title: str, nrow: int = 8, rows: Sequence[str] = (),
              captions: Sequence[Sequence[str]] = ()) -> Image.Image:
    """Write images [N, 1 or 3, H, W] in [-1, 1] as one PNG, nrow to a row, under a title; return it. rows: a
    label for each row. captions: for each image the objects requested in it, shown below it: "red cube" as a
    square, a circle or a cylinder of that colour, other names as lines of text.
    """
    images = images.detach().cpu().float().clamp(-1, 1) / 2 + 0.5
    images = F.interpolate(images, scale_factor=max(1, math.ceil(64 / images.shape[-1])))  # pixel by pixel
    tile = images.shape[-1] + 2
    names = [name.split(" ") for objects in captions for name in objects]
    as_text = any(len(n) != 2 or n[0] not in ImageColor.colormap or n[1] not in SHAPES for n in names)
    lines = max(map(len, captions), default=0) if as_text else min(len(captions), 1)
    below = (OBJECT_SIZE + 2) * lines  # white space for captions
    grid = make_grid(F.pad(images, (0, 0, 0, below), value=1.0), nrow=nrow, padding=2, pad_value=1.0)
    pixels = to_pil_image((grid * 255).round().byte())
    font = ImageFont.load_default(size=11)
    labels = [label.translate(FONT_LACKS) for label in rows]
    left = int(max(map(font.getlength, labels), default=-6)) + 6
    title = textwrap.wrap(title.translate(FONT_LACKS), (left + pixels.width) // 6)  # 6 pixels a character
    top = 14 * len(title) + 2
    canvas = Image.new("RGB", (left + pixels.width, top + pixels.height), "white")
    canvas.paste(pixels, (left, top))
    pen = ImageDraw.Draw(canvas)
    pen.multiline_text((3, 0), "\n".join(title), "black", font, spacing=2)
    for i, label in enumerate(labels):
        pen.text((3, top + i * (tile + below) + tile // 2 - 6), label, "black", font)
    for i, objects in enumerate(captions):
        row, column = divmod(i, min(nrow, len(images)))
        x, y = left + column * tile + 2, top + row * (tile + below) + tile
        for k, name in enumerate(objects):
            if as_text:
                pen.text((x, y + k * (OBJECT_SIZE + 2)), name[:tile // 6], "black", font)
            else:
                draw_object(pen, x + k * (OBJECT_SIZE + 6), y + 1, name)
    atomic_write(path, lambda p: canvas.save(p))
    return canvas


def draw_object(pen: ImageDraw.ImageDraw, x: int, y: int, name: str) -> None:
    """A glyph for "red cube", "gray sphere", "cyan cylinder" …: a square, a circle, a cylinder."""
    colour, _, shape = name.partition(" ")
    size, style = OBJECT_SIZE - 2, dict(fill=colour, outline="black")
    if shape == "cube":
        pen.rectangle((x, y, x + size, y + size), **style)
    elif shape == "sphere":
        pen.ellipse((x, y, x + size, y + size), **style)
    else:
        pen.rounded_rectangle((x + 1, y, x + size - 1, y + size), 3, **style)
        pen.ellipse((x + 1, y, x + size - 1, y + 3), **style)  # the lid


def real_above_generated(real: torch.Tensor, fake: torch.Tensor, nrow: int = 8) -> torch.Tensor:
    """Pairs of rows for save_grid: nrow of the uint8 images `real`, below them as many of `fake`."""
    pairs = torch.stack([to_float(real).cpu(), fake.cpu()]).unflatten(1, (-1, nrow))
    return pairs.transpose(0, 1).flatten(0, 2)


def names_of(labels: torch.Tensor, classes: Sequence[str]) -> list[list[str]]:
    """The requested objects of each label set [N, 3], or attributes of each face, float [N, A]."""
    sets = [y.nonzero().flatten() for y in labels] if labels.is_floating_point() else labels
    return [[classes[i] for i in ids if i < len(classes)] for ids in map(torch.Tensor.tolist, sets)]


def save_scenes(sample: Callable[..., tuple], data: Data, run) -> None:
    """Save grids of scenes in run.folder: both test lists, each object alone, training images above generated
    ones. sample(n, g, labels [n, 3]) → images [n, 3, S, S] in [-1, 1], labels.
    """
    g = torch.Generator().manual_seed(run.cfg.seed)
    alone = F.pad(torch.arange(len(data.classes))[:, None], (0, 2), value=len(data.classes))
    for name, y in {**data.test_label_sets, "objects": alone}.items():
        save_grid(run.folder / f"{name}.png", sample(len(y), g, y)[0], captions=names_of(y, data.classes),
                  title=f"{run.title}: {name}, requested objects below each image")
    if len(data.images):
        index = torch.randint(len(data.images), (32,), generator=g)
        y = data.labels[index]
        save_grid(run.folder / "real_beside_generated.png",
                  real_above_generated(data.images[index], sample(32, g, y)[0]),
                  f"{run.title}: training images, below each row generated ones with the same labels",
                  captions=names_of(y.view(4, 8, 3).repeat(1, 2, 1).flatten(0, 1), data.classes))


def save_images(sample: Callable[..., tuple], cfg: Settings, describe: Callable[[torch.Tensor], list],
                labels: torch.Tensor | None = None) -> None:
    """Write PNGs, numbered in order, to the new folder cfg.to, and labels.json, {file: what was requested}.

    sample(n, g[, labels]) → images [n, C, S, S] in [-1, 1] and their labels or None: one image of each of
    `labels` [N, …], or cfg.n of labels that it draws. describe(labels) → what labels.json holds of each.
    """
    n, folder, requested = cfg.n if labels is None else len(labels), Path(cfg.to), {}
    g = torch.Generator().manual_seed(cfg.seed)
    for part in torch.arange(n).split(100):
        images, shown = sample(len(part), g, *(() if labels is None else (labels[part],)))
        folder.mkdir(parents=True, exist_ok=True)
        files = [f"{i:0{len(str(n - 1))}}.png" for i in part.tolist()]
        for file, image in zip(files, images, strict=True):
            to_pil_image(((image + 1) * 127.5).round().clamp(0, 255).byte().cpu()).save(folder / file)
        if shown is not None:
            requested |= zip(files, describe(shown), strict=True)
    if requested:
        write_json(folder / "labels.json", requested)
    print(f"{folder}: {n:,} images")


def save_gif(path: Path, pictures: list[Path]) -> None:
    """An endless GIF of at most 60 of these PNGs, fewer if they are large; the last is shown longer."""
    last = Image.open(pictures[-1]).convert("RGB")
    n = min(len(pictures), 60, max(10, 12_000_000 // (last.width * last.height)))
    chosen = [pictures[round(i * (len(pictures) - 1) / max(1, n - 1))] for i in range(n)]
    frames = [Image.open(p).convert("RGB").resize(last.size) for p in chosen]
    # a frame has 256 colours: Pillow's usual choice of them makes the captions' red and purple the same
    frames = [frame.quantize(method=Image.Quantize.FASTOCTREE) for frame in frames]
    options = dict(save_all=True, append_images=frames[1:], loop=0, duration=[250] * (n - 1) + [2000])
    atomic_write(path, lambda p: frames[0].save(p, **options))


# the panels of curves.png: title, and how the names of their columns begin
PANELS = {"accuracy or TV": ("accuracy", "tv"), "Fréchet distance": ("fd", "fid"),
          "D's output": ("d_real", "d_fake"), "losses": ("",)}


def save_curves(rows: list[dict], path: Path, title: str) -> None:
    """Plot the columns of metrics.csv over the step. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    panels = {panel: [] for panel in PANELS}
    for name in dict.fromkeys(name for row in rows for name in row if name not in ("step", "seconds")):
        panels[next(panel for panel, begins in PANELS.items() if name.startswith(begins))].append(name)
    panels = {panel: names for panel, names in panels.items() if names}
    figure = Figure(figsize=(8, 1 + 2.4 * len(panels)), layout="tight")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (panel, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            ax.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else None, label=name)
        ax.set(ylabel=panel, xlabel="iteration", yscale="log" if panel == "Fréchet distance" else "linear")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_title(title, fontsize=9)
    atomic_write(path, lambda p: figure.savefig(p, dpi=110))
