"""Adversarial losses of scores (logits) [B], averaged over the batch, and penalties on D's gradients."""
from collections.abc import Callable

import torch
import torch.nn.functional as F


def hinge_d(real: torch.Tensor, fake: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """Hinge loss of D, E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al. 2018, eq. 16).

    flip: bool [2, B]; where True the target of a real (row 0) or fake (row 1) image is swapped.
    """
    if flip is None:
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    sign_real, sign_fake = (1 - 2 * flip.to(real.dtype)).unbind(0)
    return F.relu(1 - sign_real * real).mean() + F.relu(1 + sign_fake * fake).mean()


def hinge_g(fake: torch.Tensor) -> torch.Tensor:
    """Loss of G for hinge_d and wasserstein_d: -E[D(G(z))]."""
    return -fake.mean()


def relativistic(real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores minus the mean score of the other kind (relativistic average GAN, Jolicoeur-Martineau 2018)."""
    return real - fake.mean(), fake - real.mean()


def bce_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Minimax loss of D, -E[log σ(D(x))] - E[log(1 - σ(D(G(z))))] (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def bce_g(fake: torch.Tensor) -> torch.Tensor:
    """Non-saturating loss of G for bce_d: -E[log σ(D(G(z)))] (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


def wasserstein_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss of a critic, E[D(G(z))] - E[D(x)] (Arjovsky et al. 2017, eq. 2)."""
    return fake.mean() - real.mean()


Critic = Callable[[torch.Tensor], torch.Tensor]  # images [B, C, H, W] → scores [B]


def _gradients_between(critic: Critic, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """∇D [B, C·H·W] at one random point on the line between each pair of real and fake [B, C, H, W].

    Always in fp32: under autocast, powers of small gradients would vanish. The graph is kept, to train D.
    With batch norm in D, the points share its statistics, and the gradient is of the sum of their scores.
    """
    with torch.autocast(real.device.type, enabled=False):
        share = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
        x = torch.lerp(real, fake.detach().to(real.dtype), share).requires_grad_()
        return torch.autograd.grad(critic(x).sum(), x, create_graph=True)[0].flatten(1)


def gradient_penalty(critic: Critic, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """E[(‖∇D(x̂)‖₂ - 1)²], with the norm over all values of an image (WGAN-GP: Gulrajani et al. 2017, eq. 3).

    vector_norm has gradient 0 where the norm is 0; a square root there would give NaN.
    """
    return (torch.linalg.vector_norm(_gradients_between(critic, real, fake), dim=1) - 1).square().mean()


def wasserstein_divergence(critic: Critic, real: torch.Tensor, fake: torch.Tensor, k: float = 2,
                           p: float = 6) -> torch.Tensor:
    """k E[‖∇D(x̂)‖₂^p], the penalty of WGAN-div, added to wasserstein_d (Wu et al. 2018, Algorithm 1)."""
    return k * torch.linalg.vector_norm(_gradients_between(critic, real, fake), dim=1).pow(p).mean()
