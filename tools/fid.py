"""FID, KID, precision and recall between folders of images.

    python tools/fid.py generated/ real/               # FID between two folders of images
    python tools/fid.py generated/ real.npz            # statistics saved before, also by pytorch-fid
    python tools/fid.py --save-stats real/ real.npz
    python tools/fid.py --kid --pr generated/ real/

FID is that of common/fid.py, with the Inception weights of 2015-12-05 and pytorch-fid's pipeline.
"""
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.datasets import FORMATS  # noqa: E402
from common.fid import feature_stats, features, frechet_distance, load_inception  # noqa: E402
from common.files import UserError, atomic_write, reading  # noqa: E402
from harness.cli import Parser, exit_status  # noqa: E402
from harness.device import pick_device  # noqa: E402

SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # as pytorch-fid


@dataclass
class Statistics:
    """Mean [D] and covariance [D, D] of features, in float64, and the number of images (None: unknown)."""
    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    def save(self, path: Path) -> None:
        """Write mu, sigma (what pytorch-fid reads and writes) and the count n to an .npz."""
        try:
            atomic_write(path, lambda p: np.savez(p, mu=self.mean, sigma=self.covariance, n=self.count))
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}): name another file") from None

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what save() or pytorch-fid wrote; raises UserError for anything else."""
        with reading(path, ".npz statistics as --save-stats writes them: mu [D], sigma [D, D] and perhaps n"):
            with np.load(path) as f:
                mu, sigma = (np.asarray(f[key], np.float64) for key in ("mu", "sigma"))
                count = int(f["n"]) if "n" in f else None
            if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
                raise ValueError(f"the shapes are {mu.shape} and {sigma.shape}")
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise ValueError("NaN or infinite values: write it again from images that have none")
            if count is not None and count < 2:
                raise ValueError(f"of {count} images, at least 2 are needed")
        return cls(mu, sigma, count)


def kid(
    x: torch.Tensor, y: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance of features [N, D] and [M, D]: mean and standard deviation over subsets.

    Unbiased squared MMD with the kernel (xᵀy / D + 1)³ (Bińkowski et al. 2018, eq. 4 and section 4). Subsets
    are sampled without replacement and are at most as large as the smaller set.
    """
    m = min(subset_size, len(x), len(y))
    if m < 2:
        raise UserError(f"KID needs at least 2 images on each side, there are {len(x)} and {len(y)}")
    g = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        a, b = (s[torch.randperm(len(s), generator=g)[:m].to(s.device)].double() for s in (x, y))
        xx, yy, xy = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
        estimates.append((within - 2 * xy.mean()).item())
    return float(np.mean(estimates)), float(np.std(estimates))


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2) of features [N, D] and [M, D].

    Precision is the share of fakes that lie nearer to some real image than its k-th nearest real neighbour;
    recall is the same with the roles swapped. Raises UserError for k or fewer images.
    """
    real, fake = real.double(), fake.double()
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need more than k = {k} images on each side, there are "
                        f"{len(real)} and {len(fake)}")

    def radii(x):  # a point is its own nearest, hence k + 1
        return torch.cat([_squared_distances(rows, x).kthvalue(k + 1).values for rows in x.split(256)])

    def covered(x, by):
        r = radii(by)
        return torch.cat([(_squared_distances(rows, by) <= r).any(1) for rows in x.split(256)])

    return covered(fake, real).double().mean().item(), covered(real, fake).double().mean().item()


def _squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N, M]; rounding noise is set to exactly zero, so that equal points stay equal."""
    norms = (x * x).sum(1)[:, None] + (y * y).sum(1)
    squares = norms - 2 * x @ y.T
    return squares.masked_fill(squares < 1e-12 * norms, 0.0)


# ---------------------------------------------------------------------- folders of images

def list_images(folder: str | Path) -> list[Path]:
    """The images directly in a folder, sorted, by the suffixes that pytorch-fid knows, in any case.

    Files that macOS adds (._NAME) are ignored. Raises UserError for a missing folder, fewer than two images,
    an unreadable image, or images of several sizes.
    """
    with reading(folder, "a folder of images (statistics end in .npz)"):
        files = sorted(p for p in Path(folder).iterdir()
                       if p.suffix.lower() in SUFFIXES and not p.name.startswith("._"))
    if len(files) < 2:
        raise UserError(f"{folder} has {len(files) or 'no'} image{'s'[len(files):]}, at least 2 are needed, "
                        f"directly in it, ending in {' '.join(sorted(SUFFIXES))}")
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda file: _look(file, lambda image: image.size), files))
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(f"{folder} has images of several sizes: {files[0].name} has {sizes[0]} pixels, "
                            f"{file.name} {size}. Resize them to one")
    return files


def read_images(
    files: list[Path], batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Batches uint8 [N, 3, H, W] of the files in order, decoded by threads up to two batches ahead."""
    with ThreadPoolExecutor(4) as pool:
        ahead = deque()
        for i in range(0, len(files), batch_size):
            ahead.append([pool.submit(_look, file, lambda image: np.array(image.convert("RGB")))
                          for file in files[i:i + batch_size]])
            if len(ahead) > 2:
                yield _stack(ahead.popleft(), device)
        while ahead:
            yield _stack(ahead.popleft(), device)


def _stack(pending: list, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.stack([p.result() for p in pending])).to(device).permute(0, 3, 1, 2)


def _look(file: Path, at: Callable):
    """at(image) of the open image; raises UserError for a damaged file."""
    with reading(file, "an image: replace or remove it"), Image.open(file, formats=FORMATS) as image:
        return at(image)


# ---------------------------------------------------------------------- command line

def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("a", metavar="A", help="a folder of images, or an .npz of statistics")
    parser.add_argument("b", metavar="B", help="the same, or the .npz to write with --save-stats")
    parser.add_argument("--fid-weights", default="auto", metavar="PATH|auto",
                        help="file of the Inception weights; auto (default): cached, or downloaded")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--batch-size", type=int, default=50, help="images per batch (default: 50)")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of folder A to B")
    parser.add_argument("--kid", action="store_true", help="also measure KID")
    parser.add_argument("--pr", action="store_true", help="also measure precision and recall (B is real)")
    args = parser.parse_args(argv)

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    target = Path(args.b)
    paths = [Path(args.a)] if args.save_stats else [Path(args.a), target]
    if (args.kid or args.pr) and (args.save_stats or any(p.suffix == ".npz" for p in paths)):
        raise UserError("--kid and --pr need two folders of images: statistics don't hold the features")
    if args.save_stats and (paths[0].suffix == ".npz" or target.suffix != ".npz"):
        raise UserError("--save-stats takes a folder of images and the .npz to write, in this order")
    if args.save_stats and (target.exists() or not target.parent.is_dir()):
        why = "exists and is not overwritten" if target.exists() else "is not in an existing folder"
        raise UserError(f"--save-stats {target} {why}: choose another name")
    sides = [Statistics.load(p) if p.suffix == ".npz" else list_images(p) for p in paths]
    dims = [len(side.mean) if isinstance(side, Statistics) else 2048 for side in sides]
    if dims[0] != dims[-1]:
        raise UserError(f"statistics of {dims[0]} and {dims[1]} dimensions can't be compared: make both with "
                        "the same network (FID's has 2048)")

    device, vectors = pick_device(args.device), {}
    ready = all(isinstance(side, Statistics) for side in sides)
    net = None if ready else load_inception(args.fid_weights, device)
    for i, side in enumerate(sides):
        if not isinstance(side, Statistics):
            vectors[i] = torch.cat(list(features(net, read_images(side, args.batch_size, device))))
            sides[i] = Statistics(*(x.numpy() for x in feature_stats([vectors[i]])), len(vectors[i]))
    if args.save_stats:
        sides[0].save(target)
        print(f"wrote {target} (N = {sides[0].count})")
        return
    distance = frechet_distance(*(part for side in sides for part in (side.mean, side.covariance)))
    n, m = ("unknown" if side.count is None else side.count for side in sides)
    print(f"FID: {distance:.6f} (N = {n} and {m})")
    if args.kid:
        mean, std = kid(vectors[0], vectors[1])
        print(f"KID: {mean:.6f} ± {std:.6f} (100 subsets of {min(1000, n, m)})")
    if args.pr:
        precision, recall = precision_recall(vectors[1], vectors[0])
        print(f"precision: {precision:.4f}, recall: {recall:.4f} (k = 3, B is real)")


if __name__ == "__main__":
    sys.exit(exit_status(main))
