"""Blocks that scripts share: spectral norm, conditional batch norm, residual blocks, initialisation."""
import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


@contextlib.contextmanager
def normed_once(net: nn.Module):
    """Within, each spectral-normed weight of `net` is computed once, in fp32, for all forward passes.

    Else each forward pass makes its own power iteration, and under autocast makes it in bf16. Enter it anew
    after each update of the weights, and outside of autocast.
    """
    with parametrize.cached():
        for module in net.modules():
            if parametrize.is_parametrized(module, "weight"):
                module.weight  # fills the cache
        yield


def init_xavier(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weight, zero bias (Miyato & Koyama 2018); returns the module.

    Must come before spectral_norm: what is written to a wrapped layer's `.weight.data` is silently lost.
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


def _conv(i: int, o: int, kernel: int, spectral: bool = False) -> nn.Module:
    """Convolution that keeps the size: 3×3 in a residual branch (gain √2), 1×1 in a shortcut (gain 1)."""
    conv = init_xavier(nn.Conv2d(i, o, kernel, padding=kernel // 2), math.sqrt(2) if kernel > 1 else 1.0)
    return spectral_norm(conv) if spectral else conv


class SetEmbedding(nn.Embedding):
    """Class ids [B, K] as the sum of their vectors [B, dim]; id `n_classes` adds exactly 0."""

    def __init__(self, n_classes: int, dim: int, std: float = 0.1):
        super().__init__(n_classes + 1, dim, padding_idx=n_classes)
        nn.init.normal_(self.weight, 0, std)
        nn.init.zeros_(self.weight[n_classes])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).sum(1)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias depend on a set of labels (de Vries et al. 2017; Dumoulin et al. 2017).

    gain = γ + Σ γ[label], bias = β + Σ β[label]: for one label the usual class-conditional form, for several
    independent of their order, and a null label changes nothing.
    """

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.gain, self.bias = SetEmbedding(n_classes, channels), SetEmbedding(n_classes, channels)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], ids [B, K] → [B, C, H, W]"""
        gain = (self.gamma + self.gain(ids))[..., None, None]
        bias = (self.beta + self.bias(ids))[..., None, None]
        return self.norm(x) * gain + bias


class UpBlock(nn.Module):
    """Residual block [B, i, H, W] → [B, o, 2H, 2W] (Miyato & Koyama 2018, fig. 14 b)."""

    def __init__(self, i: int, o: int, n_classes: int):
        super().__init__()
        self.bn1, self.conv1 = ConditionalBatchNorm(i, n_classes), _conv(i, o, 3)
        self.bn2, self.conv2 = ConditionalBatchNorm(o, n_classes), _conv(o, o, 3)
        self.shortcut = _conv(i, o, 1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = F.interpolate(F.leaky_relu(self.bn1(x, ids)), scale_factor=2)
        h = self.conv2(F.leaky_relu(self.bn2(self.conv1(h), ids)))
        # a 1×1 convolution commutes with nearest up-sampling, and before it costs a quarter
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class DownBlock(nn.Module):
    """Residual block with spectral norm, [B, i, H, W] → [B, o, H/2, W/2] (Miyato & Koyama 2018, fig. 14 c).

    `first`: the "optimised" block that takes an image, with no activation before its first convolution.
    """

    def __init__(self, i: int, o: int, first: bool = False):
        super().__init__()
        self.first, hidden = first, o if first else i
        self.conv1, self.conv2 = _conv(i, hidden, 3, spectral=True), _conv(hidden, o, 3, spectral=True)
        self.shortcut = _conv(i, o, 1, spectral=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x if self.first else F.leaky_relu(x))
        h = F.avg_pool2d(self.conv2(F.leaky_relu(h)), 2)
        return h + self.shortcut(F.avg_pool2d(x, 2))  # pooling first: the same sum at a quarter of the cost
