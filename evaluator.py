"""Judges and scores: how well do generated images show what they were asked to show?

    python evaluator.py --data data/iclevr   # train and cache the i-CLEVR judge, print its held-out accuracy
    python evaluator.py --data drawn         # the same for the drawn scenes

A judge is a classifier trained on real (or drawn) images whose held-out accuracy is printed with every score.
Scripts train theirs when they first need it; their `--judge PATH` loads another, such as the course's.
"""
import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from common.datasets import LabelledScenes, load_iclevr, pick_source
from common.run import UserError, entry, pick_device, write_whole

JUDGES = Path("data") / "judges"
JUDGE_SIZE = 64  # every judge of scenes sees 64×64


class JudgeNet(ResNet):
    """torchvision's ResNet-18 with sigmoid outputs: at width 64 the layout of the i-CLEVR course's evaluator.

    [B, 3, 64, 64] in [-1, 1] → probabilities [B, n_classes]. `width` (of 64) narrows every layer.
    """

    def __init__(self, n_classes: int, width: int = 64):
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)
        self.fc = nn.Sequential(nn.Linear(8 * width, n_classes), nn.Sigmoid())

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


@dataclass
class Judge:
    """A trained classifier and what is known of it."""
    net: nn.Module
    title: str  # "ResNet-18, held-out accuracy 0.987"
    held_out: dict[str, float] | None  # its scores on scenes it was not trained on; None for a foreign one

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities [N, 24] for images [N, 3, H, W] in [-1, 1], on the images' device."""
        return torch.cat([self.net(_to_judge_size(part.float())) for part in images.split(256)])


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
        values = {key: torch.tensor([run[key] for run in runs]) for key in runs[0]}
        results[name] = {key: (v.mean().item(), v.std(correction=1).item() if draws > 1 else 0.0)
                         for key, v in values.items()}
    return results


def print_table(results: dict[str, dict]) -> None:
    """Results of score_sets, a list of sets a line, as mean ± standard deviation."""
    columns = ["accuracy", "exact", "accuracy_1", "accuracy_2", "accuracy_3"]
    print(f"{'':<14}" + "".join(f"{c:>17}" for c in columns))
    for name, scores in results.items():
        cells = [f"{scores[c][0]:.4f} ± {scores[c][1]:.4f}" if c in scores else "-" for c in columns]
        print(f"{name:<14}" + "".join(f"{c:>17}" for c in cells))


# ---------------------------------------------------------------------- scene judges

def get_judge(choice: str, data: LabelledScenes, width: int, steps: int,
              device: torch.device) -> Judge | None:
    """The judge that --judge names: "auto" (trained on `data` and cached), "none", or a checkpoint's path."""
    if choice == "none":
        return None
    if choice != "auto":
        return load_judge(Path(choice), len(data.classes), device)
    path = JUDGES / f"scenes-{data.digest}-w{width}-{steps}.pt"
    if path.is_file():
        return load_judge(path, len(data.classes), device)
    print(f"training a judge of {data.name}, once: ResNet-18 of width {width}, {steps} steps, kept as {path}")
    net, held_out = train_judge(data, width, steps, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": net.state_dict(), "width": width, "held_out": held_out, "data": data.name}
    write_whole(path, lambda p: torch.save(content, p))
    return load_judge(path, len(data.classes), device)


def load_judge(path: Path, n_classes: int, device: torch.device) -> Judge:
    """A judge's checkpoint: {"model": weights of a JudgeNet, …}, as the i-CLEVR course's and ours are."""
    if not path.is_file():
        raise UserError(f"--judge {path}: there is no such file")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        state = content["model"]
        found, features = state["fc.0.weight"].shape
    except Exception as error:
        raise UserError(f"--judge {path} is not a judge ({type(error).__name__}): it should hold key 'model' "
                        "with the weights of a ResNet-18 whose fc is Linear, Sigmoid") from None
    if found != n_classes:
        raise UserError(f"--judge {path} tells {found} classes apart, the data has {n_classes}: "
                        "use a judge that was trained for this data")
    with torch.random.fork_rng():
        net = JudgeNet(n_classes, features // 8).to(device)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:120]
        raise UserError(f"--judge {path} is no ResNet-18: {reason}") from None
    held_out = content.get("held_out")
    told = f"held-out accuracy {held_out['accuracy']:.4f}" if held_out else "held-out accuracy not known"
    told += "" if held_out else f" ({path.name})"
    return Judge(net.eval().requires_grad_(False), f"ResNet-18 of width {features // 8}, {told}", held_out)


def train_judge(data: LabelledScenes, width: int, steps: int, device: torch.device) -> tuple[nn.Module, dict]:
    """Train a JudgeNet on nine tenths of the scenes; returns it with its scores on the last tenth.

    AdamW under a one-cycle rate, batches of 32; images are mirrored, shifted by up to 4 pixels and grained.
    The held-out scenes are looked at once, after training: nothing is chosen by them. The global random state
    is left alone.
    """
    if len(data.scene.unique()) < 10:
        raise UserError(f"{data.name} has fewer than 10 scenes, too few for a judge: use --judge none")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        net = JudgeNet(len(data.classes), width).to(device)
        test = data.held_out()
        images, labels = data.images[~test].to(device), data.labels[~test].to(device)
        target = F.one_hot(labels, len(data.classes) + 1)[..., :-1].sum(1).float()
        batch = 32
        opt = torch.optim.AdamW(net.parameters(), weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=2e-3, total_steps=steps, pct_start=0.2)
        head, net.fc = net.fc, net.fc[0]  # trained on logits
        start, total = time.monotonic(), torch.zeros((), device=device)
        order = torch.randperm(0)
        for step in range(1, steps + 1):
            if len(order) < batch:
                order = torch.randperm(len(images)).to(device)
            i, order = order[:batch], order[batch:]
            x = _augment(_to_judge_size(images[i].float() / 127.5 - 1))
            loss = F.binary_cross_entropy_with_logits(net(x), target[i])
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
    judge = Judge(net.eval(), "", None)
    scores = torch.cat([judge(part.to(device) / 127.5 - 1).cpu() for part in data.images[test].split(256)])
    return net, count_objects(scores, data.labels[test])


def _to_judge_size(images: torch.Tensor) -> torch.Tensor:
    if images.shape[-1] == JUDGE_SIZE:
        return images
    return F.interpolate(images, (JUDGE_SIZE, JUDGE_SIZE), mode="bilinear", antialias=True)


def _augment(x: torch.Tensor) -> torch.Tensor:
    """Mirror each image or not, shift it by up to 4 pixels, add a little grain."""
    n, _, h, w = x.shape
    mirrored = torch.rand(n, 1, 1, 1, device=x.device) < 0.5
    x = F.pad(torch.where(mirrored, x.flip(3), x), (4, 4, 4, 4), mode="replicate")
    dy, dx = torch.randint(9, (2, n, 1, 1), device=x.device)
    rows, cols = dy + torch.arange(h, device=x.device)[:, None], dx + torch.arange(w, device=x.device)
    x = x[torch.arange(n, device=x.device)[:, None, None], :, rows, cols].permute(0, 3, 1, 2)
    return x + 0.02 * torch.randn_like(x)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", default="auto", help="auto, drawn, or the folder of i-CLEVR")
    parser.add_argument("--image-size", type=int, default=64, help="the size at which images are loaded")
    parser.add_argument("--judge-width", type=int, default=64, help="64 is ResNet-18; less is faster")
    parser.add_argument("--judge-steps", type=int, default=5000, help="training steps of 32 images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args()
    if min(args.image_size, args.judge_width, args.judge_steps) < 1:
        raise UserError("--image-size, --judge-width and --judge-steps must be at least 1")
    device = pick_device(args.device)
    data = load_iclevr(pick_source(args.data, "data/iclevr"), args.image_size)
    judge = get_judge("auto", data, args.judge_width, args.judge_steps, device)
    print(f"{data.name}: {judge.title}; " + ", ".join(f"{k} {v:.4f}" for k, v in judge.held_out.items()))


if __name__ == "__main__":
    entry(main)
