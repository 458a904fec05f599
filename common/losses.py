"""Adversarial losses on raw scores (logits) [B], averaged over the batch."""
import torch
import torch.nn.functional as F


def hinge_d(real: torch.Tensor, fake: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """Hinge loss of D, E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Miyato et al. 2018, eq. 16).

    flip: bool [2, B]; where True a real (row 0) or fake (row 1) image counts as the other kind.
    """
    if flip is None:
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    sign_real, sign_fake = (1 - 2 * flip.to(real.dtype)).unbind(0)
    return F.relu(1 - sign_real * real).mean() + F.relu(1 + sign_fake * fake).mean()


def hinge_g(fake: torch.Tensor) -> torch.Tensor:
    """Loss of G that goes with it: -E[D(G(z))]."""
    return -fake.mean()


def relativistic(real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores relative to the mean of the other kind (relativistic average GAN, Jolicoeur-Martineau 2018)."""
    return real - fake.mean(), fake - real.mean()


def bce_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Minimax loss of D, -E[log σ(D(x))] - E[log(1 - σ(D(G(z))))] (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def bce_g(fake: torch.Tensor) -> torch.Tensor:
    """Loss of G that goes with it, in its non-saturating form: -E[log σ(D(G(z)))] (their section 3)."""
    return F.softplus(-fake).mean()
