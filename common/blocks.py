"""Building blocks that scripts share: spectral norm, initialisations, the average of a generator."""
import contextlib
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


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
    for net in nets:
        net.requires_grad_(False)
    try:
        yield
    finally:
        for net in nets:
            net.requires_grad_(True)


class Average:
    """Exponential moving average of a generator's weights, for sampling: in eval mode, without gradients.

    decay 0 makes it a copy of the generator itself. Batch norm's statistics are averaged too.
    """

    def __init__(self, G: nn.Module, decay: float):
        self.net, self.decay = copy.deepcopy(G).eval().requires_grad_(False), decay
        self.pairs = list(zip(self.net.state_dict().values(), G.state_dict().values(), strict=True))
        self.state_dict, self.load_state_dict = self.net.state_dict, self.net.load_state_dict

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.net(*inputs)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards G after iteration `step` = 1, 2, …; a lower decay at first forgets the start sooner."""
        share = 1 - min(self.decay, step / (step + 10))
        for average, new in self.pairs:
            average.lerp_(new, share) if new.is_floating_point() else average.copy_(new)


def init_xavier(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weight, zero bias (Miyato & Koyama 2018); returns the module.

    Call it before spectral_norm: what is written to a wrapped layer's `.weight.data` is silently lost.
    """
    nn.init.xavier_uniform_(module.weight, gain)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


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


def residual_conv(i: int, o: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size: 3×3 in a residual branch (gain √2), 1×1 in a shortcut (gain 1)."""
    return init_xavier(nn.Conv2d(i, o, kernel, padding=kernel // 2), math.sqrt(2) if kernel > 1 else 1.0)


class DownBlock(nn.Module):
    """Residual block with spectral norm, [B, i, H, W] → [B, o, H/2, W/2] (Miyato & Koyama 2018, fig. 14 c).

    first: the "optimised" block that takes an image, without activation before its first convolution.
    """

    def __init__(self, i: int, o: int, first: bool = False):
        super().__init__()
        self.first, hidden = first, o if first else i
        self.conv1 = spectral_norm(residual_conv(i, hidden, 3))
        self.conv2 = spectral_norm(residual_conv(hidden, o, 3))
        self.shortcut = spectral_norm(residual_conv(i, o, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x if self.first else F.leaky_relu(x))
        h = F.avg_pool2d(self.conv2(F.leaky_relu(h)), 2)
        return h + self.shortcut(F.avg_pool2d(x, 2))  # pooling commutes with a 1×1 convolution; first is cheaper
