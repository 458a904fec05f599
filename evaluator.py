"""Judges and scores: do generated images show what was requested?

A judge is a classifier trained on real (or synthetic) images, whose held-out accuracy is printed with every
score. judges/ holds those of the synthetic sets and MNIST; for another set a script trains one when it first
needs it, and so does `python benchmarks/judges.py scenes --data data/iclevr`. `--judge PATH` loads another,
such as the i-CLEVR course's. "FD (judge)" is the Fréchet distance on a judge's features. It is not FID, see
common/fid.py.
"""
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common.blocks import moved, multi_hot
from common.datasets import Data, to_float
from common.errors import NotFinite, UserError, reading
from common.fid import Inception, Moments, features, frechet_distance, load_inception
from common.run import Run
from common.system import write_whole

JUDGES = Path("data") / "judges"  # trained here
SHIPPED = Path(__file__).parent / "judges"  # benchmarks/judges.py makes these
# (how many, source of randomness) → images [n, C, S, S] in [-1, 1] and their requested labels, or None
Sampler = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor | None]]


# ---------------------------------------------------------------------- judges

class JudgeNet(ResNet):
    """torchvision's ResNet-18 with sigmoid outputs: at width 64 the layout of the i-CLEVR course's evaluator.

    [B, 3, 64, 64] in [-1, 1] → probabilities [B, n_classes]. `width` (of 64) narrows every layer.
    """
    size = 64

    def __init__(self, n_classes: int, width: int = 64):
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Sequential(nn.Linear(8 * width, n_classes), nn.Sigmoid())

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class DigitNet(nn.Sequential):
    """A small CNN, [B, 1, 32, 32] in [-1, 1] → probabilities [B, n_classes]; `width`: of the last conv."""
    size = 32

    def __init__(self, n_classes: int, width: int = 64):
        def conv(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
                                 nn.MaxPool2d(2))
        super().__init__()
        self.body = nn.Sequential(conv(1, width // 4), conv(width // 4, width // 2), conv(width // 2, width),
                                  nn.Flatten(), nn.Linear(width * 4 * 4, 2 * width), nn.ReLU())
        self.fc = nn.Sequential(nn.Linear(2 * width, n_classes), nn.Softmax(1))


@dataclass
class Kind:
    """What a kind of data needs of its judge."""
    net: type[nn.Module]
    name: str
    features: int  # per unit of width
    batch: int  # training images a step
    mirror: bool  # train on mirrored images too
    loss: Callable  # (logits, target)
    target: Callable  # (labels, data) → what the loss takes
    measure: Callable  # (probabilities, labels, groups) → scores; labels None: without them
    at_once: int  # images generated and scored at once


@dataclass
class Judge:
    """A trained classifier and what is known of it. Images are [N, C, H, W] in [-1, 1], on its device."""
    net: nn.Module
    kind: Kind
    title: str  # "ResNet-18 of width 64, held-out accuracy 0.9872"
    held_out: dict[str, float] | None  # its scores on images it was not trained on; None for a foreign one

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, n_classes]."""
        return torch.cat([self.net(to_size(part.float(), self.net.size)) for part in images.split(256)])

    def with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [N, n_classes], and the features [N, D] before the last layer."""
        found = []
        hook = self.net.fc.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            return self(images), torch.cat(found)
        finally:
            hook.remove()

    @torch.no_grad()
    def read(self, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Moments]:
        """Probabilities [N, n_classes], on the CPU, and the features' moments. NotFinite for NaN images."""
        probabilities, moments = [], Moments()
        for images in batches:
            images = images.to(next(self.net.parameters()).device)
            if not images.isfinite().all():
                raise NotFinite("the generated images are not finite numbers")
            found, vectors = self.with_features(images)
            moments.update(vectors)
            probabilities.append(found.cpu())
        return torch.cat(probabilities), moments

    def moments(self, images: torch.Tensor) -> Moments:
        """Moments of the features of real images, uint8 [N, C, S, S]."""
        return self.read(to_float(part) for part in images.split(500))[1]


def get_judge(cfg, data: Data, device: torch.device) -> Judge | None:
    """The judge that cfg.judge names: "auto" (the shipped one, else as trained_judge), "none", or a path."""
    if cfg.judge == "none" or not data.classes:
        if getattr(cfg, "fid_weights", "auto") not in ("auto", "none"):
            raise UserError("--fid-weights: FID is measured beside a judge's scores, and there is no judge")
        if cfg.judge != "none":
            print("no judge and no scores: the images have no labels")
        return None
    path = Path(cfg.judge)
    if cfg.judge == "auto":
        path = SHIPPED / f"{data.name.lower().replace(' ', '-')}-{data.images.shape[-1]}.pt"
        if not fits(path, data):
            path = trained_judge(cfg, data, device)
    judge = load_judge(path, data, device)
    print(f"judge: {judge.title} ({path})")
    return judge


def fits(path: Path, data: Data) -> bool:
    """Is there such a shipped judge, of these classes and of images that the same code renders?"""
    if not path.exists():
        return False
    with reading(path, "a judge. Restore it: git checkout judges"):
        content = torch.load(path, weights_only=True)
        return content["origin"] == data.origin and content["classes"] == list(data.classes)


def trained_judge(cfg, data: Data, device: torch.device) -> Path:
    """The file of a judge of cfg.judge_width and judge_steps, trained on `data` once and cached."""
    path = JUDGES / f"{data.kind}-{data.digest}-w{cfg.judge_width}-{cfg.judge_steps}.pt"
    if not path.is_file():
        print(f"training a judge of {data.name}, once: width {cfg.judge_width}, {cfg.judge_steps} steps")
        path.parent.mkdir(parents=True, exist_ok=True)  # an error before the training, not after it
        net = train_judge(data, cfg.judge_width, cfg.judge_steps, device)
        content = {"model": net.state_dict(), "held_out": held_out_scores(net, data), "data": data.name}
        write_whole(path, lambda p: torch.save(content, p))
    return path


def load_judge(path: Path, data: Data, device: torch.device) -> Judge:
    """A judge's checkpoint, {"model": weights of the kind's network, …}, like the i-CLEVR course's."""
    kind = KINDS[data.kind]
    with reading(path, f"a judge: under the key 'model' the weights of a {kind.name} with fc.0 a Linear"):
        content = torch.load(path, map_location=device, weights_only=True)
        state = content["model"]
        n_classes, n_features = state["fc.0.weight"].shape
    if n_classes != len(data.classes):
        raise UserError(f"--judge {path} has {n_classes} classes, the data has {len(data.classes)}: use a "
                        "judge that was trained for this data")
    width = n_features // kind.features
    with torch.random.fork_rng():
        net = kind.net(n_classes, width).to(device)
    with reading(path, f"a {kind.name}"):
        net.load_state_dict(state)
    held_out = content.get("held_out")
    known = f"held-out accuracy {held_out['accuracy']:.4f}" if held_out else "held-out accuracy not known"
    return Judge(net.eval().requires_grad_(False), kind, f"{kind.name} of width {width}, {known}", held_out)


def train_judge(data: Data, width: int, steps: int, device: torch.device) -> nn.Module:
    """Train a judge on the data's training part. AdamW, one-cycle learning rate; images are shifted, noised
    and, except digits, mirrored. The global random state is left alone.
    """
    kind, (images, labels, _, _) = KINDS[data.kind], data.split()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        net = kind.net(len(data.classes), width).to(device)
        images, target = images.to(device), kind.target(labels, data).to(device)
        opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=2e-3, total_steps=max(steps, 10),
                                                       pct_start=0.2)  # which can't be 1 step
        head, net.fc = net.fc, net.fc[0]  # trained on logits
        start, total, order = time.monotonic(), torch.zeros((), device=device), torch.randperm(0)
        for step in range(1, steps + 1):
            if len(order) < kind.batch:
                order = torch.randperm(len(images)).to(device)
            i, order = order[:kind.batch], order[kind.batch:]
            loss = kind.loss(net(augment(to_size(to_float(images[i]), net.size), kind.mirror)), target[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            total += loss.detach()
            if step % 250 == 0 or step == steps:
                left = (time.monotonic() - start) / step * (steps - step)
                mean = total.item() / (step % 250 or 250)
                print(f"judge: step {step}/{steps}  loss {mean:.4f}  {left:.0f} s left", flush=True)
                total.zero_()
        net.fc = head
        return net.eval()


def held_out_scores(net: nn.Module, data: Data) -> dict[str, float]:
    """Scores on the part held out from training. Nothing is chosen by it."""
    kind, (_, _, images, labels) = KINDS[data.kind], data.split()
    probabilities, _ = Judge(net, kind, "", None).read(to_float(x) for x in images.split(256))
    scores = kind.measure(probabilities, labels, data.groups)
    return {name: value for name, value in scores.items() if name.startswith(("accuracy", "exact"))}


def to_size(images: torch.Tensor, size: int) -> torch.Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def augment(x: torch.Tensor, mirror: bool) -> torch.Tensor:
    """Shift each image by up to a sixteenth of its size, mirror it at random if wanted, add some noise."""
    x = moved(x, 1 / 16, mirror)
    return x + 0.02 * torch.randn_like(x)


# ---------------------------------------------------------------------- measures of what a judge reads

def count_objects(probabilities: torch.Tensor, labels: torch.Tensor, _groups: tuple = ()) -> dict[str, float]:
    """Accuracy as the i-CLEVR course defines it, and stricter views of it.

    probabilities [N, C]; labels [N, 3], ids padded with C. accuracy = requested objects found in the judge's
    top k, over all requested (k: number of objects requested in that image); "exact": share of images with
    all objects found; "accuracy_1" … "accuracy_3": by number of objects.
    """
    k = (labels < probabilities.shape[1]).sum(1)
    top = probabilities.topk(min(labels.shape[1], probabilities.shape[1])).indices
    in_top_k = torch.arange(top.shape[1]) < k[:, None]
    found = ((labels[:, :, None] == top[:, None, :]) & in_top_k[:, None, :]).any(2).sum(1)
    result = {"accuracy": (found.sum() / k.sum()).item(), "exact": (found == k).float().mean().item()}
    for number in range(1, labels.shape[1] + 1):
        if (k == number).any():
            result[f"accuracy_{number}"] = (found[k == number].sum() / k[k == number].sum()).item()
    return result


def count_digits(probabilities: torch.Tensor, labels: torch.Tensor | None = None, _groups=()) -> dict:
    """How evenly the ten digits occur: "TV", the total-variation distance of their shares to uniform; "chi2",
    Pearson's against uniform (9 degrees of freedom); "histogram", the shares [10]. With labels: "accuracy".
    """
    counts = probabilities.argmax(1).bincount(minlength=10).double()
    n = counts.sum()
    right = {} if labels is None else {"accuracy": (probabilities.argmax(1) == labels).float().mean().item()}
    return right | {"chi2": ((counts - n / 10).square().sum() / (n / 10)).item(),
                    "TV": ((counts / n - 0.1).abs().sum() / 2).item(), "histogram": counts / n}


def decide(probabilities: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Probabilities [N, A] → attributes [N, A] of 0 and 1: the likeliest of each group; without groups, each
    attribute from 0.5 on.
    """
    if not groups:
        return (probabilities >= 0.5).long()
    likeliest = [F.one_hot(probabilities[:, list(columns)].argmax(1), len(columns)) for columns in groups]
    return torch.cat(likeliest, 1)


def count_attributes(probabilities: torch.Tensor, labels: torch.Tensor | None,
                     groups: tuple[tuple[int, ...], ...]) -> dict:
    """Agreement with labels [N, A]: "accuracy" (mean over the groups or, without, the attributes), "exact"
    (share of images with all right), "by attribute" (accuracy of each attribute or group). {} without labels.
    """
    if labels is None:
        return {}
    agree = decide(probabilities, groups) == labels
    right = torch.stack([agree[:, list(c)].all(1) for c in groups], 1) if groups else agree
    right = right.double()
    exact = right.prod(1).mean().item()
    return {"accuracy": right.mean().item(), "exact": exact, "by attribute": right.mean(0)}


def attribute_names(data: Data) -> list[str]:
    """What count_attributes' "by attribute" is of: each attribute, or each group as "first … last"."""
    if not data.groups:
        return list(data.classes)
    return [f"{data.classes[columns[0]]} … {data.classes[columns[-1]]}" for columns in data.groups]


KINDS = {
    "scenes": Kind(JudgeNet, "ResNet-18", 8, 32, True, F.binary_cross_entropy_with_logits,
                   lambda ids, data: multi_hot(ids, len(data.classes)),
                   count_objects, 500),
    "digits": Kind(DigitNet, "digit CNN", 2, 64, False, F.cross_entropy, lambda labels, _: labels,
                   count_digits, 500),
    "faces": Kind(JudgeNet, "ResNet-18", 8, 32, True, F.binary_cross_entropy_with_logits,
                  lambda labels, _: labels, count_attributes, 250),
}


# ---------------------------------------------------------------------- scores of generated images

def over_draws(measure: Callable[[torch.Generator], dict], draws: int, seed: int) -> dict[str, tuple]:
    """{score: (mean, standard deviation over draws)} of what measure(source of randomness) returns.

    Draw i has the same z for one seed, whatever the device; the global random state is left alone.
    """
    g = torch.Generator().manual_seed(seed)
    runs = [measure(g) for _ in range(draws)]
    return {key: mean_std([run[key] for run in runs]) for key in runs[0]}


def score(sample: Sampler, judge: Judge, n: int, draws: int, seed: int, groups: tuple = (),
          real: Moments | None = None) -> dict[str, tuple]:
    """Score n generated images per draw: what the judge's kind measures and, with `real`, "FD (judge)"."""
    def once(g: torch.Generator) -> dict:
        labels = []

        def images() -> Iterator[torch.Tensor]:
            for i in range(0, n, judge.kind.at_once):
                x, y = sample(min(judge.kind.at_once, n - i), g)
                labels.append(y)
                yield x
        probabilities, moments = judge.read(images())
        requested = None if labels[0] is None else torch.cat(labels).cpu()
        found = {"FD (judge)": distance(real, moments)} if real else {}
        return found | judge.kind.measure(probabilities, requested, groups)
    return over_draws(once, draws, seed)


def score_sets(sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z_dim: int, judge: Judge,
               sets: dict[str, torch.Tensor], draws: int, seed: int) -> dict[str, tuple]:
    """Score images made for each list of label sets, {name: labels [N, 3]}, as `score` does.

    sample(z [N, z_dim], labels [N, 3]) → images [N, 3, H, W] in [-1, 1]. Returns {"accuracy NAME": (mean, std
    over draws), "exact NAME": …}, with the scores of count_objects.
    """
    results = {}
    for name, labels in sets.items():
        left = list(labels.split(judge.kind.at_once)) * draws

        def make(n: int, g: torch.Generator, left=left) -> tuple[torch.Tensor, torch.Tensor]:
            part = left.pop(0)
            return sample(torch.randn(n, z_dim, generator=g), part), part
        found = score(make, judge, len(labels), draws, seed)
        results |= {f"{measure} {name}": value for measure, value in found.items()}
    return results


def distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two sets of features; FID if they are those of FID's network."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def get_inception(weights: str, device: torch.device) -> Inception | None:
    """FID's network as --fid-weights names it; None, with a line that says why, if "auto" can't have it."""
    if weights == "none" or weights == "auto" and device.type == "cpu":
        if weights == "auto":
            print("FID: not measured on a CPU unless --fid-weights names the file of its network")
        return None
    try:
        return load_inception(weights, device)
    except UserError as error:
        if weights != "auto":
            raise
        print(f"FID: not measured: {error}")
        return None


@torch.no_grad()
def score_fid(sample: Sampler, net: Inception, real: torch.Tensor, n: int, draws: int,
              seed: int) -> tuple[float, float]:
    """FID of n generated images to real ones, uint8 [N, 1 or 3, S, S]: mean and std over draws of z."""
    device = net.fc.weight.device

    def once(g: torch.Generator) -> dict:
        fake = Moments(features(net, (sample(min(100, n - i), g)[0] for i in range(0, n, 100))))
        return {"FID": distance(reference, fake)}

    if len(real) < 2048:
        print(f"FID of {len(real):,} real images, fewer than 2,048, is biased: compare equal numbers only")
    reference = Moments(features(net, (part.to(device) for part in real.split(100))))
    return over_draws(once, draws, seed)["FID"]


def mean_std(values: list) -> tuple:
    """Mean and standard deviation over the first axis, as numbers or lists; of one value the latter is 0."""
    values = torch.as_tensor(values) if not isinstance(values[0], torch.Tensor) else torch.stack(values)
    std = values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
    return values.mean(0).tolist(), std.tolist()


def report(run: Run, data: Data, judge: Judge, scores: dict[str, dict], columns: list[str]) -> None:
    """Print the columns of scores {row: {score: (mean, std)}} as a table; write all of them to scores.json.

    Its "summary" is the last row's columns: that of the checkpoint loaded last, which pictures show, too.
    """
    cfg, images = run.cfg, ""
    about = {"data": data.name, "judge": judge.title, "judge_held_out": judge.held_out,
             "draws": cfg.eval_draws, "seed": run.trained_seed}
    if data.test_images is not None:
        about |= {"n_real": len(data.test_images), "n_fake": cfg.eval_images}
        images = f"{cfg.eval_images:,} generated and {len(data.test_images):,} held-out images, "
    print(f"\n{run.folder}: {data.name}, {images}{cfg.eval_draws} draws of z; judge: {judge.title}")
    rows = {f"{name}.pt (step {row['step']})" if "step" in row else name: row for name, row in scores.items()}
    columns = [c for c in columns if any(c in row for row in rows.values())]
    first = max(map(len, rows)) + 2
    print(" " * first + "".join(f"{c:>22}" for c in columns))
    for name, row in rows.items():
        cells = [f"{row[c][0]:.4f} ± {row[c][1]:.4f}" if c in row else "-" for c in columns]
        print(f"{name:<{first}}" + "".join(f"{c:>22}" for c in cells))
    if "by attribute" in row:
        about["attributes"] = attribute_names(data)
        print(f"\naccuracy of each attribute: {', '.join(scores)}")
        for k, attribute in enumerate(about["attributes"]):
            print(f"{attribute:<36}" + "".join(f"{s['by attribute'][0][k]:10.4f}" for s in scores.values()))
    summary = {c: row[c] for c in columns if c in row}
    run.write_scores(about | scores | {"summary": summary})
