"""Pictures: grids with a title and captions, the GIF of a run's progress, curves of its metrics."""
import csv
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from common.datasets import Data, to_float
from common.system import write_whole

FONT_LACKS = str.maketrans({"×": "x", "→": "to", "…": "...", "·": " ", "–": "-", "±": "+-", "−": "-"})
LINE = 14  # pixels a line of text takes
OBJECT_SIZE = 11  # pixels a caption's glyph takes


def save_grid(path: Path, images: torch.Tensor, title: str, nrow: int = 8, rows: Sequence[str] = (),
              captions: Sequence[Sequence[str]] = ()) -> None:
    """Write images [N, 1 or 3, H, W] in [-1, 1] as one PNG, nrow to a line, under a title.

    rows: a label to the left of each line. captions: for each image the objects requested in it, such as
    ["red cube", "blue sphere"], shown below it as a square, a circle or a cylinder of that colour.
    """
    images = images.detach().cpu().float()
    scale = max(1, math.ceil(64 / images.shape[-1]))  # small images are enlarged, pixel by pixel
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).clamp(-1, 1) / 2 + 0.5
    tile = images.shape[-1] + 2
    below = OBJECT_SIZE + 2 if captions else 0  # white space for captions
    images = torch.nn.functional.pad(images, (0, 0, 0, below), value=1.0)
    grid = make_grid(images, nrow=nrow, padding=2, pad_value=1.0)
    pixels = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
    font = ImageFont.load_default(size=11)
    labels = [label.translate(FONT_LACKS) for label in rows]
    left = int(max(map(font.getlength, labels), default=-6)) + 6
    lines = textwrap.wrap(title.translate(FONT_LACKS), (left + pixels.width) // 6)  # 6 pixels a character
    top = LINE * len(lines) + 2
    canvas = Image.new("RGB", (left + pixels.width, top + pixels.height), "white")
    canvas.paste(pixels, (left, top))
    pen = ImageDraw.Draw(canvas)
    pen.multiline_text((3, 0), "\n".join(lines), fill="black", font=font, spacing=LINE - 12)
    for i, label in enumerate(labels):
        pen.text((3, top + i * (tile + below) + tile // 2 - 6), label, fill="black", font=font)
    for i, objects in enumerate(captions):
        row, column = divmod(i, min(nrow, len(images)))
        x, y = left + column * tile + 2, top + row * (tile + below) + tile
        for k, name in enumerate(objects):
            draw_object(pen, x + k * (OBJECT_SIZE + 6), y + 1, name)
    write_whole(path, lambda p: canvas.save(p))


def draw_object(pen: ImageDraw.ImageDraw, x: int, y: int, name: str) -> None:
    """A glyph for "red cube", "gray sphere", "cyan cylinder" …: a square, a circle, a cylinder."""
    colour, _, shape = name.partition(" ")
    size, style = OBJECT_SIZE - 2, dict(fill=colour, outline="black")
    if shape == "cube":
        pen.rectangle((x, y, x + size, y + size), **style)
    elif shape == "sphere":
        pen.ellipse((x, y, x + size, y + size), **style)
    else:  # the body, then the lid
        pen.rounded_rectangle((x + 1, y, x + size - 1, y + size), 3, **style)
        pen.ellipse((x + 1, y, x + size - 1, y + 3), **style)


def real_above_generated(real: torch.Tensor, fake: torch.Tensor, nrow: int = 8) -> torch.Tensor:
    """Pairs of lines for save_grid: nrow of the uint8 images `real`, below them as many of `fake`."""
    pairs = torch.stack([to_float(real).cpu(), fake.cpu()]).unflatten(1, (-1, nrow))
    return pairs.transpose(0, 1).flatten(0, 2)


def names_of(labels: torch.Tensor, classes: Sequence[str]) -> list[list[str]]:
    """The requested objects of each label set [N, 3], for captions."""
    return [[classes[i] for i in ids if i < len(classes)] for ids in labels.tolist()]


@torch.no_grad()
def save_scenes(sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z_dim: int, data: Data,
                folder: Path, title: str, seed: int) -> None:
    """Grids of scenes: both test lists, real above generated, each object alone, interpolations in z.

    sample(z [N, z_dim], labels [N, 3]) → images [N, 3, H, W] in [-1, 1].
    """
    g = torch.Generator().manual_seed(seed)

    def save(name: str, labels: torch.Tensor, what: str, z: torch.Tensor | None = None) -> None:
        z = torch.randn(len(labels), z_dim, generator=g) if z is None else z
        save_grid(folder / f"{name}.png", sample(z, labels), f"{title}: {what}",
                  captions=names_of(labels, data.classes))

    for name, labels in data.tests.items():
        save(name, labels, f"{name}.json, requested objects below each image")
    index = torch.randint(len(data.images), (32,), generator=g)
    fake = sample(torch.randn(32, z_dim, generator=g), data.labels[index])
    save_grid(folder / "real_beside_generated.png", real_above_generated(data.images[index], fake),
              f"{title}: lines of training images, below each generated ones with the same labels",
              captions=names_of(data.labels[index].view(4, 8, 3).repeat(1, 2, 1).view(64, 3), data.classes))

    null = len(data.classes)
    alone = torch.tensor([[i, null, null] for i in range(null)])
    save("objects", alone, "each object alone, one z", torch.randn(1, z_dim, generator=g).expand(null, -1))
    labels = data.tests["test"][torch.randperm(len(data.tests["test"]), generator=g)[:6]]
    a, b = torch.randn(2, len(labels), 1, z_dim, generator=g)
    z = torch.lerp(a, b, torch.linspace(0, 1, 8)[:, None])  # [6, 8, z_dim]
    what = "from one z to another, the same labels along a line"
    save("interpolation", labels.repeat_interleave(8, 0), what, z.flatten(0, 1))


def save_gif(path: Path, pictures: list[Path]) -> None:
    """An endless GIF of at most 60 of these PNGs, fewer if they are large; the last is shown longer."""
    if not pictures:
        return
    last = Image.open(pictures[-1]).convert("RGB")
    n = min(len(pictures), 60, max(10, 12_000_000 // (last.width * last.height)))
    chosen = [pictures[round(i * (len(pictures) - 1) / max(1, n - 1))] for i in range(n)]
    frames = [Image.open(p).convert("RGB").resize(last.size) for p in chosen]
    options = dict(save_all=True, append_images=frames[1:], loop=0, duration=[250] * (n - 1) + [2000])
    write_whole(path, lambda p: frames[0].save(p, **options))


# the panels of curves.png: title, and how the names of their columns begin
PANELS = (("accuracy", ("accuracy", "tv")), ("Fréchet distance", ("fd", "fid")),
          ("D's output", ("d_real", "d_fake")), ("losses", ("",)))


def save_curves(table: Path, path: Path, title: str) -> bool:
    """Plot the columns of metrics.csv over the step, a panel each for accuracy, distance, D's output, losses.

    Returns False if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # whatever backend a notebook has set
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    names = [name for name in (rows[0] if rows else {}) if name not in ("step", "seconds")]
    panels: dict[str, list[str]] = {panel: [] for panel, _ in PANELS}
    for name in names:
        panels[next(panel for panel, begins in PANELS if name.startswith(begins))].append(name)
    panels = {panel: columns for panel, columns in panels.items() if columns} or {"losses": []}
    figure = Figure(figsize=(8, 1 + 2.4 * len(panels)), layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for (panel, columns), ax in zip(panels.items(), axes, strict=True):
        for name in columns:
            points = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
            ax.plot(*zip(*points, strict=True), marker="." if len(points) < 100 else None, label=name)
        ax.set(ylabel=panel, yscale="log" if panel == "Fréchet distance" else "linear")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    axes[0].set_title(title, fontsize=9)
    axes[-1].set_xlabel("iteration")
    write_whole(path, lambda p: figure.savefig(p, dpi=110))
    return True
