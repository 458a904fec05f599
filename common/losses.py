"""Losses of several scripts: of scores (logits) [B], averaged over the batch; a penalty on D's gradients."""
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.blocks import multi_hot


def minimax_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """D's minimax loss, -E[log σ(D(x))] - E[log(1 - σ(D(G(z))))] (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def nonsaturating_g(fake: torch.Tensor) -> torch.Tensor:
    """G's non-saturating loss, -E[log σ(D(G(z)))] (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


def hinge_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """D's hinge loss, E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al. 2018, eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def rahinge(first: torch.Tensor, second: torch.Tensor, mean: Callable = torch.mean) -> torch.Tensor:
    """Hinge loss of scores relative to the other kind's mean (Jolicoeur-Martineau 2018, section 4.2.1). D's
    is rahinge(D(x), D(G(z))), G's rahinge(D(G(z)), D(x)). mean: over the batch, under torchrun all of it.
    """
    return hinge_d(first - mean(second), second - mean(first))


def rpgan(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Relativistic pairing loss, E[-log σ(first - second)] (Huang et al. 2024, eq. 2). D's is
    rpgan(D(x), D(G(z))), G's rpgan(D(G(z)), D(x)).
    """
    return F.softplus(second - first).mean()


def r1r2_penalty(D: Callable, images: torch.Tensor) -> torch.Tensor:
    """E[‖∇D(x)‖₂²] over real and generated images [B, C, H, W]; D(images) → scores [B].

    With as many of each kind, γ times this is R3GAN's γ/2 (R1 + R2) (Huang et al. 2024, eq. 3). It stays in
    fp32: in bf16 the squares of small gradients would lose their digits.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = images.detach().float().requires_grad_()
        gradients, = torch.autograd.grad(D(images).sum(), images, create_graph=True)
    return gradients.square().sum((1, 2, 3)).mean()


def aux_classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a classifier's logits [B, C] and ids [B, K] padded with C (Odena et al. 2017)."""
    return F.binary_cross_entropy_with_logits(logits.float(), multi_hot(labels, logits.shape[1]))
