"""Train judges: the bundled ones, of the synthetic sets, MNIST and i-CLEVR, or those of your own data.

    python tools/train_judge.py synthetic-scenes-64-vgg      # one of BUNDLED, after its renderer has changed
    python tools/train_judge.py faces --data data/celeba     # what a script trains when it needs them; cached
    python tools/train_judge.py digits --also synthetic      # also test it on another set of digits

A bundled judge of a synthetic set is trained on images of one seed and scored on images of another. All other
judges are scored on held-out images. The scores are kept in the judge's file and printed with all it scores.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluator  # noqa: E402
from common.datasets import Data, load_digits, load_faces, load_iclevr, resize, to_float  # noqa: E402
from common.files import UserError, atomic_write  # noqa: E402
from harness.cli import Parser, exit_status  # noqa: E402
from harness.device import pick_device, provenance  # noqa: E402
from synthetic import digits, faces, scenes  # noqa: E402


@dataclass
class Spec:
    """How a bundled judge is trained."""
    source: ModuleType | str  # a renderer, or --data of a real set
    size: int  # height and width of the images
    n: int  # images rendered for training; a tenth as many give the held-out scores
    net: type
    width: int
    steps: int


BUNDLED = {
    "i-clevr-64-resnet18": Spec("data/iclevr", 64, 0, evaluator.ResNet18, 16, 8000),
    "i-clevr-64-vgg": Spec("data/iclevr", 64, 0, evaluator.VGG, 64, 8000),
    "synthetic-scenes-64-resnet18": Spec(scenes, 64, 20_000, evaluator.ResNet18, 16, 24_000),
    "synthetic-scenes-64-vgg": Spec(scenes, 64, 20_000, evaluator.VGG, 48, 12_000),
    "synthetic-faces-64-resnet18": Spec(faces, 64, 20_000, evaluator.ResNet18, 8, 6000),
    "synthetic-faces-64-vgg": Spec(faces, 64, 20_000, evaluator.VGG, 32, 6000),
    "synthetic-digits-32-digitnet": Spec(digits, 32, 60_000, evaluator.DigitNet, 32, 12_000),
    "synthetic-digits-64-digitnet": Spec(digits, 64, 60_000, evaluator.DigitNet, 32, 12_000),
    "mnist-32-digitnet": Spec("mnist", 32, 0, evaluator.DigitNet, 32, 12_000),
    "mnist-64-digitnet": Spec("mnist", 64, 0, evaluator.DigitNet, 32, 12_000),
}


def load(domain: str, source: str, size: int, n: int = 0) -> Data:
    """Load that domain's set as a script does; n: size of a synthetic one (0: the scripts' default)."""
    cfg = SimpleNamespace(data=source, image_size=size, n_scenes=n or 6003, attributes="", crop=0,
                          skip_bad_images=False, n_synthetic=n or (60_000 if domain == "digits" else 10_000))
    if domain == "digits":
        return load_digits(cfg, size)
    return load_iclevr(cfg) if domain == "scenes" else load_faces(cfg)


def load_fresh(spec: Spec) -> Data:
    """Load the set that a bundled judge reads; for a synthetic set, render images of two unused seeds."""
    if isinstance(spec.source, str):
        return load("digits" if spec.source == "mnist" else "scenes", spec.source, spec.size)
    domain = spec.source.__name__.rsplit(".", 1)[1]
    data = load(domain, "synthetic", spec.size, n=40)
    size = 28 if domain == "digits" else spec.size  # MNIST's size, resized below
    rendered = (spec.source.render(n, size, seed)[:2] for seed, n in ((1, spec.n), (2, spec.n // 10)))
    (images, labels), (test_images, test_labels) = ((resize(x, [spec.size] * 2), y) for x, y in rendered)
    if domain == "faces":
        labels, test_labels = labels.float(), test_labels.float()
    return replace(data, images=images, labels=labels, test_images=test_images, test_labels=test_labels,
                   scene=None)


def train_bundled(name: str, device: torch.device) -> None:
    """Train the bundled judge of that name and write it to pretrained/judges/, in half precision."""
    spec, path = BUNDLED[name], evaluator.BUNDLED / f"{name}.pt"
    data = load_fresh(spec)
    net = evaluator.train_judge(data, spec.net, spec.width, spec.steps, device)
    half = {key: x.half() if x.is_floating_point() else x for key, x in net.state_dict().items()}
    net.load_state_dict(half)  # so that the rounded weights are scored
    content = {"model": half, "net": spec.net.__name__, "held_out": evaluator.held_out_scores(net, data),
               "origin": data.fingerprint, "classes": list(data.classes), "data": data.name,
               "command": f"python tools/train_judge.py {name}", **provenance(device)}
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lambda p: torch.save(content, p))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {content['held_out']}")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("name", choices=[*evaluator.KINDS, *BUNDLED], help="what the judge classifies")
    parser.add_argument("--data", default="auto", help="auto, synthetic, mnist (digits), or the set's folder")
    parser.add_argument("--image-size", type=int, help="size of the images (default: 64; digits: 32)")
    parser.add_argument("--judge-width", type=int, default=64, help="64 is ResNet-18; less is faster")
    parser.add_argument("--judge-steps", type=int, default=5000, help="training steps")
    parser.add_argument("--also", help="--data of another set of digits to test it on")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.name in BUNDLED:
        train_bundled(args.name, device)
        return
    size = args.image_size or evaluator.KINDS[args.name].size
    if min(size, args.judge_width, args.judge_steps) < 1:
        raise UserError("--image-size, --judge-width and --judge-steps must be at least 1")
    if args.also and args.name != "digits":
        raise UserError("--also is for digits")
    data = load(args.name, args.data, size)
    for net in evaluator.KINDS[args.name].nets:
        judge = evaluator.load_judge(evaluator.trained_judge(args, data, device, net), data, device)
        print(", ".join(f"{k} {v:.4f}" for k, v in judge.held_out.items()))
    if args.also:
        other = load("digits", args.also, size)
        probabilities, _ = judge.read(to_float(x) for x in other.test_images.split(500))
        accuracy = evaluator.count_digits(probabilities, other.test_labels)["accuracy"]
        print(f"{len(other.test_images):,} test images of {other.name}: accuracy {accuracy:.4f}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
