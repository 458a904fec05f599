"""Drawn stand-ins for the real data sets, with known factors: nothing has to be downloaded.

`scenes` renders what i-CLEVR shows: spheres, cubes and cylinders in eight colours on a lit grey floor.
`digits` writes what MNIST shows: the ten digits by hand, white on black.
`faces` draws cartoon heads with the attributes of a labelled set: colours of hair, eyes and skin, glasses.
"""
import math

import torch
import torch.nn.functional as F

SHAPES = ("cube", "sphere", "cylinder")
COLOURS = {  # sRGB, as in CLEVR's properties.json (Johnson et al. 2017)
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51),
}
OBJECTS = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)  # class id = 8·shape + colour
MAX_OBJECTS = 3
NULL = len(OBJECTS)  # pads the labels of images with fewer than three objects

# The stage, in CLEVR's units: objects stand at x, y in [-3, 3] on the floor z = 0; a square seen corner-on.
CAMERA, TARGET = (7.48, -6.51, 5.34), (0.0, 0.0, 0.05)
TAN_X, TAN_Y = 16 / 35, 12 / 35  # half the view of a 35 mm lens on 32×24 mm film, squashed to a square
SIZE = {"cube": 0.58, "sphere": 0.64, "cylinder": 0.59}  # half an edge, or the radius
CYLINDER_HALF_HEIGHT = 0.65
REACH = 3.0  # objects stand within ± this
GAP = 0.25  # at least this much floor between two objects
PATCH = 0.5  # side of the square drawn around an object, as a share of the image

# Three wide lamps. Position, colour (linear), strength; each position is jittered scene by scene.
LAMPS = (
    ((6.6, -3.2, 4.0), (1.00, 0.92, 0.80), 4.6),  # key: warm, from the right of the camera
    ((-3.6, -4.6, 2.6), (0.90, 0.95, 1.12), 0.75),  # fill: cool, from the left
    ((-1.2, 2.4, 5.6), (1.00, 1.00, 1.00), 2.2),  # back: neutral, from behind
)
LAMP_JITTER, LAMP_RADIUS = 0.8, 1.5
AMBIENT = 0.139  # the floor far from every lamp, linear
SHADOW = 0.6  # what a lamp out of sight loses: the rest comes back from around
SHADOW_SAMPLES = 4  # points on each lamp; the sky has as many


def scenes(n: int, image_size: int = 64, seed: int = 0, device: str | torch.device = "cpu",
           batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render n scenes of three nested frames: frame k shows the scene's first k + 1 objects.

    Returns images uint8 [3n, 3, image_size, image_size], labels int64 [3n, 3] (object ids in ascending order,
    padded with NULL) and scene numbers int64 [3n]. One seed gives the same pixels for any `batch`, the number
    of scenes rendered at once.
    """
    batch = batch or (48 if torch.device(device).type == "cpu" else 512)
    factors = _draw_factors(n, seed)
    images = torch.empty(n, 3, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(0, n, batch):
        part = {name: value[i:i + batch].to(device) for name, value in factors.items()}
        # the grain of a scene depends on its own number alone
        generators = [torch.Generator().manual_seed(s) for s in factors["seed"][i:i + batch].tolist()]
        grain = torch.stack([torch.randn(3, image_size, image_size, generator=g) for g in generators])
        images[i:i + batch] = _render(part, grain.to(device), image_size).cpu()
    shown = torch.arange(3)[:, None] >= torch.arange(3)  # [frame, object]
    labels = torch.where(shown, factors["object"][:, None, :], NULL).sort(2).values
    return images.flatten(0, 1), labels.flatten(0, 1), torch.arange(n).repeat_interleave(3)


def _draw_factors(n: int, seed: int) -> dict[str, torch.Tensor]:
    """What tells one scene from another: three different objects, where they stand and turn, the lamps."""
    g = torch.Generator().manual_seed(seed)
    objects = torch.rand(n, len(OBJECTS), generator=g).argsort(1)[:, :MAX_OBJECTS]
    # the first object stands in the middle; whoever stands too close to an earlier one is drawn again
    place = torch.zeros(n, MAX_OBJECTS, 2)
    radius = torch.tensor([SIZE["cube"] * math.sqrt(2), SIZE["sphere"], SIZE["cylinder"]])
    radius = radius[objects // len(COLOURS)]
    for k in range(1, MAX_OBJECTS):
        todo = torch.ones(n, dtype=torch.bool)
        while todo.any():
            place[todo, k] = (torch.rand(n, 2, generator=g)[todo] * 2 - 1) * REACH
            apart = (place[:, :k] - place[:, k:k + 1]).norm(dim=2) - radius[:, :k] - radius[:, k:k + 1]
            todo = (apart < GAP).any(1)
    return {
        "object": objects, "place": place, "turn": torch.rand(n, MAX_OBJECTS, generator=g) * math.pi / 2,
        "lamps": torch.tensor([lamp[0] for lamp in LAMPS])
        + LAMP_JITTER * (torch.rand(n, len(LAMPS), 3, generator=g) * 2 - 1),
        "seed": torch.randint(2**62, (n,), generator=g),
    }


def _intersect(shape: str, o: torch.Tensor, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where rays o + t·d [..., 3] enter a convex body standing around the origin.

    Each body is an intersection of slabs, an endless cylinder or a ball, and a ray's stay in it the
    intersection of its stays in those. Returns t of entry [...], hit [...] and the normal there [..., 3].
    """
    r = SIZE[shape]
    if shape == "cube":
        inv = 1 / d
        near, far = -o * inv - r * inv.abs(), -o * inv + r * inv.abs()
        enter, axis = near.max(-1)
        normal = -F.one_hot(axis, 3) * d.sign()
        return enter, (enter < far.amin(-1)) & (enter > 0), normal
    k = 3 if shape == "sphere" else 2  # a cylinder is a ball in x and y alone
    p, q = o[..., :k], d[..., :k]
    a, b, c = q.square().sum(-1), (p * q).sum(-1), p.square().sum(-1) - r * r
    root = (b * b - a * c)
    met, root = root > 0, root.clamp(min=0).sqrt()
    enter, leave = (-b - root) / a, (-b + root) / a
    normal = torch.cat([(o + enter[..., None] * d)[..., :k] / r, o.new_zeros(*d.shape[:-1], 3 - k)], -1)
    if shape == "cylinder":
        inv = 1 / d[..., 2]
        half = CYLINDER_HALF_HEIGHT * inv.abs()
        near, far = -o[..., 2] * inv - half, -o[..., 2] * inv + half
        cap = (near > enter)[..., None]
        normal = torch.where(cap, -d.sign() * d.new_tensor([0, 0, 1]), normal)
        enter, leave = enter.maximum(near), leave.minimum(far)
    return enter, met & (enter < leave) & (enter > 0), normal


def _camera(image_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Position [3], axes right, down, forward [3, 3], and a ray through each pixel [size, size, 3]."""
    eye = torch.tensor(CAMERA, device=device)
    forward = F.normalize(torch.tensor(TARGET, device=device) - eye, dim=0)
    right = F.normalize(torch.linalg.cross(forward, eye.new_tensor([0, 0, 1.0])), dim=0)
    axes = torch.stack([right, torch.linalg.cross(forward, right), forward])
    at = (torch.arange(image_size, device=device) + 0.5) / image_size * 2 - 1
    y, x = torch.meshgrid(at * TAN_Y, at * TAN_X, indexing="ij")
    film = torch.stack([x, y, torch.ones_like(x)], -1)
    return eye, axes, film @ axes


def _render(f: dict[str, torch.Tensor], grain: torch.Tensor, size: int) -> torch.Tensor:
    """Frames of a batch of scenes, uint8 [n, 3 frames, 3, size, size]."""
    n, device, fine = len(f["place"]), grain.device, 2  # objects get fine × fine rays a pixel
    eye, axes, rays = _camera(size, device)
    _, _, fine_rays = _camera(size * fine, device)
    floor = eye + rays * (-eye[2] / rays[..., 2:])  # every ray points down: [size, size, 3]

    # a square patch of pixels around each object's centre: its rows and columns [3n, patch]
    objects, place, turn = f["object"].flatten(), f["place"].flatten(0, 1), f["turn"].flatten()
    shape, colours = objects // len(COLOURS), objects % len(COLOURS)
    half_height = torch.tensor([SIZE["cube"], SIZE["sphere"], CYLINDER_HALF_HEIGHT], device=device)[shape]
    centre = torch.cat([place, half_height[:, None]], 1)
    seen = (centre - eye) @ axes.T
    patch = int(size * PATCH)

    def span(x: torch.Tensor, scale: int) -> torch.Tensor:
        start = ((x + 1) / 2 * size - patch / 2).round().clamp(0, size - patch).long() * scale
        return start[:, None] + torch.arange(patch * scale, device=device)

    x, y = seen[:, 0] / seen[:, 2] / TAN_X, seen[:, 1] / seen[:, 2] / TAN_Y
    rows, cols = span(y, 1), span(x, 1)
    fine_rows, fine_cols = span(y, fine), span(x, fine)

    # light: from lamps (points around each) and, for the shade under things, from the sky
    cloud = torch.randn(SHADOW_SAMPLES, 3, generator=torch.Generator().manual_seed(0))
    cloud = F.normalize(cloud, dim=1) * LAMP_RADIUS
    lamp_points = f["lamps"][:, :, None] + cloud.to(device)  # [n, lamps, samples, 3]
    up = torch.arange(SHADOW_SAMPLES, device=device) * (2 * math.pi / SHADOW_SAMPLES) + 0.4
    sky = 50 * torch.stack([up.cos(), up.sin(), torch.full_like(up, 1.0)], 1)
    points = torch.cat([lamp_points, sky.expand(n, 1, -1, -1)], 1)  # [n, lights, samples, 3]
    points = points.repeat_interleave(MAX_OBJECTS, 0)
    tint = torch.tensor([[strength * c for c in colour] for _, colour, strength in LAMPS], device=device)

    # share of each light kept from a pixel by an object; its colour × cover, and cover
    shade = torch.zeros(MAX_OBJECTS * n, len(LAMPS) + 1, size, size, device=device)
    paint = torch.zeros(MAX_OBJECTS * n, 4, size, size, device=device)
    # the exponent, below sRGB's 2.2, and the grey sheen were fitted to the objects' mean colours in i-CLEVR
    albedo = (torch.tensor(list(COLOURS.values()), device=device) / 255) ** 1.32 * 1.25 + 0.10
    for s, name in enumerate(SHAPES):
        mine = (shape == s).nonzero()[:, 0]
        if not len(mine):
            continue
        cos, sin = turn[mine].cos(), turn[mine].sin()
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        spin = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], 1).view(-1, 1, 1, 3, 3)

        # the object itself, and how its surface is lit
        d = fine_rays[fine_rows[mine, :, None], fine_cols[mine, None, :]]
        o = (eye - centre[mine])[:, None, None]
        t, hit, normal = _intersect(name, (o @ spin[:, :, 0]), (d[..., None, :] @ spin)[..., 0, :])
        normal = (spin @ normal[..., None])[..., 0]
        surface = eye + t[..., None] * d
        light = torch.full_like(surface, AMBIENT)
        scene = mine // MAX_OBJECTS
        for k in range(len(LAMPS)):
            to = f["lamps"][scene, k][:, None, None] - surface
            far = to.norm(dim=-1, keepdim=True)
            light = light + tint[k] * (normal * to).sum(-1, keepdim=True).clamp(min=0) / far**3
        colour = light * albedo[colours[mine]][:, None, None]
        drawn = torch.cat([colour, torch.ones_like(t)[..., None]], -1) * hit[..., None]
        drawn = F.avg_pool2d(drawn.permute(0, 3, 1, 2), fine)
        paint[mine[:, None, None], :, rows[mine, :, None], cols[mine, None, :]] = drawn.permute(0, 2, 3, 1)

        # its shadow on the floor around it
        ground = floor[rows[mine, :, None], cols[mine, None, :]]  # [m, patch, patch, 3]
        o = ((ground - centre[mine][:, None, None])[..., None, :] @ spin)[..., 0, :]
        for k in range(len(LAMPS) + 1):
            dark = torch.zeros(o.shape[:-1], device=device)
            for j in range(SHADOW_SAMPLES):
                d = ((points[mine, k, j][:, None, None] - ground)[..., None, :] @ spin)[..., 0, :]
                dark += _intersect(name, o, d)[1]
            dark *= SHADOW / SHADOW_SAMPLES
            shade[mine[:, None, None], k, rows[mine, :, None], cols[mine, None, :]] = dark

    # frame by frame: the floor under what light is left, then the objects from the farthest to the nearest
    shade, paint = shade.view(n, MAX_OBJECTS, -1, size, size), paint.view(n, MAX_OBJECTS, 4, size, size)
    to = f["lamps"][:, :, None, None] - floor
    lit = to[..., 2] / to.norm(dim=-1) ** 3  # [n, lamps, size, size]
    order = seen[:, 2].view(n, MAX_OBJECTS).argsort(1, descending=True)
    frames = []
    left = torch.ones(n, len(LAMPS) + 1, size, size, device=device)
    for frame in range(MAX_OBJECTS):
        left = left * (1 - shade[:, frame])
        image = AMBIENT * left[:, -1:] + torch.einsum("nlhw,lc->nchw", lit * left[:, :-1], tint)
        for k in range(MAX_OBJECTS):
            which = order[:, k]
            over = paint[torch.arange(n, device=device), which] * (which <= frame).view(-1, 1, 1, 1)
            image = image * (1 - over[:, 3:]) + over[:, :3]
        frames.append(image)
    image = torch.stack(frames, 1).clamp(0, 1) ** (1 / 2.2) * 255
    return (image + 1.4 * grain[:, None]).round().clamp(0, 255).to(torch.uint8)


# How the digits are written, upright. For each way of writing one: its frequency, then stroke by stroke the
# points the pen passes, in hundredths of the height, x right and y down. A point given twice is a corner.
GLYPHS = (
    ((1, ((52, 4), (25, 6), (4, 38), (9, 76), (37, 97), (71, 80), (83, 42), (67, 10), (41, 3))),
     (1, ((34, 6), (9, 34), (7, 72), (34, 97), (67, 82), (76, 44), (60, 10), (28, 2), (16, 12)))),
    ((8, ((5, 0), (4, 50), (5, 100))),
     (1, ((5, 17), (20, 1), (20, 1), (20, 50), (20, 100))),
     (1, ((3, 18), (20, 1), (20, 1), (20, 50), (20, 99)), ((0, 99), (42, 99)))),
    ((3, ((6, 22), (26, 3), (52, 8), (54, 32), (38, 66), (8, 97), (8, 97), (38, 94), (76, 96))),
     (2, ((6, 22), (26, 3), (52, 6), (54, 32), (42, 68), (18, 96), (4, 88), (16, 76), (40, 86), (80, 94)))),
    ((3, ((4, 12), (30, 1), (54, 14), (46, 36), (22, 46), (22, 46), (54, 56), (60, 78), (36, 98), (0, 90))),
     (1, ((4, 4), (56, 3), (56, 3), (24, 40), (24, 40), (54, 52), (60, 78), (36, 98), (0, 92)))),
    ((2, ((8, 4), (2, 32), (4, 52), (4, 52), (32, 56), (72, 50)), ((60, 0), (56, 50), (52, 100))),
     (1, ((44, 0), (26, 28), (0, 62), (0, 62), (34, 62), (72, 60)), ((52, 24), (48, 60), (46, 100)))),
    ((2, ((18, 4), (12, 42), (12, 42), (40, 40), (60, 62), (46, 90), (20, 98), (0, 88)),
      ((18, 4), (42, 4), (70, 0))),
     (1, ((68, 2), (28, 6), (28, 6), (16, 42), (16, 42), (46, 50), (56, 72), (36, 96), (0, 96)))),
    ((2, ((40, 0), (16, 28), (4, 64), (16, 94), (42, 97), (62, 78), (52, 60), (30, 60), (10, 80))),
     (1, ((30, 0), (8, 36), (4, 74), (22, 98), (50, 92), (56, 70), (38, 54), (8, 72)))),
    ((3, ((2, 10), (30, 6), (62, 4), (62, 4), (47, 42), (34, 100))),
     (1, ((2, 26), (6, 6), (6, 6), (34, 4), (62, 4), (62, 4), (48, 44), (38, 100))),
     (1, ((2, 8), (30, 6), (62, 4), (62, 4), (47, 42), (34, 100)), ((20, 54), (42, 50), (64, 50)))),
    ((1, ((62, 14), (36, 0), (9, 16), (26, 42), (56, 68), (48, 94), (18, 99), (0, 80), (26, 52), (58, 28),
          (59, 8))),
     (1, ((40, 2), (12, 8), (10, 32), (46, 58), (60, 82), (33, 99), (2, 86), (14, 60), (50, 34), (57, 12),
          (36, 1)))),
    ((1, ((54, 14), (32, 1), (6, 20), (10, 44), (36, 44), (56, 14), (56, 14), (54, 56), (48, 100))),
     (1, ((54, 16), (32, 1), (4, 22), (12, 46), (40, 40), (56, 12), (56, 12), (54, 60), (36, 96), (12, 94)))),
)
SEGMENTS = 40  # straight pieces a digit is drawn with
# How digits vary: mean and standard deviation, fitted to MNIST's training images
SLANT, ASPECT, TILT = (0.20, 0.25), (1.0, 0.15), (0.04, 0.06)  # tilt: how much lines to the right rise
PEN = (2.55, 0.24)  # pixels of 28; the deviation is the logarithm's
WARP, WARP_SCALE, WARP_WAVES = 0.05, 0.35, 8  # in heights: how far, over what distance it changes; its terms
JITTER = 0.02  # in heights: of every point and, as much again, of every stroke
BOX, SMALLEST, MARGIN = 20.0, 16.0, 1.5  # pixels: the ink's largest and least height; the border without ink
EDGE = 1.1  # pixels over which a stroke fades at its side


def digits(n: int, image_size: int = 28, seed: int = 0, device: str | torch.device = "cpu",
           batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Draw n handwritten digits as MNIST has them: white on black, in about the middle 20×20 of 28×28 pixels.

    Returns images uint8 [n, 1, image_size, image_size], labels int64 [n] (0 to 9, each as likely), factors
    float32 [n] each: "slant", how far an upright line leans to the right per unit of height (-0.55 to 0.95,
    mostly -0.2 to 0.6); "width", the pen's diameter (1.2 to 5.3), and "size", the height of the ink (12 to
    20, mostly over 17), both in pixels of a 28-pixel image. One seed gives the same pixels for any `batch`,
    the number of digits drawn at once.
    """
    batch = batch or (64 if torch.device(device).type == "cpu" else 2048)
    labels, ends, factors = _draw_strokes(n, seed)
    scale = image_size / 28
    images = torch.empty(n, 1, image_size, image_size, dtype=torch.uint8)
    for i in range(0, n, batch):
        part = ends[:, i:i + batch].to(device) * scale
        radius = factors["width"][i:i + batch].to(device) / 2 * scale
        images[i:i + batch, 0] = _ink(part, radius, image_size).cpu()
    return images, labels, factors


def _spline(glyph: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A glyph's points [C, 2], the stroke of each [C], and weights [2, SEGMENTS, C] that make of the points
    both ends of each segment: every stroke is a Catmull-Rom spline, cut at even steps of its length.
    """
    points = torch.tensor([point for stroke in glyph for point in stroke]) / 100
    stroke = torch.tensor([k for k, stroke in enumerate(glyph) for _ in stroke])
    basis = torch.tensor([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    fine, walked = [], []  # per stroke: weights of closely set points along it, and how far along each lies
    for k in range(len(glyph)):
        index = (stroke == k).nonzero()[:, 0]
        t = torch.linspace(0, len(index) - 1, 2000)
        before = t.long().clamp(max=len(index) - 2)
        near = index[(before[:, None] + torch.arange(-1, 3)).clamp(0, len(index) - 1)]
        share = (t - before)[:, None] ** torch.arange(4) @ basis
        fine.append((F.one_hot(near, len(points)) * share[..., None]).sum(1))
        walked.append(F.pad((fine[k] @ points).diff(dim=0).norm(dim=1).cumsum(0), (1, 0)))
    length = torch.stack([w[-1] for w in walked])
    pieces = (length / length.sum() * SEGMENTS).round().long()
    pieces[0] += SEGMENTS - pieces.sum()
    ends = []
    for k, m in enumerate(pieces.tolist()):
        cut = torch.searchsorted(walked[k], torch.linspace(0, 1, m + 1) * length[k])
        ends.append(torch.stack([fine[k][cut[:-1]], fine[k][cut[1:]]]))
    return points, stroke, torch.cat(ends, 1)


def _draw_strokes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Labels [n], both ends of all segments [2, n, SEGMENTS, 2] (x, y in pixels of 28), factors [n] each."""
    g = torch.Generator().manual_seed(seed)

    def bell(mean: float, sd: float) -> torch.Tensor:  # like a normal, but never beyond 3 sd
        return mean + sd * (torch.rand(n, 3, generator=g) * 2 - 1).sum(1)

    labels, habit = torch.randint(10, (n,), generator=g), torch.rand(n, generator=g)
    ends = torch.empty(n, 2, SEGMENTS, 2)
    for digit, variants in enumerate(GLYPHS):
        upto = torch.tensor([frequency for frequency, *_ in variants]).cumsum(0)
        chosen = (habit[:, None] * upto[-1] >= upto).sum(1)
        for v, (_, *glyph) in enumerate(variants):
            mine = ((labels == digit) & (chosen == v)).nonzero()[:, 0]
            points, stroke, weights = _spline(glyph)
            shake = torch.randn(len(mine), len(glyph), 2, generator=g)[:, stroke]
            shake = shake + torch.randn(len(mine), len(points), 2, generator=g)
            ends[mine] = torch.einsum("esc,ncx->nesx", weights, points + JITTER * shake)
    ends = ends.flatten(1, 2)

    # warp by a smooth random field, less the part of it that leans the digit: that is the slant's to do
    wave = torch.randn(n, 2, WARP_WAVES, generator=g) / WARP_SCALE
    phase = torch.rand(n, 1, WARP_WAVES, generator=g) * 2 * math.pi
    strength = torch.randn(n, WARP_WAVES, 2, generator=g) * WARP * math.sqrt(2 / WARP_WAVES)
    push = (ends @ wave + phase).sin() @ strength
    y = ends[..., 1] - ends[..., 1].mean(1, keepdim=True)
    push[..., 0] -= (push[..., 0] * y).sum(1, keepdim=True) / y.square().sum(1, keepdim=True) * y
    x, y = (ends + push).unbind(2)

    slant, aspect, tilt, width = bell(*SLANT), bell(*ASPECT), bell(*TILT), PEN[0] * bell(0, PEN[1]).exp()
    x = x * aspect[:, None]
    ends = torch.stack([x - slant[:, None] * y, y - tilt[:, None] * x], 2)

    # set the height of the ink, less where it would be too wide, and its centre of mass to the middle
    extent = ends.amax(1) - ends.amin(1)
    size = BOX - (BOX - SMALLEST) * torch.rand(n, generator=g) ** 3
    scale = torch.minimum((size - width) / extent[:, 1], (BOX - width) / extent[:, 0])
    size = scale * extent[:, 1] + width
    ends = ends * scale[:, None, None]
    start, end = ends.chunk(2, 1)
    length = (end - start).norm(dim=2, keepdim=True)
    mass = ((start + end) / 2 * length).sum(1) / length.sum(1)
    centre = 14 + torch.rand(n, 2, generator=g)  # MNIST has it in pixel 14, so 14.5 on average
    room = MARGIN + width[:, None] / 2
    shift = (centre - mass).maximum(room - ends.amin(1)).minimum(28 - room - ends.amax(1))[:, None]
    return labels, torch.stack([start + shift, end + shift]), {"slant": slant, "width": width, "size": size}


def _ink(ends: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """Images uint8 [n, size, size] of segments [2, n, S, 2] drawn with pens of radii [n], all in pixels."""
    middle, along = (ends[0] + ends[1]) / 2, ends[1] - ends[0]
    half = along.norm(dim=2).clamp(min=1e-6)[..., None] / 2  # [n, S, 1]
    c, s = (along / (2 * half)).split(1, 2)  # the segment's direction
    at = torch.arange(size, device=ends.device) + 0.5
    dx, dy = at - middle[..., :1], at - middle[..., 1:]  # [n, S, size]
    # how far each pixel lies beyond the segment's ends and aside of its line [n, S, size, size]
    beyond = (dx * c)[:, :, None] + (dy * s)[..., None]
    beyond = beyond.abs_().sub_(half[..., None]).clamp_(min=0)
    aside = (dx * s)[:, :, None] - (dy * c)[..., None]
    distance = beyond.square_().add_(aside.square_()).amin(1).sqrt()
    ink = ((radius[:, None, None] - distance) / EDGE + 0.5).clamp(0, 1)
    return (ink * 255).round().to(torch.uint8)


# The attributes of a face: one name of each group, with its colour (sRGB)
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
# Hair behind: half its width (in half widths of the head), its middle, half its height, how square it is.
# In front: how far it stands off the head, where its sides end; how high it opens over the face, how squarely
# (1.5 parted in the middle, 5 a fringe) and how much aslant. Then how curly it is, and the radius of a bun.
HAIR_STYLES = (
    (1.03, -0.20, 0.90, 2.0, 1.08, 0.02, 0.99, 2.6, 0.00, 0.00, 0.00),  # short
    (1.20, 0.02, 1.14, 3.0, 1.10, 0.40, 0.87, 5.0, 0.00, 0.00, 0.00),  # a fringe, cut at the chin
    (1.03, -0.20, 0.90, 2.0, 1.12, 0.04, 1.03, 2.2, 0.40, 0.00, 0.00),  # parted at the side
    (1.24, 0.50, 1.62, 3.0, 1.10, 0.62, 1.23, 1.5, 0.00, 0.00, 0.00),  # long, parted in the middle
    (1.36, -0.16, 1.26, 2.0, 1.22, 0.16, 0.95, 2.4, 0.00, 0.05, 0.00),  # curly
    (1.03, -0.20, 0.90, 2.0, 1.07, -0.06, 1.09, 2.2, 0.00, 0.00, 0.38),  # tied in a bun
)
FRAMES = ((40, 38, 48), (150, 32, 44), (176, 40, 120), (26, 92, 104), (70, 54, 130))  # of glasses
FACE_RANGES = {  # all else that differs from face to face, evenly between two ends
    "scale": (0.52, 0.61), "x": (-0.09, 0.09), "y": (-0.08, 0.04),  # of the head, in half images
    "tilt": (-0.12, 0.12), "width": (0.76, 0.90), "length": (0.93, 1.05), "taper": (0.08, 0.30),
    "square": (2.0, 2.6), "shoulders": (1.05, 1.35), "volume": (0.97, 1.05), "hairline": (-0.05, 0.05),
    "parting": (-1, 1), "eye": (0.18, 0.23), "aspect": (0.95, 1.20), "apart": (0.35, 0.40),
    "gaze": (-0.05, 0.05), "look": (-0.03, 0.04), "brow": (-0.42, -0.34), "frown": (-0.25, 0.25),
    "nose": (0.06, 0.12), "mouth": (0.20, 0.34), "smile": (-0.02, 0.15), "open": (-0.25, 0.25),
    "lens": (0.29, 0.33), "round": (-1, 1),
}


def faces(n: int, image_size: int = 128, seed: int = 0, device: str | torch.device = "cpu",
          batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw n cartoon heads and shoulders, seen from the front, of known hair, eyes, face and glasses.

    Returns images uint8 [n, 3, image_size, image_size] and labels int64 [n, 15] of 0 and 1 in the order of
    FACE_ATTRIBUTES, a single 1 in each of FACE_GROUPS. All 144 combinations come once, shuffled, before any
    comes again; nothing else in a picture depends on them. One seed gives the same pixels for any `batch`,
    the number of faces drawn at once.
    """
    batch = batch or (16 if torch.device(device).type == "cpu" else 512)
    labels, factors = _draw_looks(n, seed)
    images = torch.empty(n, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(0, n, batch):
        part = {name: value[i:i + batch].to(device) for name, value in factors.items()}
        images[i:i + batch] = _portray(part, image_size).cpu()
    return images, labels


def _draw_looks(n: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Labels [n, 15], and what a face is drawn from: lengths [n, 1, 1], style [n, 11], colours [n, 3]."""
    g = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(*(torch.arange(len(names)) for names in FACE_GROUPS.values()))  # [144, 4]
    chosen = every[torch.rand(-(-n // len(every)), len(every), generator=g).argsort(1).flatten()[:n]]
    labels = torch.cat([F.one_hot(k, len(names)) for k, names in zip(chosen.T, FACE_GROUPS.values())], 1)
    f = {name: a + (b - a) * torch.rand(n, 1, 1, generator=g) for name, (a, b) in FACE_RANGES.items()}
    f["glasses"] = (chosen[:, 3] == 0).view(n, 1, 1).float()
    f["style"] = torch.tensor(HAIR_STYLES)[torch.randint(len(HAIR_STYLES), (n,), generator=g)]
    for (group, colours), k in zip(FACE_COLOURS.items(), chosen.T):
        tone = 0.94 + 0.1 * torch.rand(n, 1, generator=g) + 0.05 * (torch.rand(n, 3, generator=g) - 0.5)
        f[group] = (torch.tensor(list(colours.values()))[k] / 255 * tone).clamp(0, 1)
    # a backdrop is darker than white hair, lighter than black and duller than the others
    f["backdrop"] = (0.38 + 0.44 * torch.rand(n, 1, generator=g)) * (1 - 0.28 * torch.rand(n, 3, generator=g))
    f["shirt"] = 0.15 + 0.7 * torch.rand(n, 3, generator=g)
    f["frame"] = torch.tensor(FRAMES)[torch.randint(len(FRAMES), (n,), generator=g)] / 255
    return labels, f


def _blob(x, y, rx, ry, power=2.0, curls=0.0):
    """About how far points lie outside of an ellipse: squarer for a power above 2, and wavy by `curls`."""
    k = ((x / rx).abs() ** power + (y / ry).abs() ** power + 1e-6) ** (1 / power)
    if torch.is_tensor(curls):
        k = k / (1 + curls * (13 * torch.atan2(x, -y)).cos())
    return (x * x + y * y).sqrt() * (1 - 1 / k)


def _portray(f: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """Portraits of a batch of faces, uint8 [n, 3, size, size], painted from the back to the front."""
    at = (torch.arange(size, device=f["x"].device) + 0.5) / size * 2 - 1
    body_x, body_y = (at - f["x"]) / f["scale"], (at[:, None] - f["y"]) / f["scale"]
    cos, sin = f["tilt"].cos(), f["tilt"].sin()
    x, y = body_x * cos + (body_y - 1) * sin, (body_y - 1) * cos - body_x * sin + 1  # around the neck
    mirrored = x.abs()
    image = f["backdrop"][..., None, None].repeat(1, 1, size, size)

    def paint(colour, distance, strength=1.0, outline=0.0):  # what lies inside, with an edge one pixel soft
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

    # the mouth lies between two parabolas that meet in its corners; half of them are shut
    bend = 1 - (x / f["mouth"]).square()
    upper, lower = 0.6 + f["smile"] * bend, 0.6 + (f["smile"] + f["open"].clamp(min=0)) * bend
    mouth = (upper - y).maximum(y - lower).maximum(mirrored - f["mouth"])
    paint(skin * skin.new_tensor([0.72, 0.42, 0.42]), mouth - 0.03)
    paint(red, mouth)
    paint(white, mouth.maximum(y - upper - 0.07) + 0.01)

    # hair in front: a cap with an opening for the face; brows are seen through it
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
