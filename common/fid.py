"""Fréchet inception distance (FID) by pytorch-fid's pipeline and weights (Heusel et al. 2017).

FID is the name of one figure only: Inception weights of 2015-12-05, images of 8 bits, all of them counted.
tools/fid.py compares folders of images.
"""
import hashlib
import io
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import ldl, svdvals
from torchvision.models import inception as tv

from common.files import UserError, reading

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d"  # how the hash of that file begins


class Inception(tv.Inception3):
    """The Inception network of 2015-12-05 (Szegedy et al. 2015) as FID uses it.

    Its state-dict keys are those of pytorch-fid's weight file, fc included (which FID does not use). Until
    load_state_dict() its weights are NaN. It is in eval mode, without gradients.
    """

    def __init__(self):
        with torch.device("meta"):  # samples no weights: fast, and leaves the global random state alone
            super().__init__(1008, aux_logits=False, init_weights=False)
        self.to_empty(device="cpu").requires_grad_(False).eval()
        for weight in self.parameters():
            weight.fill_(float("nan"))
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(_without_padding)
        # The 2015 graph has a maximum in its last block, probably meant as a mean; FID keeps it.
        last, inputs = self.Mixed_7c, []
        last.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
        last.branch_pool.register_forward_pre_hook(
            lambda *_: F.max_pool2d(inputs.pop(), 3, stride=1, padding=1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 1 or 3, H, W] in [0, 1] → features [N, 2048], in fp32 (on CUDA, TF32: as pytorch-fid's)."""
        with torch.autocast(images.device.type, enabled=False):
            x = F.interpolate(images.float(), (299, 299), mode="bilinear")  # without antialiasing
            x = (2 * x - 1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            for layer in list(self.children())[:-2]:  # without dropout and classifier
                x = layer(x)
            return x.flatten(1)


def _without_padding(_, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """3×3 means that count the padding, as torchvision's, → means that leave it out, as TensorFlow's."""
    x, = inputs
    return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)


def load_inception(weights: str = "auto", device: torch.device | str = "cpu") -> Inception:
    """The FID network on `device` from a weight file; "auto": from torch's hub cache, downloaded if missing.

    Raises UserError if it is not available, or is another file: figures from other weights are not FID.
    """
    auto = weights == "auto"
    path = Path(torch.hub.get_dir(), "checkpoints", URL.rsplit("/", 1)[1]) if auto else Path(weights)
    with reading(path, f"the FID Inception network. Get it from {URL} and name the file with --fid-weights"):
        if auto and not path.exists():
            print(f"fetching the FID weights to {path} …", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(60)  # seconds; torch.hub has none
            torch.hub.download_url_to_file(URL, str(path), SHA256, progress=False)
        content = path.read_bytes()
        if not (digest := hashlib.sha256(content).hexdigest()).startswith(SHA256):
            raise ValueError(f"its SHA-256 is {digest[:8]}…, not {SHA256}…")
        net = Inception()
        net.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return net.to(device, memory_format=torch.channels_last)


def features(net: Callable, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """net(images in [0, 1]) for each batch [N, 1 or 3, H, W]: uint8, or floats in [-1, 1].

    Floats are rounded to 8 bits first, as they would be by writing them to files: FID is a figure of files.
    """
    for images in batches:
        if images.dtype != torch.uint8:
            images = ((images.float() + 1) * 127.5).round().clamp(0, 255)  # stays float: NaN is not lost
        yield net(images.float() / 255)


def feature_stats(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and unbiased covariance [D, D], in float64 on the CPU, of batches of features [n, D].

    Raises UserError if there are fewer than two, or if one is not finite.
    """
    x = torch.cat([part.detach().cpu() for part in batches]).double()
    if len(x) < 2:
        raise UserError(f"a covariance needs at least 2 images, there are {len(x)}: give more")
    if not x.isfinite().all():
        raise UserError("NaN or infinite features: has the generator diverged, or were no weights loaded?")
    return x.mean(0), torch.cov(x.T).view(x.shape[1], -1)  # of one feature, too


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), of tensors or arrays [D] and [D, D] (Heusel et al. 2017, eq. 6).

    In float64, exact to rounding below full rank too. Raises UserError if a matrix is not a covariance.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).double().cpu().numpy() for a in (mu1, sigma1, mu2, sigma2))
    # With Σ₁ = AAᵀ and Σ₂ = BBᵀ, the square roots of Σ₁Σ₂'s eigenvalues are AᵀB's singular values.
    cross = svdvals(psd_root(sigma1).T @ psd_root(sigma2)).sum()
    return max(float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * cross), 0.0)


def psd_root(sigma: np.ndarray) -> np.ndarray:
    """A [D, D] with AAᵀ = sigma, of any rank. Raises UserError if there is none."""
    lower, diagonal, _ = ldl(sigma)
    root = lower * np.sqrt(np.diag(diagonal).clip(min=0))
    if np.abs(root @ root.T - sigma).max() > 1e-6 * np.trace(sigma):
        raise UserError("not a covariance: not symmetric, or with negative eigenvalues. Make it again")
    return root
