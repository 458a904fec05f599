"""Synthetic faces: cartoon heads with known colours of hair, eyes and skin, with or without glasses."""
import torch
import torch.nn.functional as F

# The attributes: a face has exactly one of each group. Colours are sRGB
FACE_COLOURS = {
    "hair": {"blonde": (244, 208, 90), "orange": (226, 106, 28), "brown": (140, 84, 40),
             "black": (36, 32, 38), "blue": (58, 104, 212), "white": (242, 242, 244)},
    "eyes": {"brown": (132, 74, 26), "blue": (48, 120, 224), "green": (44, 152, 66), "black": (22, 22, 26)},
    "face": {"African": (106, 66, 46), "Asian": (232, 186, 122), "Caucasian": (252, 216, 200)},
}
FACE_GROUPS = {group: tuple(f"{name} {group}" for name in names) for group, names in FACE_COLOURS.items()}
FACE_GROUPS["glasses"] = ("with glasses", "without glasses")
FACE_ATTRIBUTES = tuple(name for names in FACE_GROUPS.values() for name in names)
# Lengths are in half heights of a head; x goes right and y down from its middle.
# Back hair: half width (in half widths of the head), middle, half height, squareness. Front hair: distance
# from the head, end of its sides, height of the opening over the face, the opening's squareness (1.5: middle
# parting, 5: fringe) and slant. Then curliness, and the radius of a bun.
HAIR_STYLES = (
    (1.03, -0.20, 0.90, 2.0, 1.08, 0.02, 0.99, 2.6, 0.00, 0.00, 0.00),  # short
    (1.20, 0.02, 1.14, 3.0, 1.10, 0.40, 0.87, 5.0, 0.00, 0.00, 0.00),  # a fringe, cut at the chin
    (1.03, -0.20, 0.90, 2.0, 1.12, 0.04, 1.03, 2.2, 0.40, 0.00, 0.00),  # parted at the side
    (1.24, 0.50, 1.62, 3.0, 1.10, 0.62, 1.23, 1.5, 0.00, 0.00, 0.00),  # long, parted in the middle
    (1.36, -0.16, 1.26, 2.0, 1.22, 0.16, 0.95, 2.4, 0.00, 0.05, 0.00),  # curly
    (1.03, -0.20, 0.90, 2.0, 1.07, -0.06, 1.09, 2.2, 0.00, 0.00, 0.38),  # tied in a bun
)
FRAMES = ((40, 38, 48), (150, 32, 44), (176, 40, 120), (26, 92, 104), (70, 54, 130))  # of glasses
FACE_RANGES = {  # the other factors, uniform between two ends
    "scale": (0.52, 0.61), "x": (-0.09, 0.09), "y": (-0.08, 0.04),  # of the head, in half image sizes
    "tilt": (-0.12, 0.12), "width": (0.76, 0.90), "length": (0.93, 1.05), "taper": (0.08, 0.30),
    "square": (2.0, 2.6), "shoulders": (1.05, 1.35), "volume": (0.97, 1.05), "hairline": (-0.05, 0.05),
    "parting": (-1, 1), "eye": (0.18, 0.23), "aspect": (0.95, 1.20), "apart": (0.35, 0.40),
    "gaze": (-0.05, 0.05), "look": (-0.03, 0.04), "brow": (-0.42, -0.34), "frown": (-0.25, 0.25),
    "nose": (0.06, 0.12), "mouth": (0.20, 0.34), "smile": (-0.02, 0.15), "open": (-0.25, 0.25),
    "lens": (0.29, 0.33), "round": (-1, 1),
}


def render(n: int, image_size: int = 128, seed: int = 0, device: str | torch.device = "cpu",
          batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Render n cartoon heads and shoulders, seen from the front, with known hair, eyes, face and glasses.

    Returns images uint8 [n, 3, image_size, image_size] and labels int64 [n, 15] of 0 and 1 in the order of
    FACE_ATTRIBUTES, a single 1 in each of FACE_GROUPS. All 144 combinations occur once, shuffled, before any
    repeats; all other factors are independent of them. The pixels depend on the seed alone, not on `batch`,
    the number of faces rendered at once.
    """
    batch = batch or (16 if torch.device(device).type == "cpu" else 512)
    labels, factors = _sample_factors(n, seed)
    images = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(0, n, batch):
        part = {name: value[i:i + batch].to(device) for name, value in factors.items()}
        images[i:i + batch] = _portray(part, image_size).cpu()
    return images, labels


def _sample_factors(n: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Labels [n, 15] and the factors of each face: lengths [n, 1, 1], style [n, 11], colours [n, 3]."""
    g = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*(torch.arange(len(names)) for names in FACE_GROUPS.values()))  # [144, 4]
    chosen = every[torch.rand(-(-n // len(every)), len(every), generator=g).argsort(1).flatten()[:n]]
    labels = [F.one_hot(k, len(names)) for k, names in zip(chosen.T, FACE_GROUPS.values(), strict=True)]
    labels = torch.cat(labels, 1)
    f = {name: a + (b - a) * torch.rand(n, 1, 1, generator=g) for name, (a, b) in FACE_RANGES.items()}
    f["glasses"] = (chosen[:, 3] == 0).view(n, 1, 1).float()
    f["style"] = torch.tensor(HAIR_STYLES)[torch.randint(len(HAIR_STYLES), (n,), generator=g)]
    for (group, colours), k in zip(FACE_COLOURS.items(), chosen.T[:3], strict=True):
        tone = 0.94 + 0.1 * torch.rand(n, 1, generator=g) + 0.05 * (torch.rand(n, 3, generator=g) - 0.5)
        f[group] = (torch.tensor(list(colours.values()))[k] / 255 * tone).clamp(0, 1)
    # the backdrop is darker than white hair, lighter than black hair and less saturated than the others
    f["backdrop"] = (0.38 + 0.44 * torch.rand(n, 1, generator=g)) * (1 - 0.28 * torch.rand(n, 3, generator=g))
    f["shirt"] = 0.15 + 0.7 * torch.rand(n, 3, generator=g)
    f["frame"] = torch.tensor(FRAMES)[torch.randint(len(FRAMES), (n,), generator=g)] / 255
    return labels, f


def _blob(x, y, rx, ry, power=2.0, curls=0.0):
    """Approximate distance from an ellipse (negative inside): squarer for power > 2, wavy by `curls`."""
    k = ((x / rx).abs() ** power + (y / ry).abs() ** power + 1e-6) ** (1 / power)
    if torch.is_tensor(curls):
        k = k / (1 + curls * (13 * torch.atan2(x, -y)).cos())
    return (x * x + y * y).sqrt() * (1 - 1 / k)


def _portray(f: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """Images of a batch of faces, uint8 [n, 3, size, size], painted from back to front."""
    at = (torch.arange(size, device=f["x"].device) + 0.5) / size * 2 - 1
    body_x, body_y = (at - f["x"]) / f["scale"], (at[:, None] - f["y"]) / f["scale"]
    cos, sin = f["tilt"].cos(), f["tilt"].sin()
    x, y = body_x * cos + (body_y - 1) * sin, (body_y - 1) * cos - body_x * sin + 1  # around the neck
    mirrored = x.abs()
    image = f["backdrop"][..., None, None].repeat(1, 1, size, size)

    def paint(colour, distance, strength=1.0, outline=0.0):  # fill the inside; the edge is one pixel soft
        if outline:
            paint(colour * 0.55, distance - outline, strength)
        cover = (0.5 - distance * f["scale"] * size / 2).clamp(0, 1) * strength
        image.lerp_(colour[..., None, None], cover[:, None])

    skin, hair, w, h, volume = f["face"], f["hair"], f["width"], f["length"], f["volume"]
    white, dark, red = skin.new_tensor([[[0.98] * 3], [[0.09] * 3], [[0.45, 0.10, 0.14]]])
    behind, middle, height, full, front, sides, reach, cut, slant, curls, bun = f["style"].T[..., None, None]

    # hair behind, shoulders, neck
    paint(hair * 0.86, _blob(x, y + 1.18, bun + 1e-3, bun + 1e-3), (bun > 0).float(), outline=0.03)
    paint(hair * 0.86, _blob(x, y - middle, behind * w * volume, height * volume, full, curls), outline=0.03)
    paint(f["shirt"], _blob(body_x, body_y - 2.35, f["shoulders"], 1.05, 2.6), outline=0.03)
    neck = _blob(body_x, body_y - 0.95, 0.29, 0.56, 6)
    paint(skin, _blob(body_x, body_y - 1.36, 0.34, 0.22), outline=0.03)
    paint(skin, neck)

    # the head, narrower towards the chin, its shadow on the neck, ears, nose
    head = _blob(x / (1 - f["taper"] * y.clamp(0, 1.2) ** 2), y, w, h, f["square"])
    paint(skin * 0.8, (head - 0.09).maximum(neck))
    paint(skin, _blob(mirrored - w, y - 0.12, 0.13, 0.2), outline=0.03)
    paint(skin, head, outline=0.03)
    paint(skin * 0.78, _blob(x, y - 0.32, f["nose"], 0.05))

    # eyes: lid, white, iris, pupil, a glint
    eye_x, eye_y = x - x.sign() * f["apart"], y - 0.06
    eye = _blob(eye_x, eye_y, f["eye"], f["eye"] * f["aspect"])
    paint(dark, eye - 0.025 + 0.1 * eye_y)
    paint(white, eye)
    iris_x, iris_y = eye_x - f["gaze"], eye_y - f["look"]
    paint(f["eyes"], _blob(iris_x, iris_y, 0.15, 0.15).maximum(eye))
    paint(dark, _blob(iris_x, iris_y, 0.06, 0.06))
    paint(white, _blob(iris_x - 0.055, iris_y + 0.055, 0.035, 0.035))

    # the mouth lies between two parabolas that meet in its corners; half of the mouths are shut
    bend = 1 - (x / f["mouth"]).square()
    upper, lower = 0.6 + f["smile"] * bend, 0.6 + (f["smile"] + f["open"].clamp(min=0)) * bend
    mouth = (upper - y).maximum(y - lower).maximum(mirrored - f["mouth"])
    paint(skin * skin.new_tensor([0.72, 0.42, 0.42]), mouth - 0.03)
    paint(red, mouth)
    paint(white, mouth.maximum(y - upper - 0.07) + 0.01)

    # front hair: a cap with an opening for the face; the brows lie over it
    cap = _blob(x, y + 0.06, front * w * volume, (h + 0.06) * front * volume, 2.2, curls)
    aslant = slant * f["parting"].sign() * x
    opening = _blob(x, y - 0.45 + aslant, w * 0.9, reach + f["hairline"], cut)
    paint(hair, cap.maximum(-opening).maximum(y - sides), outline=0.025)
    along = mirrored - f["apart"]
    arch = y - f["brow"] - f["frown"] * along - 1.2 * along.square()
    paint(hair * 0.62, arch.abs().maximum(along.abs() - 0.16) - 0.03)

    # glasses: lenses, round or not, bridge and temples
    r, square = f["lens"], (f["round"] > 0).float()
    lens = _blob(along, eye_y, r, r * (1 - 0.24 * square), 2 + 3 * square)
    bars = ((eye_y + 0.06).abs() - 0.035).maximum(mirrored - w * 1.02).maximum(-lens)
    paint(white, lens, 0.1 * f["glasses"])
    paint(f["frame"], (lens.abs() - 0.04).minimum(bars), f["glasses"])
    return (image * 255).round().to(torch.uint8)
