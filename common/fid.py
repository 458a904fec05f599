"""Fréchet inception distance (FID), KID, precision and recall, by pytorch-fid's pipeline and weights.

    python -m common.fid generated/ real/                        # FID between two folders of images
    python -m common.fid generated/ real.npz                     # statistics saved before, pytorch-fid's too
    python -m common.fid --save-stats real/ real.npz
    python -m common.fid --kid --pr generated/ real/

FID is the name of one figure only: Inception weights of 2015-12-05, images of 8 bits, all of them counted
(Heusel et al. 2017, "GANs trained by a two time-scale update rule"). load_inception() refuses other weights.
benchmarks/fid.py holds time, memory and results against pytorch-fid's.
"""
import argparse
import hashlib
import io
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dpstrf
from torchvision.models import inception as tv

from common.run import Parser, UserError, entry, pick_device, write_whole

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d"  # how the hash of that file begins
SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # as pytorch-fid


# ---------------------------------------------------------------------- the network

def _average(x: torch.Tensor) -> torch.Tensor:
    """3×3 means that leave the padding out, as TensorFlow's do; torchvision's count it."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(tv.InceptionA):
    def forward(self, x):
        return torch.cat([self.branch1x1(x),
                          self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(_average(x))], 1)


class _C(tv.InceptionC):
    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x),
                          self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                          self.branch_pool(_average(x))], 1)


class _E(tv.InceptionE):
    pool = staticmethod(_average)

    def forward(self, x):
        one, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x),
                          self.branch3x3_2a(one), self.branch3x3_2b(one),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], 1)


class Inception(tv.Inception3):
    """The Inception network of 2015-12-05 (Szegedy et al. 2015) as FID uses it.

    Its state-dict keys are those of pytorch-fid's weight file, fc included (which FID does not use). Until
    load_state_dict() its weights are NaN. Always in eval mode, without gradients.
    """

    def __init__(self):
        blocks = [tv.BasicConv2d, _A, tv.InceptionB, _C, tv.InceptionD, _E, tv.InceptionAux]
        with torch.device("meta"):  # draws no weights: fast, and leaves the global random state alone
            super().__init__(1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.to_empty(device="cpu").requires_grad_(False).eval()
        for weight in self.parameters():
            weight.fill_(float("nan"))
        # The 2015 graph has a maximum here, where it was probably meant to have a mean; FID keeps it.
        self.Mixed_7c.pool = lambda x: F.max_pool2d(x, 3, stride=1, padding=1)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 1 or 3, H, W] in [0, 1] → features [N, 2048]; fp32 even under autocast.

        On CUDA, cuDNN may round factors to TF32 (torch's default), as it does for pytorch-fid.
        """
        with torch.autocast(images.device.type, enabled=False):
            x = images.float()
            if x.shape[-2:] != (299, 299):
                x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)  # no antialiasing
            x = (2 * x - 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            for name, layer in self.named_children():
                if name == "dropout":  # behind it is only the classifier
                    break
                x = layer(x)
            return x.flatten(1)


def load_inception(weights: str = "auto", device: torch.device | str = "cpu") -> Inception:
    """The FID network on `device`, from the weight file named; for "auto" from torch's hub cache.

    Downloads it there where it is missing. Raises UserError where it can't be had, or is another file:
    figures from other weights are not FID.
    """
    path = Path(weights)
    if weights == "auto":
        path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
        if not path.exists():
            print(f"fetching the FID weights to {path} …", flush=True)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL, str(path), SHA256, progress=False)
            except (OSError, RuntimeError) as error:  # no network, no space; another hash
                raise UserError(f"the FID weights could not be fetched ({error}): get {URL} by other means "
                                "and name the file with --fid-weights") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--fid-weights {path} can't be read ({error.strerror}): get {URL}") from None
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(SHA256):
        raise UserError(f"{path} is not the FID Inception network, or is cut off: its SHA-256 is "
                        f"{digest[:8]}…, not {SHA256}…. Delete it and get {URL} again")
    net = Inception()
    net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return net.to(device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------- features and their moments

def features(net: Callable, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """net(images in [0, 1]) for each batch [N, 1 or 3, H, W]: uint8, or floats in [-1, 1].

    Floats are rounded to 8 bits first, as they would be by writing them to files: FID is a figure of files.
    """
    for images in batches:
        if images.dtype != torch.uint8:
            images = ((images.float() + 1) * 127.5).round().clamp(0, 255)  # stays float: NaN is not lost
        yield net(images.float() / 255)


class Moments:
    """Count, mean [D] and covariance [D, D] of a stream of features, in float64, with none of them kept.

    Each batch is merged as in Chan, Golub and LeVeque (1983), eq. 2.1: nothing large is ever subtracted, so
    large means cost no digits.
    """

    def __init__(self):
        self.count = 0  # None where it is not known: in statistics written by pytorch-fid
        self._mean = self._scatter = self._covariance = None

    def update(self, x: torch.Tensor) -> None:
        """Add features [N, D]. Raises UserError where they are not finite."""
        x = x.detach().double()
        if not x.isfinite().all():
            raise UserError(f"NaN or infinite features after {self.count} good images: has the generator "
                            "diverged, or were no weights loaded?")
        if self._mean is None:
            self._mean, self._scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        total = self.count + len(x)
        delta = x.mean(0) - self._mean
        x = x - x.mean(0)
        self._scatter.addmm_(x.T, x).addr_(delta, delta, alpha=self.count * len(x) / total)
        self._mean += delta * len(x) / total
        self.count = total

    @property
    def mean(self) -> torch.Tensor:
        """[D], float64, on the CPU."""
        return self._mean.cpu()

    @property
    def covariance(self) -> torch.Tensor:
        """[D, D], unbiased (N - 1), float64, on the CPU. Raises UserError for fewer than two samples."""
        if self._covariance is not None:
            return self._covariance
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, there are {self.count}: give more")
        return (self._scatter / (self.count - 1)).cpu()

    def save(self, path: str | Path) -> None:
        """Write mu, sigma (what pytorch-fid reads and writes) and the count n to an .npz."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        arrays |= {"n": self.count} if self.count is not None else {}
        try:
            write_whole(Path(path), lambda p: np.savez(p, **arrays))
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}): name a file elsewhere") from None

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """What save() or pytorch-fid wrote, to be read, not updated. Raises UserError where it is neither."""
        try:
            with np.load(path) as f:
                mu, sigma = (np.asarray(f[key], np.float64) for key in ("mu", "sigma"))
                count = int(f["n"]) if "n" in f else None
        except KeyError:
            raise UserError(f"{path} has no arrays mu and sigma: write it by --save-stats") from None
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            reason = str(error).split("\n")[0][:100]
            raise UserError(f"{path} can't be read as .npz statistics ({reason}): write it again") from None
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise UserError(f"{path} should hold mu [D] and sigma [D, D], has {mu.shape} and {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{path} has NaN or infinite values: write it again from images that have none")
        moments = cls()
        moments.count, moments._mean, moments._covariance = count, *map(torch.from_numpy, (mu, sigma))
        return moments


# ---------------------------------------------------------------------- distances

def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), of tensors or arrays [D] and [D, D] (Heusel et al. 2017, eq. 6).

    In float64, exact to rounding for covariances of less than full rank too. Raises UserError where shapes
    differ, values are not finite or a matrix is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a.detach().cpu() if torch.is_tensor(a) else a, np.float64)
                                for a in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        raise UserError(f"statistics of {mu1.size} and {mu2.size} dimensions can't be compared: make both "
                        "with the same network")
    if not all(np.isfinite(a).all() for a in (mu1, mu2, sigma1, sigma2)):
        raise UserError("statistics with NaN or infinite values have no distance: look at their images")
    # With Σ₁ = AAᵀ and Σ₂ = BBᵀ, Σ₁Σ₂ has the eigenvalues of the symmetric (AᵀB)ᵀ(AᵀB), beside zeros.
    product = _root(sigma1).T @ _root(sigma2)
    gram = product @ product.T if len(product) < product.shape[1] else product.T @ product
    # Small eigenvalues are kept, since thousands of them add up; only what rounding made negative is zero.
    cross = np.sqrt(eigvalsh(gram).clip(min=0)).sum() if gram.size else 0.0
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return max(float(distance), 0.0)


def _root(sigma: np.ndarray) -> np.ndarray:
    """A [D, rank] with AAᵀ = sigma: Cholesky's method with pivots ends where only rounding noise is left."""
    lower, pivots, rank, _ = dpstrf(sigma, lower=1)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(lower)[:, :rank]
    trace, skew = np.trace(sigma), np.abs(sigma.sum(0) - sigma.sum(1)).max()
    if skew > 1e-6 * trace or abs((root ** 2).sum() - trace) > 1e-3 * trace:
        raise UserError("a matrix that is not symmetric, or has negative eigenvalues, is no covariance: "
                        "make the statistics again")
    return root


def kid(
    x: torch.Tensor, y: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance of features [N, D] and [M, D]: mean and standard deviation over subsets.

    Unbiased squared MMD with the kernel (xᵀy / D + 1)³ (Bińkowski et al. 2018, eq. 4 and section 4), drawn
    without replacement; subsets are as large as the smaller set where that is less than subset_size.
    """
    m = min(subset_size, len(x), len(y))
    if m < 2:
        raise UserError(f"KID needs at least 2 images on each side, there are {len(x)} and {len(y)}")
    g = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        a, b = (s[torch.randperm(len(s), generator=g)[:m].to(s.device)].double() for s in (x, y))
        xx, yy, xy = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))  # no image with itself
        estimates.append((within - 2 * xy.mean()).item())
    return float(np.mean(estimates)), float(np.std(estimates))


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2) of features [N, D] and [M, D].

    Precision is the share of fakes within the distance of some real image to its k-th nearest real one;
    recall the share of real ones so covered by fakes. Raises UserError for k or fewer images.
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
    """[N, M]; what is rounding noise beside the norms is exactly zero, so that equal points stay equal."""
    norms = (x * x).sum(1)[:, None] + (y * y).sum(1)
    squares = norms - 2 * x @ y.T
    return squares.masked_fill(squares < 1e-12 * norms, 0.0)


# ---------------------------------------------------------------------- folders of images

def list_images(folder: str | Path) -> list[Path]:
    """The images directly in a folder, sorted, by the suffixes that pytorch-fid knows.

    Raises UserError where there is no such folder, or in it fewer than two images, or one that can't be read,
    or several sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of images (statistics end in .npz)")
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(files) < 2:
        raise UserError(f"{folder} has {len(files) or 'no'} image{'s'[len(files):]}, at least 2 are needed, "
                        f"directly in it, ending in {' '.join(sorted(SUFFIXES))}")
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda file: _look(file, lambda image: image.size), files))
    for file, size in zip(files, sizes):
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
    try:
        with Image.open(file) as image:
            return at(image)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{file} can't be read as an image ({error}): replace it or take it away") from None


# ---------------------------------------------------------------------- command line

def main(argv: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m common.fid", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("a", metavar="A", help="a folder of images, or an .npz of statistics")
    parser.add_argument("b", metavar="B", help="the same, or the .npz to write with --save-stats")
    parser.add_argument("--fid-weights", default="auto", metavar="PATH|auto",
                        help="the Inception weights; auto: from torch's hub cache, fetched there at first")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--batch-size", type=int, default=50, help="images at a time (default: 50)")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of folder A to B")
    parser.add_argument("--kid", action="store_true", help="KID too (keeps the features in memory)")
    parser.add_argument("--pr", action="store_true", help="precision and recall too: A generated, B real")
    args = parser.parse_args(argv)

    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    keep, target = args.kid or args.pr, Path(args.b)
    paths = [Path(args.a)] if args.save_stats else [Path(args.a), target]
    if keep and (args.save_stats or any(p.suffix == ".npz" for p in paths)):
        raise UserError("--kid and --pr need two folders of images: statistics don't hold the features")
    if args.save_stats and (paths[0].suffix == ".npz" or target.suffix != ".npz"):
        raise UserError("--save-stats takes a folder of images and the .npz to write, in this order")
    if args.save_stats and (target.exists() or not target.parent.is_dir()):
        why = "exists already and is not written over" if target.exists() else "is in no folder that exists"
        raise UserError(f"--save-stats {target} {why}: choose another name")
    sides = [Moments.load(p) if p.suffix == ".npz" else list_images(p) for p in paths]
    dims = [len(side.mean) for side in sides if isinstance(side, Moments)]
    if len(dims) == 1 and dims != [2048]:
        raise UserError(f"{dims[0]} dimensions of statistics can't be compared with the 2048 of images")

    device, kept = pick_device(args.device), [[], []]
    net = load_inception(args.fid_weights, device) if len(dims) < len(sides) else None
    for i, side in enumerate(sides):
        if not isinstance(side, Moments):
            sides[i] = Moments()
            for batch in features(net, read_images(side, args.batch_size, device)):
                sides[i].update(batch)
                kept[i] += [batch] if keep else []
    if args.save_stats:
        sides[0].save(target)
        print(f"wrote {target} (N = {sides[0].count})")
        return
    distance = frechet_distance(*(part for side in sides for part in (side.mean, side.covariance)))
    n, m = ("unknown" if side.count is None else side.count for side in sides)
    print(f"FID: {distance:.6f} (N = {n} and {m})")
    if args.kid:
        mean, std = kid(torch.cat(kept[0]), torch.cat(kept[1]))
        print(f"KID: {mean:.6f} ± {std:.6f} (100 subsets of {min(1000, n, m)})")
    if args.pr:
        precision, recall = precision_recall(torch.cat(kept[1]), torch.cat(kept[0]))
        print(f"precision: {precision:.4f}, recall: {recall:.4f} (k = 3, B taken as real)")


if __name__ == "__main__":
    entry(main)
