"""Judges and scores: do generated images show what was requested?

A judge is a classifier trained on real (or synthetic) images, whose held-out accuracy is printed with every
score. G learns to please the judge that chooses best.pt, so another one, of another architecture, reports:
a VGG scores scenes and faces, a ResNet-18 chooses. pretrained/judges/ holds judges of i-CLEVR, MNIST and the
synthetic sets; for another set a script, or tools/train_judge.py, trains them. `--judge PATH` reports with
another, such as the i-CLEVR course's. "FD (judge)" is the Fréchet distance of a judge's features. It is not
FID, which common/fid.py measures.
"""
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import make_layers

from common.blocks import multi_hot, random_translate
from common.datasets import Data, to_float
from common.fid import Inception, feature_stats, features, frechet_distance, load_inception
from common.files import UserError, atomic_write, reading, write_json
from harness.cli import NotFinite
from harness.pictures import names_of, save_images
from harness.run import Run
from synthetic.measures import count_attributes, count_digits, count_objects

JUDGES = Path("data") / "judges"  # trained here
BUNDLED = Path(__file__).parent / "pretrained" / "judges"  # tools/train_judge.py makes these
# (how many, source of randomness[, labels]) → images [n, C, S, S] in [-1, 1] and their labels, or None
Sampler = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Stats = tuple[torch.Tensor, torch.Tensor]  # mean [D] and covariance [D, D] of features


# ---------------------------------------------------------------------- judges
class ResNet18(ResNet):
    """torchvision's ResNet-18 with sigmoid outputs: at width 64 the layout of the i-CLEVR course's evaluator.
    [B, 3, 64, 64] in [-1, 1] → probabilities [B, n_classes]. `width` (of 64) narrows every layer.
    """
    title = "ResNet-18"
    features = 8  # before the last layer, per unit of width

    def __init__(self, n_classes: int, width: int = 64):
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Sequential(nn.Linear(8 * width, n_classes), nn.Sigmoid())

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class VGG(nn.Sequential):
    """Convolutions and pooling without shortcuts (Simonyan & Zisserman 2015); takes and gives the same."""
    title = "VGG"
    features = 4

    def __init__(self, n_classes: int, width: int = 64):
        super().__init__()
        w = width // 4
        layers = make_layers([w, "M", 2 * w, 2 * w, "M", 4 * w, 4 * w, "M", 8 * w, 8 * w, "M"], True)
        self.body = nn.Sequential(layers, nn.Conv2d(8 * w, 4 * width, 4), nn.BatchNorm2d(4 * width),
                                  nn.ReLU(), nn.Flatten())
        self.fc = nn.Sequential(nn.Linear(4 * width, n_classes), nn.Sigmoid())


class DigitNet(nn.Sequential):
    """A small CNN, [B, 1, 32, 32] in [-1, 1] → probabilities [B, n_classes]; `width`: of the last conv."""
    title = "digit CNN"
    features = 2

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
    """What a domain needs of its judge."""
    nets: tuple[type[nn.Module], ...]  # the last reports, another one chooses best.pt
    size: int  # of the images that they take
    batch: int  # batch size of their training
    loss: Callable  # (logits, target)
    target: Callable  # (labels, data) → what the loss takes
    measure: Callable  # (probabilities, labels, groups) → scores; labels may be None
    at_once: int  # images generated and scored at once
    columns: list[str]  # of the table of scores


KINDS = {
    "scenes": Kind((ResNet18, VGG), 64, 32, F.binary_cross_entropy_with_logits,
                   lambda ids, data: multi_hot(ids, len(data.classes)), count_objects, 500,
                   ["accuracy test", "accuracy new_test"]),
    "digits": Kind((DigitNet,), 32, 64, F.cross_entropy, lambda labels, _: labels,
                   count_digits, 500, ["FD (judge)", "TV", "FID"]),
    "faces": Kind((ResNet18, VGG), 64, 32, F.binary_cross_entropy_with_logits,
                  lambda labels, _: labels, count_attributes, 250,
                  ["FD (judge)", "accuracy", "exact", "FID"]),
}


@dataclass
class Judge:
    """A trained classifier and what is known of it. Images are [N, C, H, W] in [-1, 1], on its device."""
    net: nn.Module
    kind: Kind
    title: str  # "VGG of width 64, held-out accuracy 0.9872"
    held_out: dict[str, float] | None  # held-out scores; None for a user-supplied checkpoint

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, n_classes]."""
        return self.with_features(images)[0]

    @torch.no_grad()
    def with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [N, n_classes], and the features [N, D] before the last layer."""
        found = []
        with self.net.fc.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])):
            parts = [self.net(to_size(part.float(), self.kind.size)) for part in images.split(256)]
        return torch.cat(parts), torch.cat(found)

    @torch.no_grad()
    def read(self, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [N, n_classes] and features [N, D], on the CPU. Raises NotFinite for NaN images."""
        found = []
        for images in batches:
            images = images.to(next(self.net.parameters()).device)
            if not images.isfinite().all():
                raise NotFinite("the generated images are not finite numbers")
            found.append(self.with_features(images))
        return tuple(torch.cat(parts).cpu() for parts in zip(*found, strict=True))

    def stats(self, images: torch.Tensor) -> Stats:
        """Statistics of the features of real images, uint8 [N, C, S, S]."""
        return feature_stats([self.read(to_float(part) for part in images.split(500))[1]])


def get_judge(cfg, data: Data, device: torch.device) -> Judge | None:
    """The judge that reports, as cfg.judge names it: "auto" (auto_judge's), "none", or a path."""
    if cfg.judge == "none" or not data.classes:
        if getattr(cfg, "fid_weights", "auto") not in ("auto", "none"):
            raise UserError("--fid-weights: FID is measured beside a judge's scores, and there is no judge")
        if cfg.judge != "none":
            print("no judge and no scores: the images have no labels")
        return None
    if cfg.judge == "auto":
        return auto_judge(cfg, data, device, KINDS[data.domain].nets[-1])
    return load_judge(Path(cfg.judge), data, device)


def auto_judge(cfg, data: Data, device: torch.device, net: type[nn.Module]) -> Judge:
    """The bundled judge of that network and this data (same renderer or pixels, same classes), else one that
    is trained on `data` once, of cfg.judge_width and judge_steps, and cached.
    """
    path = BUNDLED / f"{data.name.replace(' ', '-')}-{data.images.shape[-1]}-{net.__name__}.pt".lower()
    if path.exists():
        with reading(path, "a judge. Restore it: git checkout pretrained"):
            content = torch.load(path, weights_only=True)
            if (content["origin"], content["classes"]) == (data.fingerprint, list(data.classes)):
                return load_judge(path, data, device)
    return load_judge(trained_judge(cfg, data, device, net), data, device)


def trained_judge(cfg, data: Data, device: torch.device, net: type[nn.Module]) -> Path:
    """The file of the judge that auto_judge trains and caches."""
    about = f"{net.__name__.lower()}-w{cfg.judge_width}-{cfg.judge_steps}"
    path = JUDGES / f"{data.domain}-{data.digest}-{about}.pt"
    if not path.is_file():
        if not len(data.images):
            raise UserError(f"there is no judge of {data.name}, and no images to train one: give --data")
        print(f"training a judge of {data.name}, once: {about}")
        path.parent.mkdir(parents=True, exist_ok=True)  # an error before the training, not after it
        trained = train_judge(data, net, cfg.judge_width, cfg.judge_steps, device)
        content = {"model": trained.state_dict(), "net": net.__name__, "data": data.name,
                   "held_out": held_out_scores(trained, data)}
        atomic_write(path, lambda p: torch.save(content, p))
    return path


def load_judge(path: Path, data: Data, device: torch.device) -> Judge:
    """A judge's checkpoint, {"model": weights, "net": network …}, or the i-CLEVR course's, without "net"."""
    nets = {net.__name__: net for net in KINDS[data.domain].nets}
    default, *_ = nets.values()
    with reading(path, f"a judge: under the key 'model' the weights of a {default.title} with fc.0 a Linear"):
        content = torch.load(path, map_location=device, weights_only=True)
        network, state = nets[content.get("net", default.__name__)], content["model"]
        n_classes, n_features = state["fc.0.weight"].shape
    if n_classes != len(data.classes):
        raise UserError(f"--judge {path} has {n_classes} classes, the data has {len(data.classes)}: use a "
                        "judge that was trained for this data")
    width = n_features // network.features
    with torch.random.fork_rng(devices=[]):
        net = network(n_classes, width)
    with reading(path, f"a {network.title}"):
        net.load_state_dict(state)
    held_out = content.get("held_out")
    known = f"held-out accuracy {held_out['accuracy']:.4f}" if held_out else "held-out accuracy not known"
    title = f"{network.title} of width {width}, {known}"
    print(f"judge: {title} ({path})")
    return Judge(net.to(device).eval().requires_grad_(False), KINDS[data.domain], title, held_out)


def train_judge(data: Data, network: type[nn.Module], width: int, steps: int,
                device: torch.device) -> nn.Module:
    """Train a judge on the data's training part, with AdamW, a one-cycle learning rate, and images shifted
    and noised, not mirrored: it shall see where the light falls from. The global random state is left alone.
    """
    kind, (images, labels, _, _) = KINDS[data.domain], split(data)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(kind.nets.index(network))
        net = network(len(data.classes), width).to(device)
        images, target = images.to(device), kind.target(labels, data).to(device)
        opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=2e-3, total_steps=max(steps, 10),
                                                       pct_start=0.2)  # which can't be 1 step
        head, net.fc = net.fc, net.fc[0]  # trained on logits
        start, order = time.monotonic(), torch.randperm(0)
        for step in range(1, steps + 1):
            if len(order) < kind.batch:
                order = torch.randperm(len(images)).to(device)
            i, order = order[:kind.batch], order[kind.batch:]
            x = random_translate(to_size(to_float(images[i]), kind.size), 1 / 16)
            loss = kind.loss(net(x + 0.02 * torch.randn_like(x)), target[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            if step % 250 == 0 or step == steps:
                left = (time.monotonic() - start) / step * (steps - step)
                print(f"judge: step {step}/{steps}  loss {loss.item():.4f}  {left:.0f} s left", flush=True)
        net.fc = head
        return net.eval()


def held_out_scores(net: nn.Module, data: Data) -> dict[str, float]:
    """Scores on the part held out from training. Nothing is chosen by it."""
    kind, (_, _, images, labels) = KINDS[data.domain], split(data)
    probabilities, _ = Judge(net, kind, "", None).read(to_float(x) for x in images.split(256))
    scores = kind.measure(probabilities, labels, data.groups)
    return {name: value for name, value in scores.items() if name.startswith(("accuracy", "exact"))}


def to_size(images: torch.Tensor, size: int) -> torch.Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


# ---------------------------------------------------------------------- splits
def split(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Train/held-out split for the judge; for scenes, a fixed 10 % of the scenes is held out."""
    if data.scene is None:
        return data.images, data.labels, data.test_images, data.test_labels
    numbers = data.scene.unique()
    if len(numbers) < 10:
        raise UserError(f"{data.name} has fewer than 10 scenes, too few for a judge: use --judge none")
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    test = torch.isin(data.scene, numbers[order[:round(len(numbers) / 10)]])
    return data.images[~test], data.labels[~test], data.images[test], data.labels[test]


def validation_sets(data: Data, n: int = 96) -> torch.Tensor:
    """Label sets [≤ n, 3] of training scenes, up to n/3 of 1, 2, 3 objects each, that are in no test list (if
    there are any): best.pt is chosen by these.
    """
    g, sets = torch.Generator().manual_seed(0), data.labels.unique(dim=0)
    tests = torch.cat([sets[:0], *data.test_label_sets.values()])
    others = sets[~(sets[:, None] == tests).all(2).any(1)]
    sets = others if len(others) else sets
    count = (sets < len(data.classes)).sum(1)
    chosen = [sets[count == k] for k in (1, 2, 3)]
    return torch.cat([s[torch.randperm(len(s), generator=g)[:n // 3]] for s in chosen])


# ---------------------------------------------------------------------- scores of generated images
def over_draws(measure: Callable[[torch.Generator], dict], draws: int, seed: int) -> dict[str, tuple]:
    """{score: (mean, standard deviation over draws)} of what measure(source of randomness) returns. Draw i
    has the same z for one seed, whatever the device; the global random state is left alone.
    """
    g = torch.Generator().manual_seed(seed)
    found = [measure(g) for _ in range(draws)]
    values = {key: torch.stack([torch.as_tensor(run[key]) for run in found]) for key in found[0]}
    std = {key: x.std(0) if draws > 1 else x[0] * 0 for key, x in values.items()}
    return {key: (x.mean(0).tolist(), std[key].tolist()) for key, x in values.items()}


def score(sample: Sampler, judge: Judge, n: int, draws: int, seed: int, groups: tuple = (),
          real: Stats | None = None, labels: torch.Tensor | None = None) -> dict[str, tuple]:
    """Score n generated images per draw, of labels [n, …] or else those that `sample` draws: the measure of
    the judge's domain and, with `real`, "FD (judge)".
    """
    def once(g: torch.Generator) -> dict:
        requested = []

        def images() -> Iterator[torch.Tensor]:
            for part in torch.arange(n).split(judge.kind.at_once):
                x, y = sample(len(part), g) if labels is None else sample(len(part), g, labels[part])
                requested.append(y)
                yield x
        probabilities, vectors = judge.read(images())
        y = None if requested[0] is None else torch.cat(requested).cpu()
        found = {"FD (judge)": frechet_distance(*real, *feature_stats([vectors]))} if real else {}
        return found | judge.kind.measure(probabilities, y, groups)
    return over_draws(once, draws, seed)


def score_sets(sample: Sampler, judge: Judge, sets: dict[str, torch.Tensor], draws: int,
               seed: int) -> dict[str, tuple]:
    """Score images of each list of label sets, {name: labels [N, 3]}: {"accuracy NAME": (mean, std), …}."""
    return {f"{measure} {name}": value for name, labels in sets.items()
            for measure, value in score(sample, judge, len(labels), draws, seed, labels=labels).items()}


def get_inception(weights: str, device: torch.device) -> Inception | None:
    """Load FID's Inception per --fid-weights; "auto": on a GPU only, or None (and why) if unavailable."""
    if weights == "none" or weights == "auto" and device.type == "cpu":
        return None
    try:
        return load_inception(weights, device)
    except UserError as error:
        if weights != "auto":
            raise
        print(f"FID: not measured: {error}")


@torch.no_grad()
def score_fid(sample: Sampler, net: Inception, real: torch.Tensor, n: int, draws: int,
              seed: int) -> dict[str, tuple]:
    """FID of n generated images to real ones, uint8 [N, 1 or 3, S, S]: {"FID": (mean, std over draws)}."""
    def stats(images: Iterable[torch.Tensor]) -> Stats:
        return feature_stats(features(net, (part.to(net.fc.weight.device) for part in images)))

    if len(real) < 2048:
        print(f"FID of {len(real):,} real images, fewer than 2,048, is biased: compare equal numbers only")
    reference = stats(real.split(100))
    return over_draws(lambda g: {"FID": frechet_distance(*reference, *stats(
        sample(min(100, n - i), g)[0] for i in range(0, n, 100)))}, draws, seed)


class Scorer:
    """Scores a script's samples: validate() chooses best.pt by training data, test() is what is reported.

    judge: reports. chooser: the judge that chooses; None where nothing is to be chosen.
    """

    def __init__(self, cfg, data: Data, judge: Judge, chooser: Judge | None, inception: Inception | None):
        self.cfg, self.data, self.inception = cfg, data, inception
        self.judge, self.chooser = judge, chooser
        if data.domain == "scenes":
            self.validation, self.test_stats = {"val": validation_sets(data), **data.test_label_sets}, None
        else:
            # as many training images, which are in random order, as there are test images
            self.validation = chooser and chooser.stats(data.images[:len(data.test_images)])
            self.test_stats = judge.stats(data.test_images)

    def validate(self, sample: Sampler) -> dict[str, float]:
        """What run.log_scores takes: "best", and columns of metrics.csv, by the judge that chooses."""
        cfg, judge = self.cfg, self.chooser
        if self.data.domain == "scenes":  # only "val" chooses: the test lists are for the curves
            found = score_sets(sample, judge, self.validation, cfg.eval_draws, cfg.seed)
            columns = {f"accuracy_{name}": found[f"accuracy {name}"][0] for name in self.validation}
            return {"best": columns["accuracy_val"], **columns}
        found = score(sample, judge, cfg.eval_images, 1, cfg.seed, self.data.groups, self.validation)
        columns = {"fd_judge": "FD (judge)", "tv_digits": "TV", "accuracy": "accuracy"}
        columns = {name: found[key][0] for name, key in columns.items() if key in found}
        return {"best": -columns["fd_judge"], **columns}

    def test(self, sample: Sampler, fid: bool = True) -> dict[str, tuple]:
        """The scores to report, of held-out images or test lists, by other z than best.pt was chosen by."""
        options = dict(draws=self.cfg.eval_draws, seed=self.cfg.seed + 1)
        if self.data.domain == "scenes":
            return score_sets(sample, self.judge, self.data.test_label_sets, **options)
        options["n"] = self.cfg.eval_images
        found = score(sample, self.judge, groups=self.data.groups, real=self.test_stats, **options)
        if self.inception and fid:
            found |= score_fid(sample, self.inception, self.data.test_images, **options)
        return found

    def scale(self) -> dict[str, dict]:
        """Scores of real images, {row: scores}: the distance of training images, which the judge knows; what
        it reads of held-out faces, compared with their labels.
        """
        if self.data.domain == "scenes":
            return {}
        rows = {"training images": self.test(lambda n, g: (self.data.random_images(n, g), None), fid=False)}
        if self.data.domain == "faces":
            found = held_out_scores(self.judge.net, self.data)
            rows["held-out images"] = {name: (value, 0.0) for name, value in found.items()}
        return rows


def get_scorer(run: Run, data: Data) -> Scorer | None:
    """The run's scorer; None for --sample, without labels, with --judge none, and on other ranks than 0."""
    cfg, device = run.cfg, run.device
    judge = get_judge(cfg, data, device) if run.is_main and run.action != "sample" else None
    if not judge:
        return None
    chooser, others = None, [net for net in judge.kind.nets if net is not type(judge.net)]
    if cfg.eval_every and run.action != "eval":
        chooser = auto_judge(cfg, data, device, others[0]) if others else judge
    return Scorer(cfg, data, judge, chooser, get_inception(getattr(cfg, "fid_weights", "none"), device))


# ---------------------------------------------------------------------- the end of every run
def finish(run: Run, data: Data, scorer: Scorer | None, sample: Sampler, save_pictures: Callable[[], None],
           shown: str = "best", labels: torch.Tensor | None = None, columns: list[str] | None = None,
           more: Callable[[], dict] = dict, describe: Callable | None = None) -> dict[str, dict]:
    """Score last.pt and best.pt, save pictures of the one that is `shown`, report; returns all scores.
    more(): further scores of the loaded checkpoint. labels, describe: of single images (--to), for
    save_images. The summary in scores.json is of the shown checkpoint.
    """
    if not run.is_main:
        return {}
    names = [name for name in ("last", "best") if (run.folder / f"{name}.pt").exists()]
    scores = scorer.scale() if scorer else {}
    for name in sorted(names, key=lambda name: name == shown)[-2 if scorer else -1:]:  # the shown one last
        step = run.load(name)["step"]
        if scorer:
            scores[name] = {"step": step} | scorer.test(sample) | more()
    run.title += f", step {step}"
    if run.cfg.to:
        save_images(sample, run.cfg, describe or partial(names_of, classes=data.classes), labels)
    elif run.action != "eval":
        try:
            save_pictures()
        except OSError as error:
            raise UserError(f"{run.folder} takes no pictures ({error}): use --to FOLDER") from None
    if scorer:
        report(run, data, scorer, scores, columns or scorer.judge.kind.columns)
    return scores


def report(run: Run, data: Data, scorer: Scorer, scores: dict[str, dict], columns: list[str]) -> None:
    """Print the columns of scores {row: {score: (mean, std)}} as a table; write all to scores.json."""
    about = {"data": data.name, "recipe": run.recipe.removeprefix("recipe "), "judge": scorer.judge.title,
             "draws": run.cfg.eval_draws, "seed": run.trained_seed}
    path = run.folder / "scores.json"
    if run.action == "eval" and path.exists():
        about |= {key: value for key, value in json.loads(path.read_bytes()).items() if key == "chosen_by"}
    elif scorer.chooser and scorer.chooser is not scorer.judge:
        about["chosen_by"] = scorer.chooser.title
    if data.test_images is not None:
        about |= {"n_real": len(data.test_images), "n_fake": run.cfg.eval_images}
    print(f"\n{run.folder}: {', '.join(f'{name} {value}' for name, value in about.items())}\n")
    rows = {f"{name}.pt (step {row['step']})" if "step" in row else name: row for name, row in scores.items()}
    columns = [c for c in columns if any(c in row for row in rows.values())]
    first = max(map(len, rows)) + 2
    print(" " * first + "".join(f"{c:>22}" for c in columns))
    for name, row in rows.items():
        cells = [f"{row[c][0]:.4f} ± {row[c][1]:.4f}" if c in row else "-" for c in columns]
        print(f"{name:<{first}}" + "".join(f"{c:>22}" for c in cells))
    if "by attribute" in row:
        groups = [f"{data.classes[columns[0]]} … {data.classes[columns[-1]]}" for columns in data.groups]
        about["attributes"] = groups or list(data.classes)
        found = {name: row["by attribute"][0] for name, row in scores.items() if "by attribute" in row}
        print(f"\naccuracy of each attribute: {', '.join(found)}")
        for k, attribute in enumerate(about["attributes"]):
            print(f"{attribute:<36}" + "".join(f"{values[k]:10.4f}" for values in found.values()))
    about |= {"judge_held_out": scorer.judge.held_out, "summary": {c: row[c] for c in columns if c in row}}
    write_json(path, about | scores)
