"""Time and memory of one iteration of sngan_iclevr.py, beside the same networks in the usual loop.

    python benchmarks/step_time.py        # --ch 16 --batch-size 32, 64×64, 4 D steps, 2 threads

"script" runs sngan_iclevr.main itself. "plain" is the common way to write it: a DataLoader of two workers
that decodes PNGs, D called once for real and once for fake images, spectral norm in every forward pass, Adam
with its defaults, losses read back each step. Both train on the same synthetic images. Each round runs both,
each in a process of its own; the medians over the rounds, and of the rounds' ratios, are printed and, with
--json FILE, written.
"""
import argparse
import contextlib
import csv
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def script(args: argparse.Namespace) -> list[float]:
    """Seconds of each iteration of the script, the first two left out."""
    import sngan_iclevr
    from common.run import Run
    cfg = sngan_iclevr.Config(iters=args.iters + 2, batch_size=args.batch_size, ch=args.ch,
                              image_size=args.image_size, data="synthetic", n_scenes=args.scenes,
                              judge="none", device="cpu", log_every=1, sample_every=0, save_every=0,
                              out=str(Path(args.folder) / f"run-{os.getpid()}"))
    with Run(cfg, Path(sngan_iclevr.__file__)) as run, contextlib.redirect_stdout(sys.stderr):
        sngan_iclevr.main(run)
    with open(Path(cfg.out) / "metrics.csv", newline="") as f:
        seconds = [float(row["seconds"]) for row in csv.DictReader(f)]
    return [b - a for a, b in itertools.pairwise(seconds[1:])]


def plain(args: argparse.Namespace) -> list[float]:
    """The same networks and losses in a common training loop."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms.functional import pil_to_tensor

    import sngan_iclevr
    from common import losses
    from common.datasets import load_iclevr

    data = load_iclevr(SimpleNamespace(data="synthetic", image_size=args.image_size, n_scenes=args.scenes))
    folder = Path(args.folder) / "png"
    if not folder.exists():
        folder.mkdir()
        for i, image in enumerate(data.images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")

    class Pictures(Dataset):
        def __len__(self):
            return len(data.images)

        def __getitem__(self, i):
            image = Image.open(folder / f"{i}.png").convert("RGB")
            return pil_to_tensor(image).float() / 127.5 - 1, data.labels[i]

    loader = DataLoader(Pictures(), args.batch_size, shuffle=True, drop_last=True, num_workers=2)
    cfg = sngan_iclevr.Config(ch=args.ch, image_size=args.image_size)
    torch.manual_seed(0)
    G = sngan_iclevr.Generator(24, cfg.z_dim, cfg.ch, cfg.image_size)
    D = sngan_iclevr.Discriminator(24, cfg.ch, cfg.image_size, cfg.label_embed)
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr_g, (0.5, 0.999))
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr_d, (0.5, 0.999))
    seconds, batches = [], iter(loader)
    for _ in range(args.iters + 2):
        start = time.perf_counter()
        for _ in range(cfg.n_dis):
            try:
                real, y = next(batches)
            except StopIteration:
                batches = iter(loader)
                real, y = next(batches)
            fake = G(torch.randn(len(real), cfg.z_dim), y).detach()
            real, fake = real + torch.rand_like(real) / 128, fake + torch.rand_like(fake) / 128
            d_loss = losses.hinge_d(D(real, y), D(fake, y))
            opt_d.zero_grad()
            d_loss.backward()
            opt_d.step()
            d_loss.item()
        fake = G(torch.randn(len(real), cfg.z_dim), y)
        g_loss = losses.hinge_g(D(fake + torch.rand_like(fake) / 128, y))
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()
        g_loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    for name, value in (("ch", 16), ("batch-size", 32), ("image-size", 64), ("scenes", 400), ("iters", 8),
                        ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--only", choices=("script", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:  # the child of a round
        import torch
        torch.set_num_threads(args.threads)
        times = {"script": script, "plain": plain}[args.only](args)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        figures = {"seconds": median(times), "mib": memory}
        print(json.dumps(figures | ({"worker_mib": workers} if args.only == "plain" else {})))
        return

    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds + 1):  # the first warms the caches and is not counted
            row = {}
            for which in ("script", "plain"):
                command = [sys.executable, __file__, *sys.argv[1:], "--only", which, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
                row[which] = json.loads(done.stdout.splitlines()[-1])
            if i:
                rounds.append(row)
                took = ", ".join(f"{which} {r['seconds']:.3f} s" for which, r in row.items())
                print(f"round {i}: {took}", flush=True)
    result = {which: {k: round(median(r[which][k] for r in rounds), 3) for k in rounds[0][which]}
              for which in ("script", "plain")}
    result["plain ÷ script, median of rounds"] = round(
        median(r["plain"]["seconds"] / r["script"]["seconds"] for r in rounds), 3)
    for which in ("script", "plain"):
        r = result[which]
        print(f"{which:<7} {r['seconds']:.3f} s an iteration, peak memory {r['mib']:.0f} MiB"
              + (f" and {r['worker_mib']:.0f} MiB in a worker" if which == "plain" else ""))
    print(f"plain ÷ script: {result['plain ÷ script, median of rounds']}")
    if args.json:
        import torch

        from common.system import circumstances
        result["command"] = " ".join(["benchmarks/step_time.py", *sys.argv[1:]])
        result |= circumstances(torch.device("cpu"))
        Path(args.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
