"""common/fid.py beside pytorch-fid: the distance alone, features of a folder of PNGs, and memory.

    pip install pytorch-fid
    python benchmarks/fid_speed.py        # about ten minutes on two CPU cores

distance: of two full covariances at 2048 dimensions. features: from a folder of PNGs to mean and covariance,
both networks with the same random weights (so no download; the values mean nothing, but must be the same).
Rounds alternate; medians over the rounds, and of the rounds' ratios, are printed and, with --json FILE,
written. memory: the peak of a process, by the number of images: of Moments alone, and of the whole pipeline.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fid import list_images, read_images  # noqa: E402
from common import fid  # noqa: E402


def random_weights() -> dict[str, torch.Tensor]:
    """In the layout of the weight file, such that features neither vanish nor explode."""
    g, state = torch.Generator().manual_seed(0), fid.Inception().state_dict()
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=g)
        if value.ndim > 1:
            state[key] = noise * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = 1 + 0.3 * noise.clamp(-2, 2)
        else:
            state[key] = 0.3 * noise if value.is_floating_point() else torch.zeros_like(value)
    return state


def pictures(folder: Path, n: int, size: int, seed: int) -> Path:
    """n PNGs of smooth random colours."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        coarse = torch.rand(1, 3, 6, 6, generator=g) ** (1 + 0.2 * seed)
        smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
        Image.fromarray((smooth[0] * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:05}.png")
    return folder


def ours(net: fid.Inception, folder: Path, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    moments = fid.Moments(fid.features(net, read_images(list_images(folder), batch_size)))
    return moments.mean.numpy(), moments.covariance.numpy()


def timed(call) -> tuple:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def compare(name: str, mine, other, rounds: int) -> tuple[dict, tuple, tuple]:
    """Medians over alternating rounds, after one of each that warms up, and what both returned."""
    rows = []
    for i in range(rounds + 1):
        order = (mine, other) if i % 2 else (other, mine)
        results = {call: timed(call) for call in order}
        if i:
            rows.append((results[mine][1], results[other][1]))
            print(f"{name}, round {i}: {rows[-1][0]:.2f} s, pytorch-fid {rows[-1][1]:.2f} s", flush=True)
    ratio = median(b / a for a, b in rows)
    figures = {"seconds": median(a for a, _ in rows), "pytorch-fid, seconds": median(b for _, b in rows),
               "pytorch-fid ÷ ours, median of rounds": ratio}
    return {k: round(v, 3) for k, v in figures.items()}, results[mine][0], results[other][0]


def agreement(a: float, b: float) -> dict[str, float]:
    return {"ours": float(a), "pytorch-fid": float(b), "relative difference": abs(float(a / b) - 1)}


def only(args: argparse.Namespace) -> None:
    """What a child process does for the memory figures."""
    kind, n = args.only.split(":")
    if kind == "moments":
        moments, g = fid.Moments(), torch.Generator().manual_seed(0)
        for _ in range(int(n) // args.batch_size):
            moments.update(torch.rand(args.batch_size, 2048, generator=g))
        _ = moments.covariance
    else:
        net = fid.Inception()
        net.load_state_dict(random_weights())
        ours(net, Path(args.folder) / n, args.batch_size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def memory(args: argparse.Namespace) -> dict[str, int]:
    """Peaks of child processes. To be called first: a child's peak is never below what its parent holds."""
    peaks = {}
    with tempfile.TemporaryDirectory() as top:
        for n in args.pipeline:
            pictures(Path(top) / str(n), n, args.image_size, 0)
        for kind, numbers in (("moments", args.moments), ("pipeline", args.pipeline)):
            for n in numbers:
                command = [sys.executable, __file__, "--threads", str(args.threads), "--batch-size",
                           str(args.batch_size), "--folder", top, "--only", f"{kind}:{n}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peaks[f"{kind} of {n} images"] = int(done.stdout)
                print(f"peak memory, {kind} of {n} images: {int(done.stdout)} MiB", flush=True)
    return peaks


def main() -> int | None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    for name, value in (("images", 64), ("image-size", 64), ("batch-size", 50), ("rounds", 3),
                        ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--moments", type=int, nargs="+", default=[1000, 20_000, 100_000], metavar="N")
    parser.add_argument("--pipeline", type=int, nargs="+", default=[100, 300], metavar="N")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        only(args)
        return
    try:
        from pytorch_fid import fid_score, inception
    except ImportError:
        print("error: pytorch-fid is what this compares with: pip install pytorch-fid", file=sys.stderr)
        return 2
    fid_score.tqdm = lambda loader: loader
    # It calls sqrtm(…, disp=False) for a pair, which SciPy deprecates in 1.17 and removes in 1.18.
    sqrtm = fid_score.linalg.sqrtm
    fid_score.linalg.sqrtm = lambda a, disp=True: sqrtm(a) if disp else (sqrtm(a), None)
    result = {"peak MiB": memory(args)}

    rng = np.random.default_rng(0)
    axes = rng.normal(size=(2048, 2048)) / 2048 ** 0.5  # mixes them, so that covariances are full matrices
    samples = (rng.normal(size=(5000, 2048)) * rng.uniform(0.1, 1, 2048) @ axes for _ in range(2))
    stats = [part for x in samples for part in (x.mean(0), np.cov(x, rowvar=False))]
    row, a, b = compare("distance", lambda: fid.frechet_distance(*stats),
                        lambda: fid_score.calculate_frechet_distance(*stats), args.rounds)
    result["distance"] = row | agreement(a, b)

    with tempfile.TemporaryDirectory() as top:
        state = random_weights()
        net = fid.Inception()
        net.load_state_dict(state)
        net.to(memory_format=torch.channels_last)  # as load_inception does
        inception.load_state_dict_from_url = lambda *_, **__: state
        reference = inception.InceptionV3()
        folders = [pictures(Path(top) / name, args.images, args.image_size, i) for i, name in enumerate("ab")]

        def theirs(folder: Path):
            workers = min(len(os.sched_getaffinity(0)), 8)  # its command line's default
            return fid_score.compute_statistics_of_path(str(folder), reference, args.batch_size, 2048, "cpu",
                                                        workers)

        row, a, b = compare("features", lambda: ours(net, folders[0], args.batch_size),
                            lambda: theirs(folders[0]), args.rounds)
        row |= {f"{who}seconds an image": round(row[f"{who}seconds"] / args.images, 4)
                for who in ("", "pytorch-fid, ")}
        # Fewer features have full rank, as those of many images do: sqrtm of less is rough and slow.
        some = slice(None, None, -(-2048 * 4 // args.images))
        one, other = (distance(*(part for mu, sigma in both for part in (mu[some], sigma[some, some])))
                      for distance, both in (
                          (fid.frechet_distance, (a, ours(net, folders[1], args.batch_size))),
                          (fid_score.calculate_frechet_distance, (b, theirs(folders[1])))))
        row["features compared"] = len(a[0][some])
        result["features"] = row | agreement(one, other)

    for name, figures in result.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.6g}" for k, v in figures.items()))
    if args.json:
        from common.system import circumstances, write_json
        result["command"] = " ".join(["benchmarks/fid_speed.py", *sys.argv[1:]])
        result |= circumstances(torch.device("cpu"))
        write_json(Path(args.json), result)


if __name__ == "__main__":
    sys.exit(main())
