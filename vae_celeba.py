"""A convolutional VAE on faces: reconstructions, samples, interpolations, arithmetic with attributes.

Kingma & Welling 2014. It is trained without labels, which serve afterwards to find attributes in its latent.
--recipe beta weights the KL divergence by β = 0.3 (as Higgins et al. 2017, but below 1): sharper
reconstructions, worse samples.

    python vae_celeba.py --quick                        # recipe beta, minutes on two CPU cores
    python vae_celeba.py --iters 60000                  # the paper's recipe, one GPU
    python vae_celeba.py --resume runs/vae_celeba       # continue; --sample and --eval take a run too

Results, with commands and hardware: results/README.md.
"""
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import evaluator
from common.blocks import autocast, init_dcgan
from common.datasets import Batches, Data, load_faces, to_float
from common.fid import feature_stats, frechet_distance
from harness import dist
from harness.cli import Settings
from harness.pictures import save_grid
from harness.run import Run, launch
from synthetic.measures import count_attributes, decide


@dataclass
class Config(Settings):
    recipe: Literal["paper", "beta"] = "paper"  # method; beta: a smaller weight of the KL divergence
    iters: int = 60_000  # iterations, of one step each
    batch_size: int = 32  # images per step
    lr: float = 2e-4  # Adam's learning rate
    z_dim: int = 128  # dimensions of the latent z, with prior N(0, I)
    ch: int = 32  # width: a sixteenth of the feature maps at 4×4
    image_size: Literal[32, 64, 128] = 128  # height and width of the images
    data: str = "auto"  # auto (data/celeba if it exists, else synthetic), synthetic, or a folder of images
    attributes: str = ""  # attributes, joined by commas; empty: eight of CelebA's, all of another set's
    crop: int = 0  # side of the square cut out of the middle of each image; 0: the largest
    skip_bad_images: bool = False  # leave out, and count, images that can't be used
    n_synthetic: int = 10_000  # synthetic faces
    eval_images: int = 5000  # generated images per draw that are scored
    eval_draws: int = 3  # draws of z averaged per score
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    kl_weight: float = 1.0  # β, weight of the KL divergence in the loss


RECIPES = {
    "paper": {},
    "beta": dict(kl_weight=0.3, lr=1e-3),
}
QUICK = dict(recipe="beta", iters=6000, ch=16, image_size=64, n_synthetic=4000, eval_images=1000,
             log_every=100, sample_every=300, eval_every=2000, save_every=1000)


# ---------------------------------------------------------------------- networks
def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at half the image's size, a quarter, … down to 4×4; at 128: 1, 2, 4, 8, 16 times ch."""
    n = (image_size // 4).bit_length() - 1
    return [16 * ch >> k for k in reversed(range(n))]


def encoder(z_dim: int, ch: int, image_size: int) -> nn.Sequential:
    """images [B, 3, S, S] → mean and log-variance of z, side by side [B, 2·z_dim]."""
    def down(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
    w = widths(ch, image_size)
    layers = [layer for i, o in pairwise([3, *w]) for layer in down(i, o)]
    return nn.Sequential(*layers,  # at 128: [B, ch, 64, 64], …, [B, 16·ch, 4, 4]
                         nn.Conv2d(w[-1], 2 * z_dim, 4), nn.Flatten())


def decoder(z_dim: int, ch: int, image_size: int) -> nn.Sequential:
    """z [B, z_dim] → images [B, 3, S, S] in [-1, 1]: the mean of p(x | z)."""
    def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    w = widths(ch, image_size)[::-1]
    layers = [layer for i, o in pairwise(w) for layer in up(i, o, 2, 1)]
    return nn.Sequential(nn.Unflatten(1, (z_dim, 1, 1)),
                         *up(z_dim, w[0], 1, 0),  # [B, 16·ch, 4, 4]
                         *layers,  # at 128: [B, 8·ch, 8, 8], …, [B, ch, 64, 64]
                         nn.ConvTranspose2d(w[-1], 3, 4, 2, 1), nn.Tanh())  # [B, 3, 128, 128]


class VAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self, z_dim: int, ch: int, image_size: int):
        super().__init__()
        self.encoder = init_dcgan(encoder(z_dim, ch, image_size))
        self.decoder = init_dcgan(decoder(z_dim, ch, image_size))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] → mean and log-variance of q(z | x), [B, z_dim] each."""
        return self.encoder(x).float().chunk(2, 1)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, I)) in nats [B] (Kingma & Welling 2014, appendix B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


# ---------------------------------------------------------------------- one step
def vae_step(vae: VAE, opt: Optimizer, x: Tensor, cfg: Config) -> dict:
    """Update encoder and decoder with images [B, 3, S, S]. Reads cfg.kl_weight, precision."""
    with autocast(x, cfg.precision):
        mean, log_variance = vae.encode(x)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)  # the reparametrisation trick
        reconstruction = vae.decoder(z).float()
    mse = F.mse_loss(reconstruction, x)
    kl = kl_divergence(mean, log_variance).mean()
    # KL is averaged over pixels as the squares are: up to a factor, this is the negative ELBO of a Gaussian
    # decoder of variance 1/2. A KL that is summed would outweigh them, and z would carry no information
    loss = mse + cfg.kl_weight * kl / x[0].numel()
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(loss=loss, mse=mse, kl=kl)


# ---------------------------------------------------------------------- what the latent has learned
@torch.no_grad()
def encode_all(vae: VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [N, z_dim], on the CPU, of uint8 images [N, 3, S, S]."""
    device = next(vae.parameters()).device
    parts = [vae.encode(to_float(part.to(device))) for part in images.split(250)]
    return tuple(torch.cat(column).cpu() for column in zip(*parts, strict=True))


@torch.no_grad()
def decode_all(vae: VAE, z: Tensor) -> Tensor:
    """Images [N, 3, S, S], on the CPU, of z [N, z_dim]."""
    device = next(vae.parameters()).device
    return torch.cat([vae.decoder(part.to(device)).cpu() for part in z.split(250)])


def directions(vae: VAE, data: Data) -> Tensor:
    """For each attribute the mean latent of training images with it, minus that without it [A, z_dim]."""
    z, y = encode_all(vae, data.images)[0], data.labels

    def mean(weight: Tensor) -> Tensor:  # weights [N, A] → [A, z_dim]
        return weight.T @ z / weight.sum(0).clamp(min=1)[:, None]
    return mean(y) - mean(1 - y)


def add_attributes(vae: VAE, data: Data, judge: evaluator.Judge) -> dict[str, tuple[float, float]]:
    """{attribute: share of held-out faces without it in which the judge finds it}, reconstructed as they are
    and with the attribute's direction added. Whatever correlates with it in the data is added, too.
    """
    latents, shares = encode_all(vae, data.test_images)[0], {}
    for attribute, direction in enumerate(directions(vae, data)):
        z = latents[data.test_labels[:, attribute] == 0]
        if len(z):
            found = [judge(decode_all(vae, part).to(next(vae.parameters()).device)).cpu()
                     for part in (z, z + direction)]
            shares[data.classes[attribute]] = tuple(
                decide(p, data.groups)[:, attribute].double().mean().item() for p in found)
    return shares


def score_reconstructions(vae: VAE, data: Data, scorer: evaluator.Scorer) -> dict:
    """Scores of the held-out faces' reconstructions and of attributes added to them, (mean, 0) each."""
    mean, log_variance = encode_all(vae, data.test_images)
    images, added = decode_all(vae, mean), add_attributes(vae, data, scorer.judge)
    probabilities, vectors = scorer.judge.read(images.split(250))
    kept = count_attributes(probabilities, data.test_labels, data.groups)
    values = {"FD of reconstructions": frechet_distance(*scorer.test_stats, *feature_stats([vectors])),
              "MSE": F.mse_loss(images, to_float(data.test_images)).item(),
              "attributes kept": kept["accuracy"],
              "KL, nats": kl_divergence(mean, log_variance).mean().item()}
    if added:  # none, where every held-out face has every attribute
        values["attribute added"] = sum(after for _, after in added.values()) / len(added)
    by_attribute = kept["by attribute"].tolist(), [0.0] * len(kept["by attribute"])
    return {name: (value, 0.0) for name, value in values.items()} | {
        "by attribute": by_attribute, "found without and with": added}


def save_pictures(vae: VAE, data: Data, run: Run) -> None:
    """Save grids: samples, reconstructions, interpolations between faces, attributes added."""
    cfg, folder, title = run.cfg, run.folder, run.title
    g = torch.Generator().manual_seed(cfg.seed)
    save_grid(folder / "samples.png", decode_all(vae, torch.randn(16, cfg.z_dim, generator=g)), title, nrow=4)
    if data.test_images is None:  # not there: the rest starts from real faces
        return
    chosen = data.test_images[torch.randperm(len(data.test_images), generator=g)[:16]]
    faces, z = to_float(chosen), encode_all(vae, chosen)[0]
    save_grid(folder / "reconstructions.png", torch.cat([faces[:8], decode_all(vae, z[:8])]),
              f"{title}: held-out faces, their reconstructions below")
    # at both ends of a row are the faces themselves
    pairs, share = len(faces) // 2, torch.linspace(0, 1, 8)[:, None]
    rows = [torch.cat([faces[i, None], decode_all(vae, torch.lerp(z[i], z[pairs + i], share)),
                       faces[pairs + i, None]]) for i in range(pairs)]
    save_grid(folder / "interpolation.png", torch.cat(rows),
              f"{title}: from one held-out face, on the left, to another", nrow=10)
    rows = []
    for attribute, direction in enumerate(directions(vae, data)):
        z = encode_all(vae, data.test_images[data.test_labels[:, attribute] == 0][:4])[0]
        z = torch.stack([z, z + direction], 1).flatten(0, 1)
        rows += [decode_all(vae, z), torch.ones(8 - len(z), *faces.shape[1:])]  # white if fewer lack it
    if rows:
        save_grid(folder / "arithmetic.png", torch.cat(rows),
                  f"{title}: four held-out faces without an attribute, reconstructed as they are and with "
                  "its direction added", rows=data.classes)


# ---------------------------------------------------------------------- training
def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_faces, False)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    vae = VAE(cfg.z_dim, cfg.ch, cfg.image_size).to(device, memory_format=torch.channels_last)
    opt = Adam(vae.parameters(), cfg.lr, betas=(0.5, 0.9), fused=True)
    run.register(data, f"ch {cfg.ch}", vae=vae, opt=opt)
    scorer = evaluator.get_scorer(run, data)
    fixed = torch.randn(16, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))

    @torch.no_grad()
    def sample(n: int, g: torch.Generator) -> tuple[Tensor, None]:
        return vae.decoder(torch.randn(n, cfg.z_dim, generator=g).to(device)), None

    for step in run.steps():
        x, _ = batches(step - 1)
        vae.train()
        run.log(**vae_step(vae, opt, x, cfg))
        vae.eval()  # for pictures and scores: batch norm with its running statistics

        if run.is_due("sample"):
            shown = data.test_images[:8]
            z = torch.cat([encode_all(vae, shown)[0], fixed])
            run.log_images(torch.cat([to_float(shown), decode_all(vae, z)]),
                           ": held-out faces, their reconstructions, samples")
        if scorer and run.is_due("eval"):
            run.log_scores(**scorer.validate(sample))

    vae.eval()
    scores = evaluator.finish(run, data, scorer, sample, lambda: save_pictures(vae, data, run),
                              columns=["FD (judge)", "FID", "FD of reconstructions", "MSE", "attributes kept",
                                       "attribute added"],
                              more=partial(score_reconstructions, vae, data, scorer))
    if scores:
        print("\nshare of held-out faces without an attribute in which it is found: reconstructed, and added")
        *_, row = scores.values()
        for attribute, (before, after) in row["found without and with"].items():
            print(f"{attribute:<36}{before:10.4f}{after:10.4f}")


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
