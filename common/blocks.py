"""Shared building blocks: cached spectral norm, DCGAN initialisation, falling rates, EMA, random shifts."""
import contextlib
import copy
import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import parametrize


def autocast(x: torch.Tensor, precision: str) -> torch.autocast:
    """Autocast to bf16 on the tensor's device when `precision` is "bf16"; a no-op otherwise."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def cached_spectral_norm(net: nn.Module):
    """Compute each spectral-normed weight of `net` once, in fp32, for all forward passes in this context.

    Otherwise every forward pass makes a power iteration of its own, and under autocast makes it in bf16.
    Enter it anew after each update of the weights, and outside of autocast.
    """
    with parametrize.cached():
        for module in net.modules():
            if parametrize.is_parametrized(module, "weight"):
                _ = module.weight  # fills the cache
        yield


@contextlib.contextmanager
def no_param_grads(*nets: nn.Module):
    """Record no gradients for the nets' own weights in this context: G's step does not need D's."""
    together = nn.ModuleList(nets).requires_grad_(False)
    try:
        yield
    finally:
        together.requires_grad_(True)


class EMA:
    """Exponential moving average of G's weights and batch-norm statistics, in eval mode; decay 0 copies G."""

    def __init__(self, G: nn.Module, decay: float):
        self.net, self.decay = copy.deepcopy(G).eval().requires_grad_(False), decay
        self.pairs = list(zip(self.net.state_dict().values(), G.state_dict().values(), strict=True))
        self.state_dict, self.load_state_dict = self.net.state_dict, self.net.load_state_dict

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The averaged G's images; inputs [B, …] may lie on any device."""
        device = next(self.net.parameters()).device
        return self.net(*(x.to(device) for x in inputs))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards G after iteration `step` = 1, 2, …; at first faster, to forget the start."""
        share = 1 - min(self.decay, step / (step + 10))
        for average, new in self.pairs:
            average.lerp_(new, share) if new.is_floating_point() else average.copy_(new)


def init_dcgan(net: nn.Module) -> nn.Module:
    """Draw weights from N(0, 0.02), batch norm's from N(1, 0.02), set biases to 0 (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return net


class LocalClassifier(nn.Sequential):
    """images [B, 3, S, S] → logits [B, n_classes]: is such an object anywhere in the image?

    Each of 16×16 places has logits of the pixels around it (18×18, at 64×64), joined by logsumexp, a soft
    maximum (Pinheiro & Collobert 2015, eq. 6). A classifier of whole images learns the scenes by heart.
    """

    def __init__(self, n_classes: int, ch: int, image_size: int):
        w = [3, *(ch * 2**k for k in range((image_size // 32).bit_length()))]
        layers = [nn.Conv2d(i, o, 4, 2, 1) for i, o in pairwise(w)] + [nn.Conv2d(w[-1], 2 * w[-1], 3, 1, 1)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, 0.2)
        super().__init__(*(x for layer in layers for x in (layer, nn.LeakyReLU(0.2))),
                         nn.Conv2d(2 * w[-1], n_classes, 1), nn.Flatten(2))
        nn.init.constant_(self[-2].bias, -2)  # most classes are absent: so it learns at once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x).float()  # [B, n_classes, places]
        return logits.logsumexp(2) - math.log(logits.shape[2])


def linear_decay(step: int, iters: int, start: float) -> float:
    """Factor of the learning rates in iteration `step` of 1 … iters: 1 up to iteration `start` (below 1: that
    share of iters), then falling linearly towards 0. start 0: always 1.
    """
    start *= iters if start < 1 else 1
    return (iters - step + 1) / (iters - start) if 0 < start < step else 1.0


def random_translate(x: torch.Tensor, share: float) -> torch.Tensor:
    """Shift each image [B, C, H, W] at random by up to `share` of its height; 0: unchanged.

    Shifts are of whole pixels; edges are repeated outwards. Shown such images, real and generated, D can
    hardly memorise the training images (Zhao et al. 2020).
    """
    if not share:
        return x
    n, _, h, w = x.shape
    most = round(share * h)
    dy, dx = torch.randint(-most, most + 1, (2, n, 1, 1), device=x.device)
    rows = (dy + torch.arange(h, device=x.device)[:, None]).clamp(0, h - 1)
    columns = (dx + torch.arange(w, device=x.device)).clamp(0, w - 1)
    return x[torch.arange(n, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def multi_hot(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Class ids [B, K], padded with n_classes → [B, n_classes] of 0 and 1."""
    return torch.zeros(len(labels), n_classes + 1, device=labels.device).scatter_(1, labels, 1.0)[:, :-1]
