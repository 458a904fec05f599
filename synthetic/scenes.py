"""Synthetic scenes like i-CLEVR's: spheres, cubes and cylinders in eight colours on a lit grey floor."""
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
NULL = len(OBJECTS)  # null id: pads the labels of images with fewer than three objects

# The scene, in CLEVR's units: objects stand at x, y in [-3, 3] on the floor z = 0, seen from a corner.
CAMERA, TARGET = (7.48, -6.51, 5.34), (0.0, 0.0, 0.05)
TAN_X, TAN_Y = 16 / 35, 12 / 35  # half the view of a 35 mm lens on 32×24 mm film, squashed to a square
SIZE = {"cube": 0.58, "sphere": 0.64, "cylinder": 0.59}  # half an edge, or the radius
CYLINDER_HALF_HEIGHT = 0.65
REACH = 3.0  # objects stand within ± this
GAP = 0.25  # at least this much floor between two objects
PATCH = 0.5  # side of the square rendered around an object, relative to the image

# Three area lamps: position, linear colour, strength. Each scene jitters the positions.
LAMPS = (
    ((6.6, -3.2, 4.0), (1.00, 0.92, 0.80), 4.6),  # key: warm, from the right of the camera
    ((-3.6, -4.6, 2.6), (0.90, 0.95, 1.12), 0.75),  # fill: cool, from the left
    ((-1.2, 2.4, 5.6), (1.00, 1.00, 1.00), 2.2),  # back: neutral, from behind
)
LAMP_JITTER, LAMP_RADIUS = 0.8, 1.5
AMBIENT = 0.139  # the floor far from every lamp, linear
SHADOW = 0.6  # share of an occluded lamp's light that is lost; the rest is indirect
SHADOW_SAMPLES = 4  # shadow rays per lamp, and for the sky


def render(n: int, image_size: int = 64, seed: int = 0, device: str | torch.device = "cpu",
           batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render n scenes of three nested frames: frame k shows the scene's first k + 1 objects.

    Returns images uint8 [3n, 3, image_size, image_size], labels int64 [3n, 3] (object ids in ascending order,
    padded with NULL) and scene numbers int64 [3n]. The pixels depend on the seed alone, not on `batch`, the
    number of scenes rendered at once.
    """
    batch = batch or (48 if torch.device(device).type == "cpu" else 512)
    factors = _sample_factors(n, seed)
    images = torch.empty(n, 3, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(0, n, batch):
        part = {name: value[i:i + batch].to(device) for name, value in factors.items()}
        # each scene has its own noise generator, so that `batch` does not matter
        generators = [torch.Generator().manual_seed(s) for s in factors["seed"][i:i + batch].tolist()]
        grain = torch.stack([torch.randn(3, image_size, image_size, generator=g) for g in generators])
        images[i:i + batch] = _render(part, grain.to(device), image_size).cpu()
    visible = torch.arange(3)[:, None] >= torch.arange(3)  # [frame, object]
    labels = torch.where(visible, factors["object"][:, None, :], NULL).sort(2).values
    return images.flatten(0, 1), labels.flatten(0, 1), torch.arange(n).repeat_interleave(3)


def _sample_factors(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors of n scenes: three distinct objects each, their positions and rotations, the lamps."""
    g = torch.Generator().manual_seed(seed)
    objects = torch.rand(n, len(OBJECTS), generator=g).argsort(1)[:, :MAX_OBJECTS]
    # the first object stands in the middle; a position too close to an earlier object is sampled again
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

    Each body is an intersection of slabs, an infinite cylinder or a ball; a ray's interval inside it is the
    intersection of the intervals. Returns t of entry [...], hit [...] and the normal there [..., 3].
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
    root = b * b - a * c
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
    view = (centre - eye) @ axes.T  # right, down, forward
    patch = int(size * PATCH)

    def span(x: torch.Tensor, scale: int) -> torch.Tensor:
        start = ((x + 1) / 2 * size - patch / 2).round().clamp(0, size - patch).long() * scale
        return start[:, None] + torch.arange(patch * scale, device=device)

    x, y = view[:, 0] / view[:, 2] / TAN_X, view[:, 1] / view[:, 2] / TAN_Y
    rows, cols = span(y, 1), span(x, 1)
    fine_rows, fine_cols = span(y, fine), span(x, fine)

    # points that emit light: around each lamp and, for contact shadows, in the sky
    cloud = torch.randn(SHADOW_SAMPLES, 3, generator=torch.Generator().manual_seed(0))
    cloud = F.normalize(cloud, dim=1) * LAMP_RADIUS
    lamp_points = f["lamps"][:, :, None] + cloud.to(device)  # [n, lamps, samples, 3]
    up = torch.arange(SHADOW_SAMPLES, device=device) * (2 * math.pi / SHADOW_SAMPLES) + 0.4
    sky = 50 * torch.stack([up.cos(), up.sin(), torch.full_like(up, 1.0)], 1)
    points = torch.cat([lamp_points, sky.expand(n, 1, -1, -1)], 1)  # [n, lights, samples, 3]
    points = points.repeat_interleave(MAX_OBJECTS, 0)
    tint = torch.tensor([[strength * c for c in colour] for _, colour, strength in LAMPS], device=device)

    # share of each light that an object blocks at a pixel; its colour × coverage, and coverage
    shade = torch.zeros(MAX_OBJECTS * n, len(LAMPS) + 1, size, size, device=device)
    paint = torch.zeros(MAX_OBJECTS * n, 4, size, size, device=device)
    # the exponent (sRGB has 2.2) and the grey offset were fitted to the objects' mean colours in i-CLEVR
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
        layer = torch.cat([colour, torch.ones_like(t)[..., None]], -1) * hit[..., None]
        layer = F.avg_pool2d(layer.permute(0, 3, 1, 2), fine)
        paint[mine[:, None, None], :, rows[mine, :, None], cols[mine, None, :]] = layer.permute(0, 2, 3, 1)

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

    # each frame: the floor in the remaining light, then the objects from the farthest to the nearest
    shade, paint = shade.view(n, MAX_OBJECTS, -1, size, size), paint.view(n, MAX_OBJECTS, 4, size, size)
    to = f["lamps"][:, :, None, None] - floor
    lit = to[..., 2] / to.norm(dim=-1) ** 3  # [n, lamps, size, size]
    order = view[:, 2].view(n, MAX_OBJECTS).argsort(1, descending=True)
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
