"""Adversarial losses of scores (logits) [B], averaged over the batch, and penalties on D's gradients."""
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.blocks import multi_hot


def hinge_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of D, E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al. 2018, eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_g(fake: torch.Tensor) -> torch.Tensor:
    """Loss of G for hinge_d and wasserstein_d: -E[D(G(z))]."""
    return -fake.mean()


def paired(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """E[-log σ(first - second)]: D's of real and fake, G's of fake and real (Huang et al. 2024, eq. 2)."""
    return F.softplus(second - first).mean()


def auxiliary(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of an auxiliary classifier (Odena et al. 2017): logits [B, C], labels [B, K] ids or C."""
    return F.binary_cross_entropy_with_logits(logits.float(), multi_hot(labels, logits.shape[1]))


def bce_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Minimax loss of D, -E[log σ(D(x))] - E[log(1 - σ(D(G(z))))] (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def bce_g(fake: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of G for bce_d: -E[log σ(D(G(z)))] (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


def wasserstein_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss of a critic, E[D(G(z))] - E[D(x)] (Arjovsky et al. 2017, eq. 2)."""
    return fake.mean() - real.mean()


def _gradient_norms(critic: Callable, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """‖∇D(x̂)‖₂ [B], over all values of x̂, a random point between each pair of real and fake [B, C, H, W].

    critic(images [B, C, H, W]) → scores [B] with a graph that is kept, to train D. Always in fp32: under
    autocast, powers of small gradients would vanish. With batch norm in D, the points share its statistics.
    """
    with torch.autocast(real.device.type, enabled=False):
        share = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
        x = torch.lerp(real, fake.detach().to(real.dtype), share).requires_grad_()
        gradients, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1)  # a square root would give NaN at norm 0


def gradient_penalty(critic: Callable, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """E[(‖∇D(x̂)‖₂ - 1)²] (WGAN-GP: Gulrajani et al. 2017, eq. 3)."""
    return (_gradient_norms(critic, real, fake) - 1).square().mean()


def wasserstein_divergence(critic: Callable, real: torch.Tensor, fake: torch.Tensor, k: float = 2,
                           p: float = 6) -> torch.Tensor:
    """k E[‖∇D(x̂)‖₂^p], the penalty of WGAN-div, added to wasserstein_d (Wu et al. 2018, Algorithm 1)."""
    return k * _gradient_norms(critic, real, fake).pow(p).mean()


def zero_centred_penalty(critic: Callable, images: torch.Tensor) -> torch.Tensor:
    """½ E[‖∇D(x)‖₂²]: R1 if x is real, R2 if it is generated (Mescheder et al. 2018, eq. 9, 10)."""
    return _gradient_norms(critic, images, images).square().mean() / 2
