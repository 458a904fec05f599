"""Synthetic handwritten digits like MNIST's, with known slant, stroke width and size."""
import math

import torch
import torch.nn.functional as F

# The upright shapes of the ten digits. Each variant: its frequency, then for each stroke the points that the
# pen passes, in hundredths of the height, x right and y down. A repeated point is a corner.
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
SEGMENTS = 40  # straight segments per digit
# Variation of the digits: means and standard deviations, fitted to MNIST's training images
SLANT, ASPECT, TILT = (0.20, 0.25), (1.0, 0.15), (0.04, 0.06)  # tilt: rise of horizontal lines
PEN = (2.55, 0.24)  # pixels of 28; the standard deviation is of the logarithm
WARP, WARP_SCALE, WARP_WAVES = 0.05, 0.35, 8  # in heights: amplitude and length scale; number of waves
JITTER = 0.02  # in heights: noise of each point, and the same again of each stroke
BOX, SMALLEST, MARGIN = 20.0, 16.0, 1.5  # pixels: the ink's largest and smallest height; the empty border
EDGE = 1.1  # pixels over which a stroke's edge fades


def render(n: int, image_size: int = 28, seed: int = 0, device: str | torch.device = "cpu",
           batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Render n handwritten digits like MNIST's: white on black, about in the middle 20×20 of 28×28 pixels.

    Returns images uint8 [n, 1, image_size, image_size], labels int64 [n] (0 to 9, uniform), factors
    float32 [n] each: "slant", the lean of an upright line to the right per unit of height (-0.55 to 0.95,
    mostly -0.2 to 0.6); "width", the pen's diameter (1.2 to 5.3), and "size", the height of the ink (12 to
    20, mostly over 17), both in pixels of a 28-pixel image. The pixels depend on the seed alone, not on
    `batch`, the number of digits rendered at once.
    """
    batch = batch or (64 if torch.device(device).type == "cpu" else 2048)
    labels, ends, factors = _sample_strokes(n, seed)
    scale = image_size / 28
    images = torch.empty(n, 1, image_size, image_size, dtype=torch.uint8)
    for i in range(0, n, batch):
        part = ends[:, i:i + batch].to(device) * scale
        radius = factors["width"][i:i + batch].to(device) / 2 * scale
        images[i:i + batch, 0] = _ink(part, radius, image_size).cpu()
    return images, labels, factors


def _spline(glyph: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A glyph's points [C, 2], the stroke of each [C], and weights [2, SEGMENTS, C] that turn the points into
    both ends of each segment: every stroke is a Catmull-Rom spline, cut into segments of equal length.
    """
    points = torch.tensor([point for stroke in glyph for point in stroke]) / 100
    stroke = torch.tensor([k for k, stroke in enumerate(glyph) for _ in stroke])
    basis = torch.tensor([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    fine, walked = [], []  # per stroke: weights of densely spaced points, and the arc length at each
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


def _sample_strokes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Labels [n], both ends of all segments [2, n, SEGMENTS, 2] (x, y in pixels of 28), factors [n] each."""
    g = torch.Generator().manual_seed(seed)

    def bell(mean: float, sd: float) -> torch.Tensor:  # nearly normal, but never beyond 3 sd
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

    # warp by a smooth random field without its shear: the slant alone leans a digit
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

    # scale the ink to its height (smaller if it would be too wide) and centre its mass
    extent = ends.amax(1) - ends.amin(1)
    size = BOX - (BOX - SMALLEST) * torch.rand(n, generator=g) ** 3
    scale = torch.minimum((size - width) / extent[:, 1], (BOX - width) / extent[:, 0])
    size = scale * extent[:, 1] + width
    ends = ends * scale[:, None, None]
    start, end = ends.chunk(2, 1)
    length = (end - start).norm(dim=2, keepdim=True)
    mass = ((start + end) / 2 * length).sum(1) / length.sum(1)
    centre = 14 + torch.rand(n, 2, generator=g)  # MNIST centres it in pixel 14, so 14.5 on average
    room = MARGIN + width[:, None] / 2
    shift = (centre - mass).maximum(room - ends.amin(1)).minimum(28 - room - ends.amax(1))[:, None]
    return labels, torch.stack([start + shift, end + shift]), {"slant": slant, "width": width, "size": size}


def _ink(ends: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """Images uint8 [n, size, size] of segments [2, n, S, 2] and pen radii [n], all in pixels."""
    middle, along = (ends[0] + ends[1]) / 2, ends[1] - ends[0]
    half = along.norm(dim=2).clamp(min=1e-6)[..., None] / 2  # [n, S, 1]
    c, s = (along / (2 * half)).split(1, 2)  # the segment's direction
    at = torch.arange(size, device=ends.device) + 0.5
    dx, dy = at - middle[..., :1], at - middle[..., 1:]  # [n, S, size]
    # distance of each pixel beyond the segment's ends, and from its line [n, S, size, size]
    beyond = (dx * c)[:, :, None] + (dy * s)[..., None]
    beyond = beyond.abs_().sub_(half[..., None]).clamp_(min=0)
    aside = (dx * s)[:, :, None] - (dy * c)[..., None]
    distance = beyond.square_().add_(aside.square_()).amin(1).sqrt()
    ink = ((radius[:, None, None] - distance) / EDGE + 0.5).clamp(0, 1)
    return (ink * 255).round().to(torch.uint8)
