"""Train judges: those in judges/, which read the synthetic sets and MNIST, or one of your own data.

    python benchmarks/judges.py synthetic-scenes-64          # one of SHIPPED, after a change of its renderer
    python benchmarks/judges.py scenes --data data/iclevr    # as a script does when it needs one: cached
    python benchmarks/judges.py digits --also synthetic      # tested on another set of digits, too

A judge of a synthetic set is trained on images of one seed and scored on images of another; other judges on
images that were held out. The scores are kept in its file and printed with everything that it reads.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluator  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.datasets import Data, load_digits, load_faces, load_iclevr, resize, to_float  # noqa: E402
from common.errors import UserError, exit_status  # noqa: E402
from common.system import circumstances, pick_device, write_whole  # noqa: E402
from synthetic import digits, faces, scenes  # noqa: E402


@dataclass
class Recipe:
    renderer: object  # None: the real set
    size: int  # height and width of the images
    n: int  # scenes, digits or faces rendered for training; a tenth as many for the held-out scores
    width: int
    steps: int


SHIPPED = {
    "synthetic-scenes-64": Recipe(scenes, 64, 20_000, 16, 24_000),
    "synthetic-faces-64": Recipe(faces, 64, 20_000, 8, 6000),
    "synthetic-digits-32": Recipe(digits, 32, 60_000, 32, 12_000),
    "synthetic-digits-64": Recipe(digits, 64, 60_000, 32, 12_000),
    "mnist-32": Recipe(None, 32, 0, 32, 12_000),
    "mnist-64": Recipe(None, 64, 0, 32, 12_000),
}


def load_fresh(recipe: Recipe) -> Data:
    """The set that a judge is for; of a synthetic one, with fresh images of two other seeds."""
    kind = {scenes: "scenes", faces: "faces"}.get(recipe.renderer, "digits")
    data = load(kind, "synthetic" if recipe.renderer else "mnist", recipe.size, n=40)
    if recipe.renderer is None:
        return data
    size = 28 if recipe.renderer is digits else recipe.size  # digits are rendered like MNIST and resized
    sets = [recipe.renderer.render(n, size, seed)[:2] for seed, n in ((1, recipe.n), (2, recipe.n // 10))]
    (images, labels), (test_images, test_labels) = ((resize(x, [recipe.size] * 2), y) for x, y in sets)
    if recipe.renderer is faces:
        labels, test_labels = labels.float(), test_labels.float()
    return replace(data, images=images, labels=labels, test_images=test_images, test_labels=test_labels,
                   scene=None)


def ship(name: str, device: torch.device) -> None:
    """Train the judge of that name and write it to judges/, in half precision."""
    recipe, path = SHIPPED[name], evaluator.SHIPPED / f"{name}.pt"
    data = load_fresh(recipe)
    net = evaluator.train_judge(data, recipe.width, recipe.steps, device)
    half = {key: x.half() if x.is_floating_point() else x for key, x in net.state_dict().items()}
    net.load_state_dict(half)  # the scores are those of the rounded weights
    content = {"model": half, "held_out": evaluator.held_out_scores(net, data), "origin": data.origin,
               "classes": list(data.classes), "data": data.name,
               "command": f"python benchmarks/judges.py {name}", **circumstances(device)}
    path.parent.mkdir(exist_ok=True)
    write_whole(path, lambda p: torch.save(content, p))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {content['held_out']}")


def load(kind: str, source: str, size: int, n: int = 0) -> Data:
    """The set of that kind, as a script loads it; n: size of a synthetic one (0: as a script has it)."""
    cfg = SimpleNamespace(data=source, image_size=size, n_scenes=n or 6003, attributes="", crop=0,
                          skip_bad_images=False, n_synthetic=n or 60_000 if kind == "digits" else n or 10_000)
    loader = {"scenes": load_iclevr, "faces": load_faces}.get(kind)
    return loader(cfg) if loader else load_digits(cfg, size)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("name", choices=[*evaluator.KINDS, *SHIPPED], help="what the judge classifies")
    parser.add_argument("--data", default="auto", help="auto, synthetic, mnist (digits), or the set's folder")
    parser.add_argument("--image-size", type=int, help="size of the images (default: 64, digits 32)")
    parser.add_argument("--judge-width", type=int, default=64, help="64 is ResNet-18; less is faster")
    parser.add_argument("--judge-steps", type=int, default=5000, help="training steps")
    parser.add_argument("--also", help="--data of another set of digits to test it on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.name in SHIPPED:
        return ship(args.name, device)
    size = args.image_size or evaluator.KINDS[args.name].net.size
    if min(size, args.judge_width, args.judge_steps) < 1:
        raise UserError("--image-size, --judge-width and --judge-steps must be at least 1")
    if args.also and args.name != "digits":
        raise UserError("--also is for digits")
    data = load(args.name, args.data, size)
    judge = evaluator.load_judge(evaluator.trained_judge(args, data, device), data, device)
    print(", ".join(f"{k} {v:.4f}" for k, v in judge.held_out.items()))
    if args.also:
        other = load("digits", args.also, size)
        probabilities, _ = judge.read(to_float(x) for x in other.test_images.split(500))
        accuracy = evaluator.count_digits(probabilities, other.test_labels)["accuracy"]
        print(f"{len(other.test_images):,} test images of {other.name}: accuracy {accuracy:.4f}")
    return None


if __name__ == "__main__":
    sys.exit(exit_status(main))
