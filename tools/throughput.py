"""Seconds per iteration of the scripts, beside the same training run the way most public code does it.

    python tools/throughput.py    # all six scripts at the sizes of --quick, few synthetic images, 2 threads
    python tools/throughput.py sngan_iclevr --set recipe=paper ch=64 --rounds 3 --json speed.json

"script" is the script as it is; "fp32" is the script with --precision fp32. "usual" is the script's own
main() with parts replaced, so that networks, losses and steps stay the same. It uses fp32, the contiguous
memory format, a DataLoader with two worker processes, spectral norm in every forward pass, Adam with its
defaults, and item() to read every logged loss at each step. Its workers decode PNGs of the training size; for
digits they resize arrays as PIL images, as with torchvision's MNIST. All three ways have what the steps
themselves save (one pass of G for both updates, no gradients for D's weights in G's step) and, on CUDA, TF32
and cudnn.benchmark.

Each measurement is a process of its own without judge, pictures and checkpoints: three iterations to warm up,
then the timed ones. A round measures all three ways in turn, and the first round is not counted. The medians
over rounds of the times and of their ratios are printed and, with --json FILE, written.
"""
import argparse
import contextlib
import importlib
import io
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from unittest import mock

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import blocks, datasets  # noqa: E402
from common.files import UserError, write_json  # noqa: E402
from harness.cli import Parser, Settings, exit_status, flag, parse  # noqa: E402
from harness.device import pick_device, provenance  # noqa: E402
from harness.run import Run  # noqa: E402

NAMES = ("dcgan_mnist", "infogan_mnist", "acgan_celeba", "vae_celeba", "cdcgan_iclevr", "sngan_iclevr")
WAYS = ("script", "fp32", "usual")
WARM_UP = 3  # iterations before the timed ones
SMALL = dict(data="synthetic", n_synthetic=960, n_scenes=320)  # a scene has three images
FIXED = dict(judge="none", sample_every=0, eval_every=0, save_every=0)


class Pictures(Dataset):
    """Training images and labels, decoded when asked for: from PNGs in `folder`, or from arrays [N, H, W]."""

    def __init__(self, data: datasets.Data, arrays: torch.Tensor | None, folder: Path):
        self.arrays, self.labels, self.folder = arrays, data.labels, folder
        self.transform = Compose([Resize(data.images.shape[2:]), ToTensor(), Normalize(0.5, 0.5)])
        if arrays is None:
            folder.mkdir(parents=True)
            for i, image in enumerate(data.images):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.arrays is None:
            image = Image.open(self.folder / f"{i}.png").convert("RGB")
        else:
            image = Image.fromarray(self.arrays[i].numpy())
        return self.transform(image), self.labels[i]


class LoaderBatches:
    """Replaces datasets.Batches; its epoch never ends, so that no start of the workers is timed."""

    def __init__(self, pictures: Pictures, batch_size: int, seed: int, device: torch.device):
        order = RandomSampler(pictures, num_samples=10**9, generator=torch.Generator().manual_seed(seed))
        self.batches = iter(DataLoader(pictures, batch_size, sampler=order, num_workers=2))
        self.device, self.per_epoch = device, len(pictures) // batch_size

    def __call__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = next(self.batches)
        return images.to(self.device), labels.to(self.device)


def make_usual(module: ModuleType, folder: Path) -> None:
    """Replace, in this process, what a script does otherwise than most public code."""
    resize, to, log = datasets.resize, nn.Module.to, Run.log
    digits = []  # training and test images before load_digits resizes them

    def keep_and_resize(images: torch.Tensor, size: list[int]) -> torch.Tensor:
        digits.append(images[:, 0])
        return resize(images, size)

    def batches(data: datasets.Data, batch_size: int, seed: int, device: torch.device, *_) -> LoaderBatches:
        pictures = Pictures(data, digits[0] if digits else None, folder)
        return LoaderBatches(pictures, batch_size, seed, device)

    def log_and_read(run: Run, **values: torch.Tensor) -> None:
        log(run, **values)
        for value in values.values():
            value.item()

    datasets.resize, module.Batches, Run.log = keep_and_resize, batches, log_and_read
    nn.Module.to = lambda net, *args, memory_format=None, **options: to(net, *args, **options)
    module.Adam = lambda *args, fused=None, **options: torch.optim.Adam(*args, **options)
    blocks.cached_spectral_norm = module.cached_spectral_norm = contextlib.nullcontext


def config(name: str, args: argparse.Namespace) -> Settings:
    """The script's settings; raises UserError for those of --set that it does not take."""
    module, flags = importlib.import_module(name), []
    fields = module.Config.__dataclass_fields__
    fixed = FIXED | dict(iters=WARM_UP + args.iters, device=args.device, precision="auto", out="")
    for item in args.set:
        field, _, value = item.partition("=")
        if field not in fields or field in fixed:
            raise UserError(f"--set {item}: give a field of {name}.py's Config as FIELD=VALUE, but none of "
                            + ", ".join(fixed))
        switch = {"true": flag(field), "false": f"--no-{flag(field)[2:]}"}
        flags.append(switch.get(value, f"{flag(field)}={value}"))
    small = {field: value for field, value in SMALL.items() if field in fields}
    return parse(module.Config, module.RECIPES, module.QUICK | small | fixed, "", ["--quick", *flags])[1]


def child(name: str, way: str, folder: Path, args: argparse.Namespace) -> float:
    """Seconds per iteration of a run in this process."""
    module, cfg, clock = importlib.import_module(name), config(name, args), []
    torch.set_num_threads(args.threads)
    cfg.out, cfg.precision = str(folder / way), "auto" if way == "script" else "fp32"
    if way == "usual":
        make_usual(module, folder / "png")

    def timed(steps):
        for step in steps:
            yield step  # on return, the iteration is over
            if step in (WARM_UP, cfg.iters):
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                clock.append(time.perf_counter())

    without_pictures = mock.patch.object(module.evaluator, "finish", return_value={})
    with contextlib.redirect_stdout(io.StringIO()), without_pictures:
        run = Run(cfg, Path(module.__file__), recipes=module.RECIPES)
        run.steps = partial(timed, run.steps())
        module.main(run)
    return (clock[1] - clock[0]) / args.iters


def measure(name: str, way: str, folder: Path, argv: list[str]) -> float:
    """Seconds per iteration, by a process of its own."""
    command = [sys.executable, __file__, *argv, "--child", name, way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        sys.exit(done.returncode)
    return float(done.stdout.splitlines()[-1])


def compare(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Medians over the rounds of one script."""
    rounds = []
    for i in range(args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            row = {way: measure(name, way, Path(folder), sys.argv[1:]) for way in WAYS}
        row |= {f"{way} ÷ script": row[way] / row["script"] for way in WAYS[1:]}
        took = ", ".join(f"{column} {value:.4g}" for column, value in row.items())
        print(f"{name}, {f'round {i}' if i else 'warm-up'}: {took}", flush=True)
        rounds.append(row)
    return {column: float(f"{median(row[column] for row in rounds[1:]):.4g}") for column in row}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("scripts", nargs="*", help="dcgan_mnist, … (default: all six)")
    for name, value in (("rounds", 5), ("iters", 12), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: auto)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="settings of the scripts")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [Path(script).stem for script in args.scripts] or NAMES
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"{unknown[0]} is not a script of this collection: name {', '.join(NAMES)}")
    if min(args.rounds, args.iters, args.threads) < 1:
        raise UserError("--rounds, --iters and --threads must be at least 1")
    if args.child:
        name, way, folder = args.child
        print(child(name, way, Path(folder), args))
        return

    device = pick_device(args.device)  # an error now, not after other scripts' rounds
    for name in names:
        config(name, args)  # likewise
    results = {name: compare(name, args) for name in names}
    print(f"{'seconds per iteration':<22}" + "".join(f"{column:>16}" for column in results[names[0]]))
    for name, row in results.items():
        print(f"{name:<22}" + "".join(f"{value:16.4g}" for value in row.values()))
    if args.json:
        torch.set_num_threads(args.threads)  # provenance reads it
        command = " ".join(["tools/throughput.py", *sys.argv[1:]])
        write_json(args.json, {"scripts": results, "command": command, **provenance(device)})


if __name__ == "__main__":
    sys.exit(exit_status(main))
