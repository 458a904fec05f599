"""Judges and scores: how well do generated images show what they were asked to show?

    python evaluator.py scenes --data data/iclevr   # train and cache a judge of i-CLEVR, print its accuracy
    python evaluator.py digits --data drawn         # the same for the drawn digits; --also mnist reads others
    python evaluator.py faces --data data/celeba    # the same for faces' attributes

A judge is a classifier trained on real (or drawn) images whose held-out accuracy is printed with every score.
Scripts train theirs when they first need it; their `--judge PATH` loads another, such as the course's.
"FD (judge)" is the Fréchet distance on a judge's features. It is no FID: that is common/fid.py's.
"""
import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common.datasets import (Digits, Faces, LabelledScenes, load_digits, load_faces, load_iclevr, pick_digits,
                             pick_source)
from common.fid import Inception, Moments, features, frechet_distance, load_inception
from common.run import NotFinite, Parser, UserError, entry, pick_device, write_whole

JUDGES = Path("data") / "judges"
Sampler = Callable[[int, torch.Generator], torch.Tensor]  # (n, source of z) → images [n, C, S, S] in [-1, 1]


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
class Judge:
    """A trained classifier and what is known of it. Images are [N, C, H, W] in [-1, 1], on its device."""
    net: nn.Module
    title: str  # "ResNet-18, held-out accuracy 0.987"
    held_out: dict[str, float] | None  # its scores on images it was not trained on; None for a foreign one

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, n_classes]."""
        return torch.cat([self.net(_resize(part.float(), self.net.size)) for part in images.split(256)])

    def with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [N, n_classes], and the features [N, D] that the last layer takes."""
        features = []
        hook = self.net.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            return self(images), torch.cat(features)
        finally:
            hook.remove()


# ---------------------------------------------------------------------- i-CLEVR's scores

def count_objects(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy as the i-CLEVR course defines it, and two stricter views of it.

    scores [N, C] of a judge; labels [N, 3], ids padded with C. With k objects asked for in an image, those
    among the judge's top k count as shown. Returns "accuracy" (shown ÷ asked for, over all images:
    micro-averaged recall at k), "exact" (share of images with every object shown) and "accuracy_1" …
    "accuracy_3" by number of objects.
    """
    n_classes = scores.shape[1]
    asked = labels < n_classes
    k = asked.sum(1)
    top = scores.topk(labels.shape[1]).indices
    in_top_k = torch.arange(labels.shape[1], device=labels.device) < k[:, None]
    shown = ((labels[:, :, None] == top[:, None, :]) & in_top_k[:, None, :]).any(2).sum(1)
    result = {"accuracy": (shown.sum() / k.sum()).item(), "exact": (shown == k).float().mean().item()}
    for number in range(1, labels.shape[1] + 1):
        if (k == number).any():
            result[f"accuracy_{number}"] = (shown[k == number].sum() / k[k == number].sum()).item()
    return result


@torch.no_grad()
def score_sets(sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], z_dim: int, judge: Judge,
               sets: dict[str, torch.Tensor], draws: int, seed: int, device: torch.device) -> dict[str, dict]:
    """Score images made for each list of label sets, over several draws of z.

    sample(z [N, z_dim], labels [N, 3]) → images [N, 3, H, W] in [-1, 1]; sets: {name: labels [N, 3]}.
    Returns {name: {score: (mean, std over draws)}}. Draw i uses the same z for one seed, whatever the device;
    the global random state is left alone.
    """
    results = {}
    for name, labels in sets.items():
        g = torch.Generator().manual_seed(seed)
        labels, runs = labels.to(device), []
        for _ in range(draws):
            z = torch.randn(len(labels), z_dim, generator=g).to(device)
            runs.append(count_objects(judge(sample(z, labels)), labels))
        results[name] = {key: _mean_std([run[key] for run in runs]) for key in runs[0]}
    return results


def print_table(results: dict[str, dict], columns: list[str]) -> None:
    """Rows of {column: (mean, standard deviation)} as mean ± standard deviation, "-": none."""
    first = max(map(len, results)) + 2
    print(" " * first + "".join(f"{c:>22}" for c in columns))
    for name, scores in results.items():
        cells = [f"{scores[c][0]:.4f} ± {scores[c][1]:.4f}" if c in scores else "-" for c in columns]
        print(f"{name:<{first}}" + "".join(f"{c:>22}" for c in cells))


# ---------------------------------------------------------------------- digits' scores

@torch.no_grad()
def look(judge: Judge, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Moments]:
    """Of images in [-1, 1] the judge's probabilities [N, n_classes], on the CPU, and features' moments."""
    seen, moments = [], Moments()
    for images in batches:
        if not images.isfinite().all():
            raise NotFinite("generated images are not finite numbers")
        probabilities, vectors = judge.with_features(images)
        moments.update(vectors)
        seen.append(probabilities.cpu())
    return torch.cat(seen), moments


def real_moments(judge: Judge, images: torch.Tensor, device: torch.device) -> Moments:
    """Moments of the judge's features of real images, uint8 [N, C, S, S]."""
    return look(judge, (part.to(device) / 127.5 - 1 for part in images.split(500)))[1]


@torch.no_grad()
def score_digits(sample: Sampler, judge: Judge, real: Moments, n: int, draws: int,
                 seed: int) -> dict[str, tuple]:
    """Score n generated digits, over several draws of z.

    Returns {score: (mean, std over draws)}: "FD (judge)" to the real images; of the classes the judge
    sees "chi2" (Pearson's, against uniform, 9 degrees of freedom) and "TV" (total-variation distance to
    uniform); "histogram": (10 mean shares, their stds). Draw i is the same z for one seed, whatever the
    device; the global random state is left alone.
    """
    g, runs = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        seen, moments = look(judge, (sample(min(500, n - i), g) for i in range(0, n, 500)))
        counts = seen.argmax(1).bincount(minlength=10).double()
        runs.append({"FD (judge)": distance(real, moments), "histogram": counts / n} | count_digits(counts))
    return {key: _mean_std([run[key] for run in runs]) for key in runs[0]}


def distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two sets of features: FID where they are those of FID's network."""
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def count_digits(counts: torch.Tensor) -> dict[str, float]:
    """How far from uniform counts [10] of digits are: Pearson's "chi2"; "TV", half the sum of |p - 1/10|."""
    n = counts.sum()
    return {"chi2": ((counts - n / 10).square().sum() / (n / 10)).item(),
            "TV": ((counts / n - 0.1).abs().sum() / 2).item()}


# ---------------------------------------------------------------------- attributes' scores

def decide(probabilities: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Probabilities [N, A] as attributes [N, A] of 0 and 1: of each group, columns of which exactly one is 1,
    the likeliest; without groups each for itself, from 0.5 on.
    """
    if not groups:
        return (probabilities >= 0.5).long()
    likeliest = [F.one_hot(probabilities[:, list(columns)].argmax(1), len(columns)) for columns in groups]
    return torch.cat(likeliest, 1)


def count_attributes(probabilities: torch.Tensor, labels: torch.Tensor,
                     groups: tuple[tuple[int, ...], ...]) -> dict:
    """How far what a judge sees agrees with labels [N, A].

    Returns "accuracy" (mean over the groups or, without, the attributes), "exact" (share of images with all
    of them right) and "by attribute" (accuracy of each, or of each group).
    """
    agree = decide(probabilities, groups) == labels
    right = torch.stack([agree[:, list(c)].all(1) for c in groups], 1) if groups else agree
    right = right.double()
    exact = right.prod(1).mean().item()
    return {"accuracy": right.mean().item(), "exact": exact, "by attribute": right.mean(0)}


@torch.no_grad()
def score_faces(sample: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]], judge: Judge,
                real: Moments, groups: tuple[tuple[int, ...], ...], n: int, draws: int,
                seed: int) -> dict[str, tuple]:
    """Score n generated faces, over several draws; sample(k, generator) → images, labels asked for [k, A].

    Returns {score: (mean, std over draws)}: "FD (judge)" to the real images, and those of count_attributes.
    """
    g, runs = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        labels = []

        def images(k: int) -> torch.Tensor:
            made, asked = sample(k, g)
            labels.append(asked.cpu())
            return made
        seen, moments = look(judge, (images(min(250, n - i)) for i in range(0, n, 250)))
        runs.append({"FD (judge)": distance(real, moments)}
                    | count_attributes(seen, torch.cat(labels), groups))
    return {key: _mean_std([run[key] for run in runs]) for key in runs[0]}


@torch.no_grad()
def score_distance(sample: Sampler, judge: Judge, real: Moments, n: int, draws: int,
                   seed: int) -> tuple[float, float]:
    """FD (judge) of n generated images to real ones: mean and std over draws of z."""
    g = torch.Generator().manual_seed(seed)
    return _mean_std([distance(real, look(judge, (sample(min(250, n - i), g) for i in range(0, n, 250)))[1])
                      for _ in range(draws)])


def attribute_names(data: Faces) -> list[str]:
    """What count_attributes' "by attribute" is of: each attribute, or each group as "first … last"."""
    if not data.groups:
        return list(data.classes)
    return [f"{data.classes[columns[0]]} … {data.classes[columns[-1]]}" for columns in data.groups]


# ---------------------------------------------------------------------- what InfoGAN's codes mean

def match(codes: torch.Tensor, digits: torch.Tensor,
          n_categories: int) -> tuple[list[int], float, torch.Tensor]:
    """How categories [N] and digits [N] agree, under the one-to-one assignment that makes them agree most.

    Returns the digit of each category (-1: none is left for it), the share of N on which they agree, and each
    category's purity [n_categories], the share of its commonest digit.
    """
    counts = torch.zeros(n_categories, 10).index_put_((codes, digits), torch.ones(1), accumulate=True)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    assigned = dict(zip(rows.tolist(), columns.tolist()))
    agree = counts[rows, columns].sum() / len(codes)
    purity = counts.max(1).values / counts.sum(1).clamp(min=1)
    return [assigned.get(k, -1) for k in range(n_categories)], agree.item(), purity


def score_category(sample: Callable[[torch.Tensor, torch.Generator], torch.Tensor], n_categories: int,
                   judge: Judge, n: int, draws: int, seed: int) -> dict:
    """What the judge sees in n images, each category as often; sample(category [k], generator) → images.

    Returns "accuracy" of code → digit (mean, std over draws), "purity" of each code ([means], [stds]) and
    "digit" of each code in the last draw, by `match`.
    """
    g, accuracy, purity = torch.Generator().manual_seed(seed), [], []
    category = torch.arange(n) % n_categories
    for _ in range(draws):
        found = torch.cat([judge(sample(part, g)).argmax(1).cpu() for part in category.split(500)])
        digit, agree, pure = match(category, found, n_categories)
        accuracy.append(agree)
        purity.append(pure)
    return {"accuracy": _mean_std(accuracy), "purity": _mean_std(purity), "digit": digit}


def slant_and_width(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of digits [N, 1, S, S] in [-1, 1], white on black: slant [N] and stroke width [N] in pixels of 28.

    Slant: how far the ink leans to the right per unit of height, from second moments, -μ11 / μ02. Width: ink
    over half the total variation, since a stroke of length l and width w has ink l·w and edges of length 2l.
    NaN where there is no ink.
    """
    ink = images[:, 0].double() / 2 + 0.5
    at = torch.arange(ink.shape[-1], dtype=ink.dtype, device=ink.device)
    mass = ink.sum((1, 2))
    x, y = (ink.sum(1) * at).sum(1) / mass, (ink.sum(2) * at).sum(1) / mass
    x, y = at - x[:, None], at - y[:, None]
    slant = -torch.einsum("nyx,nx,ny->n", ink, x, y) / torch.einsum("nyx,ny->n", ink, y.square())
    padded = F.pad(ink, (1, 1, 1, 1))
    edge = ((padded[:, 1:, :-1] - padded[:, :-1, :-1]).square()
            + (padded[:, :-1, 1:] - padded[:, :-1, :-1]).square()).sqrt().sum((1, 2))
    return slant, 2 * mass / edge * 28 / ink.shape[-1]


def score_continuous(make: Callable[..., torch.Tensor], z_dim: int, n_categories: int, n_continuous: int,
                     draws: int, seed: int, ways: int = 200, steps: int = 11) -> dict[str, tuple]:
    """What each continuous code moves: Spearman's correlation with slant and with stroke width, and how far.

    make(z, category, continuous) → images. Along each of `ways` ways the code goes from -1 to 1 in `steps`
    while noise, category and other codes stay. Returned are the means over the ways of the correlation within
    a way, "code 1 ~ slant", and of the change from its one end to the other, "code 1: change of slant" (a
    correlation can be high of next to no change); each as (mean, std over draws).
    """
    g, runs = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        runs.append({})
        for c in range(n_continuous):
            z, other = (torch.rand(ways, d, generator=g) * 2 - 1 for d in (z_dim, n_continuous))
            category = torch.arange(ways) % n_categories
            measured = []
            for value in torch.linspace(-1, 1, steps):
                codes = other.clone()
                codes[:, c] = value
                measured.append(torch.stack(slant_and_width(make(z, category, codes).cpu())))
            for name, values in zip(("slant", "width"), torch.stack(measured, 2)):  # each [ways, steps]
                rho = spearman(torch.arange(steps).expand(ways, -1), values)
                runs[-1][f"code {c + 1} ~ {name}"] = rho.mean().item()
                runs[-1][f"code {c + 1}: change of {name}"] = (values[:, -1] - values[:, 0]).nanmean().item()
    return {key: _mean_std([run[key] for run in runs]) for key in runs[0]}


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation [...] of [..., N] with [..., N]; 0 where one is constant or has a NaN."""
    a, b = (torch.from_numpy(rankdata(x.numpy(), axis=-1, nan_policy="propagate")) for x in (a, b))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).nan_to_num(0)


def score_reading(read: tuple[torch.Tensor, torch.Tensor], data: Digits) -> dict[str, tuple[float, float]]:
    """How well Q's reading of the test images, categories [N] and codes [N, C], recovers the true factors.

    Returns {"Q's category → class": (share, 0), "Q's code 1 ~ slant": (Spearman's correlation, 0), …}; the
    correlations are means of those within each class.
    """
    category, codes = read
    result = {"Q's category → class": (match(category, data.test_labels, int(category.max()) + 1)[1], 0.0)}
    for c in range(codes.shape[1]):
        for name in ("slant", "width"):
            rho = [spearman(codes[data.test_labels == d, c], data.test_factors[name][data.test_labels == d])
                   for d in data.test_labels.unique()]
            result[f"Q's code {c + 1} ~ {name}"] = (torch.stack(rho).mean().item(), 0.0)
    return result


# ---------------------------------------------------------------------- FID

def get_inception(weights: str, device: torch.device) -> Inception | None:
    """FID's network as --fid-weights names it; None, with a line saying why, where "auto" can't have it."""
    if weights == "none" or weights == "auto" and device.type == "cpu":
        if weights == "auto":
            print("FID: not measured on a CPU unless --fid-weights names its network's file")
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
    device, g = net.fc.weight.device, torch.Generator().manual_seed(seed)

    def moments(batches: Iterable[torch.Tensor]) -> Moments:
        result = Moments()
        for part in features(net, batches):
            result.update(part)
        return result

    reference = moments(part.to(device) for part in real.split(100))
    return _mean_std([distance(reference, moments(sample(min(100, n - i), g) for i in range(0, n, 100)))
                      for _ in range(draws)])


def _mean_std(values: list) -> tuple:
    """Mean and standard deviation over the first axis, as numbers or lists; of one value the latter is 0."""
    values = torch.as_tensor(values) if not isinstance(values[0], torch.Tensor) else torch.stack(values)
    std = values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
    return values.mean(0).tolist(), std.tolist()


# ---------------------------------------------------------------------- judges

def get_judge(choice: str, data: LabelledScenes | Digits | Faces, width: int, steps: int,
              device: torch.device) -> Judge | None:
    """The judge that --judge names: "auto" (trained on `data` and cached), "none", or a checkpoint's path."""
    if choice == "none":
        return None
    if choice != "auto":
        return load_judge(Path(choice), data, device)
    path = JUDGES / f"{data.kind}-{data.digest}-w{width}-{steps}.pt"
    if path.is_file():
        return load_judge(path, data, device)
    print(f"training a judge of {data.name}, once: width {width}, {steps} steps, kept as {path}")
    net, held_out = train_judge(data, width, steps, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": net.state_dict(), "width": width, "held_out": held_out, "data": data.name}
    write_whole(path, lambda p: torch.save(content, p))
    return load_judge(path, data, device)


NETS = {"scenes": (JudgeNet, 8, "ResNet-18"), "digits": (DigitNet, 2, "digit CNN"),
        "faces": (JudgeNet, 8, "ResNet-18")}  # features: n · width


def load_judge(path: Path, data: LabelledScenes | Digits | Faces, device: torch.device) -> Judge:
    """A judge's checkpoint: {"model": weights of a JudgeNet or DigitNet, …}, as the i-CLEVR course's is."""
    if not path.is_file():
        raise UserError(f"--judge {path}: there is no such file")
    Net, times, kind = NETS[data.kind]
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        state = content["model"]
        found, features = state["fc.0.weight"].shape
    except Exception as error:
        raise UserError(f"--judge {path} is not a judge ({type(error).__name__}): it should hold key 'model' "
                        f"with the weights of a {kind} whose fc is Linear and an activation") from None
    if found != len(data.classes):
        raise UserError(f"--judge {path} tells {found} classes apart, the data has {len(data.classes)}: "
                        "use a judge that was trained for this data")
    with torch.random.fork_rng():
        net = Net(found, features // times).to(device)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:120]
        raise UserError(f"--judge {path} is no {kind}: {reason}") from None
    held_out = content.get("held_out")
    told = f"held-out accuracy {held_out['accuracy']:.4f}" if held_out else "held-out accuracy not known"
    told += "" if held_out else f" ({path.name})"
    return Judge(net.eval().requires_grad_(False), f"{kind} of width {features // times}, {told}", held_out)


def train_judge(data: LabelledScenes | Digits | Faces, width: int, steps: int,
                device: torch.device) -> tuple[nn.Module, dict]:
    """Train a judge of the data's kind; returns it with its scores on images it was not trained on.

    Scenes: on nine tenths of the scenes; digits and faces: on the training set, tested on the test set. All
    but digits are mirrored at random. The held-out images are looked at once, after training: nothing is
    chosen by them. The global random state is left alone.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        net = NETS[data.kind][0](len(data.classes), width).to(device)
        judge = Judge(net, "", None)

        def scores(images: torch.Tensor) -> torch.Tensor:
            return torch.cat([judge(part.to(device) / 127.5 - 1).cpu() for part in images.split(256)])

        if isinstance(data, Faces):
            target = data.labels.float()
            fit_judge(net, data.images, target, F.binary_cross_entropy_with_logits, steps, 32, True)
            found = count_attributes(scores(data.test_images), data.test_labels, data.groups)
            return net, {"accuracy": found["accuracy"], "exact": found["exact"]}
        if isinstance(data, Digits):
            fit_judge(net, data.images, data.labels, F.cross_entropy, steps, 64, False)
            right = scores(data.test_images).argmax(1) == data.test_labels
            return net, {"accuracy": right.float().mean().item()}
        if len(data.scene.unique()) < 10:
            raise UserError(f"{data.name} has fewer than 10 scenes, too few for a judge: use --judge none")
        test = data.held_out()
        target = F.one_hot(data.labels, len(data.classes) + 1)[..., :-1].sum(1).float()
        fit_judge(net, data.images[~test], target[~test], F.binary_cross_entropy_with_logits, steps, 32, True)
        return net, count_objects(scores(data.images[test]), data.labels[test])


def fit_judge(net: nn.Module, images: torch.Tensor, target: torch.Tensor, criterion: Callable, steps: int,
              batch: int, mirror: bool) -> None:
    """Train net on uint8 images [N, C, H, W]: AdamW under a one-cycle rate, images shifted and grained."""
    device = net.fc[0].weight.device
    images, target = images.to(device), target.to(device)
    opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=2e-3, total_steps=steps, pct_start=0.2)
    head, net.fc = net.fc, net.fc[0]  # trained on logits
    start, total = time.monotonic(), torch.zeros((), device=device)
    order = torch.randperm(0)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(images)).to(device)
        i, order = order[:batch], order[batch:]
        x = _augment(_resize(images[i].float() / 127.5 - 1, net.size), mirror)
        loss = criterion(net(x), target[i])
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
    net.eval()


def _resize(images: torch.Tensor, size: int) -> torch.Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _augment(x: torch.Tensor, mirror: bool) -> torch.Tensor:
    """Shift each image by up to a sixteenth of its size, mirror it or not, add a little grain."""
    n, _, h, w = x.shape
    if mirror:
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    reach = h // 16
    x = F.pad(x, (reach,) * 4, mode="replicate")
    dy, dx = torch.randint(2 * reach + 1, (2, n, 1, 1), device=x.device)
    rows, cols = dy + torch.arange(h, device=x.device)[:, None], dx + torch.arange(w, device=x.device)
    x = x[torch.arange(n, device=x.device)[:, None, None], :, rows, cols].permute(0, 3, 1, 2)
    return x + 0.02 * torch.randn_like(x)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form)
    parser.add_argument("kind", choices=list(NETS), help="what the judge is to know")
    parser.add_argument("--data", default="auto", help="auto, drawn, mnist (digits), or the set's folder")
    parser.add_argument("--image-size", type=int, help="the size they are loaded at (default: 64, digits 32)")
    parser.add_argument("--judge-width", type=int, default=64, help="64 is ResNet-18; less is faster")
    parser.add_argument("--judge-steps", type=int, default=5000, help="training steps")
    parser.add_argument("--also", help="another set of digits to read: its --data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    size = args.image_size or NETS[args.kind][0].size
    if min(size, args.judge_width, args.judge_steps) < 1:
        raise UserError("--image-size, --judge-width and --judge-steps must be at least 1")
    device = pick_device(args.device)
    if args.also and args.kind != "digits":
        raise UserError("--also is for digits")
    if args.kind == "digits":
        data = load_digits(pick_digits(args.data), size)
    elif args.kind == "faces":
        data = load_faces(pick_source(args.data, "data/celeba"), size)
    else:
        data = load_iclevr(pick_source(args.data, "data/iclevr"), size)
    judge = get_judge("auto", data, args.judge_width, args.judge_steps, device)
    print(f"{data.name}: {judge.title}; " + ", ".join(f"{k} {v:.4f}" for k, v in judge.held_out.items()))
    if args.also:
        other = load_digits(pick_digits(args.also), size)
        right = judge((other.test_images / 127.5 - 1).to(device)).argmax(1).cpu() == other.test_labels
        print(f"{len(right)} test images of {other.name}: accuracy {right.float().mean():.4f}")


if __name__ == "__main__":
    entry(main)
