"""What scripts share: spectral norm once per update, an initialisation, the average of G, moved images."""
import contextlib
import copy

import torch
from torch import nn
from torch.nn.utils import parametrize


@contextlib.contextmanager
def normed_once(net: nn.Module):
    """Within, each spectral-normed weight of `net` is computed once, in fp32, for all forward passes.

    Otherwise every forward pass makes a power iteration of its own, and under autocast makes it in bf16.
    Enter it anew after each update of the weights, and outside of autocast.
    """
    with parametrize.cached():
        for module in net.modules():
            if parametrize.is_parametrized(module, "weight"):
                _ = module.weight  # fills the cache
        yield


@contextlib.contextmanager
def frozen(*nets: nn.Module):
    """Within, forward passes record no gradients for the nets' own weights: G's step does not need D's."""
    together = nn.ModuleList(nets).requires_grad_(False)
    try:
        yield
    finally:
        together.requires_grad_(True)


class Average:
    """EMA of G's weights and batch-norm statistics, to sample from: eval mode, no gradients; decay 0: G."""

    def __init__(self, G: nn.Module, decay: float):
        self.net, self.decay = copy.deepcopy(G).eval().requires_grad_(False), decay
        self.pairs = list(zip(self.net.state_dict().values(), G.state_dict().values(), strict=True))
        self.state_dict, self.load_state_dict = self.net.state_dict, self.net.load_state_dict

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.net(*inputs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards G after iteration `step` = 1, 2, …; at first faster, to forget the start."""
        share = 1 - min(self.decay, step / (step + 10))
        for average, new in self.pairs:
            average.lerp_(new, share) if new.is_floating_point() else average.copy_(new)


def init_dcgan(net: nn.Module) -> nn.Module:
    """DCGAN's initialisation: weights N(0, 0.02), batch norm's N(1, 0.02), biases 0 (Radford et al. 2016)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.02)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return net


def moved(x: torch.Tensor, share: float, mirror: bool = True) -> torch.Tensor:
    """Images [B, C, H, W], each mirrored and shifted by up to that share of its size at random; 0: unchanged.

    Shifts are of whole pixels, and edges are repeated outwards. If D is given all images like this, generated
    ones too, it can hardly memorise the training images (Zhao et al. 2020).
    """
    if not share:
        return x
    n, _, h, w = x.shape
    most = round(share * h)
    if mirror:
        x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    dy, dx = torch.randint(-most, most + 1, (2, n, 1, 1), device=x.device)
    rows = (dy + torch.arange(h, device=x.device)[:, None]).clamp(0, h - 1)
    columns = (dx + torch.arange(w, device=x.device)).clamp(0, w - 1)
    return x[torch.arange(n, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def multi_hot(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Class ids [B, K], padded with n_classes → [B, n_classes] of 0 and 1."""
    return torch.zeros(len(labels), n_classes + 1, device=labels.device).scatter_(1, labels, 1.0)[:, :-1]
