"""DCGAN on MNIST at 32×32, and a fully connected GAN for comparison.

DCGAN: Radford et al. 2016; non-saturating minimax loss: Goodfellow et al. 2014. --recipe r3gan has no norm in
D, and the relativistic pairing loss with R1 and R2 penalties (Huang et al. 2024).

    python dcgan_mnist.py --quick                              # recipe r3gan, minutes on two CPU cores
    python dcgan_mnist.py --latent-dim 100 --hidden-dim 100    # or --net mlp; the paper's recipe, one GPU
    python dcgan_mnist.py --resume runs/dcgan_mnist            # continue; --sample and --eval take a run too
    python tools/sweep.py dcgan_mnist.py latent_dim=16,100 hidden_dim=16,100

Results, with commands and hardware: results/README.md.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import evaluator
from common import losses
from common.blocks import EMA, autocast, init_dcgan, linear_decay, no_param_grads
from common.datasets import Batches, Data, load_digits
from harness import dist
from harness.cli import Settings
from harness.pictures import save_grid
from harness.run import Run, launch


@dataclass
class Config(Settings):
    recipe: Literal["paper", "r3gan"] = "paper"  # method; r3gan learns several times faster
    iters: int = 12_000  # iterations; one is a step of D and one of G
    batch_size: int = 128  # images per step
    lr_g: float = 2e-4  # Adam's learning rate for G
    lr_d: float = 2e-4  # Adam's learning rate for D
    latent_dim: int = 16  # dimensions of the latent z ~ N(0, I)
    hidden_dim: int = 16  # width: feature maps of the layers nearest the image
    net: Literal["conv", "mlp"] = "conv"  # DCGAN, or fully connected layers in both networks
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    d_norm: Literal["batch", "none"] = "batch"  # D's norm
    loss: Literal["bce", "rpgan"] = "bce"  # minimax with G's non-saturating loss, or relativistic pairing
    gamma: float = 0.0  # γ of R1 and R2, penalties on D's gradients at real and generated images
    beta1: float = 0.5  # Adam's β1, for both networks
    beta2: float = 0.999  # Adam's β2
    lr_decay_from: float = 0.0  # iteration (below 1: share of --iters) from which rates fall to 0; 0: never
    data: str = "auto"  # auto (MNIST if available, else synthetic), mnist, synthetic, or a folder of MNIST
    n_synthetic: int = 60_000  # synthetic digits to train on
    eval_images: int = 10_000  # generated images per draw that are scored
    eval_draws: int = 3  # draws of z averaged per score
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    pairs: int = 5  # pairs of z in the interpolation grids


RECIPES = {
    "paper": {},
    "r3gan": dict(loss="rpgan", d_norm="none", gamma=0.25, lr_g=1e-3, lr_d=1e-3, beta1=0.0, beta2=0.99,
                  ema=0.995),
}
QUICK = dict(recipe="r3gan", iters=8000, batch_size=64, hidden_dim=32, eval_images=2000,
             log_every=100, sample_every=250, eval_every=2000, save_every=1000)


# ---------------------------------------------------------------------- networks
class Generator(nn.Sequential):
    """z [B, latent] → images [B, 1, 32, 32] in [-1, 1]."""

    def __init__(self, net: str, latent: int, h: int):
        def dense(i: int, o: int) -> list[nn.Module]:
            return [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]

        def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

        if net == "mlp":
            layers = [*dense(latent, 16 * h),
                      *dense(16 * h, 32 * h),
                      nn.Linear(32 * h, 32 * 32), nn.Tanh(), nn.Unflatten(1, (1, 32, 32))]
        else:
            layers = [nn.Unflatten(1, (latent, 1, 1)),
                      *up(latent, 4 * h, 1, 0),  # [B, 4h, 4, 4]
                      *up(4 * h, 2 * h, 2, 1),  # [B, 2h, 8, 8]
                      *up(2 * h, h, 2, 1),  # [B, h, 16, 16]
                      nn.ConvTranspose2d(h, 1, 4, 2, 1), nn.Tanh()]  # [B, 1, 32, 32]
        super().__init__(*layers)
        init_dcgan(self)


class Discriminator(nn.Sequential):
    """images [B, 1, 32, 32] → logits [B, 1]; the sigmoid is in the loss."""

    def __init__(self, net: str, h: int, norm: str = "batch"):
        plain = norm == "none"

        def down(i: int, o: int) -> list[nn.Module]:
            norms = [] if plain else [nn.BatchNorm2d(o)]
            return [nn.Conv2d(i, o, 4, 2, 1, bias=plain), *norms, nn.LeakyReLU(0.2)]

        if net == "mlp":
            layers = [nn.Flatten(),
                      nn.Linear(32 * 32, 32 * h), nn.LeakyReLU(0.2),
                      nn.Linear(32 * h, 16 * h, bias=plain),
                      *([] if plain else [nn.BatchNorm1d(16 * h)]), nn.LeakyReLU(0.2),
                      nn.Linear(16 * h, 1)]
        else:
            layers = [nn.Conv2d(1, h, 4, 2, 1), nn.LeakyReLU(0.2),  # [B, h, 16, 16]; without norm
                      *down(h, 2 * h),  # [B, 2h, 8, 8]
                      *down(2 * h, 4 * h),  # [B, 4h, 4, 4]
                      nn.Conv2d(4 * h, 1, 4), nn.Flatten()]  # [B, 1]
        super().__init__(*layers)
        init_dcgan(self)


# ---------------------------------------------------------------------- one step of D, one of G
def d_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, cfg: Config) -> dict:
    """Update D with real and generated images [B, 1, 32, 32]. Reads cfg.loss, gamma, precision."""
    with autocast(real, cfg.precision):
        # two passes, because real and fake images each need their own batch-norm statistics
        score_real, score_fake = D(real).float(), D(fake).float()
    loss = (losses.rpgan if cfg.loss == "rpgan" else losses.minimax_d)(score_real, score_fake)
    if cfg.gamma:  # an unbiased estimate of the penalty from an eighth of the batch, at an eighth of the cost
        loss = loss + cfg.gamma * losses.r1r2_penalty(D, torch.cat([real[::8], fake[::8]]))
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(d_loss=loss, d_real=score_real.sigmoid().mean(), d_fake=score_fake.sigmoid().mean())


def g_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, cfg: Config) -> dict:
    """Update G by its images fake = G(z), still attached to it. Reads cfg.loss, precision.

    Real images are used only by the relativistic loss. d_fake_updated: the mean of D(G(z)) after D's step.
    """
    with no_param_grads(D), autocast(real, cfg.precision):
        score = D(fake).float()
        loss = losses.rpgan(score, D(real).float()) if cfg.loss == "rpgan" else losses.nonsaturating_g(score)
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(g_loss=loss, d_fake_updated=score.sigmoid().mean())


# ---------------------------------------------------------------------- sample grids
def save_pictures(ema: EMA, data: Data, run: Run) -> None:
    """Save grids: samples, real beside generated, interpolation and extrapolation between two z."""
    cfg, folder, g = run.cfg, run.folder, torch.Generator().manual_seed(run.cfg.seed)
    fake = ema(torch.randn(100, cfg.latent_dim, generator=g)).cpu()
    save_grid(folder / "samples.png", fake, run.title, nrow=10)
    if len(data.images):
        real = data.random_images(40, g)
        save_grid(folder / "real_beside_generated.png", torch.cat([real, fake[:40]]),
                  f"{run.title}: four rows of training images, four of generated ones", nrow=10)
    # z1 + i/9 (z2 - z1) for i = 0 … 9, then for i = -5 … 14
    z1, z2 = torch.randn(2, cfg.pairs, 1, cfg.latent_dim, generator=g)
    for name, first, last in (("interpolation", 0, 9), ("extrapolation", -5, 14)):
        z = torch.lerp(z1, z2, torch.arange(first, last + 1)[:, None] / 9)  # [pairs, columns, latent]
        save_grid(folder / f"{name}.png", ema(z.flatten(0, 1)),
                  f"{run.title}: z1 + i/9 (z2 - z1), i = {first} to {last}, a pair per row", nrow=z.shape[1])


# ---------------------------------------------------------------------- training
def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_digits, 32)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    G = Generator(cfg.net, cfg.latent_dim, cfg.hidden_dim).to(device, memory_format=torch.channels_last)
    D = Discriminator(cfg.net, cfg.hidden_dim, cfg.d_norm).to(device, memory_format=torch.channels_last)
    ema = EMA(G, cfg.ema)  # is sampled and scored
    opt_g = Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.register(data, cfg.net, f"latent {cfg.latent_dim}", f"hidden {cfg.hidden_dim}",
                 G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    scorer = evaluator.get_scorer(run, data)
    fixed = torch.randn(64, cfg.latent_dim, generator=torch.Generator().manual_seed(cfg.seed))

    def sample(n: int, g: torch.Generator) -> tuple[Tensor, None]:
        return ema(torch.randn(n, cfg.latent_dim, generator=g)), None

    for step in run.steps():
        share = linear_decay(step, cfg.iters, cfg.lr_decay_from)
        opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * share, cfg.lr_d * share
        real, _ = batches(step - 1)
        with autocast(real, cfg.precision):
            fake = G(torch.randn(len(real), cfg.latent_dim, device=device))
        run.log(**d_step(D, opt_d, real, fake.detach(), cfg))
        run.log(**g_step(D, opt_g, real, fake, cfg))
        ema.update(step)

        if run.is_due("sample"):
            run.log_images(ema(fixed))
        if scorer and run.is_due("eval"):
            run.log_scores(**scorer.validate(sample))

    scores = evaluator.finish(run, data, scorer, sample, lambda: save_pictures(ema, data, run), shown="last")
    if scores:
        print("\nshare of each digit, %")  # shows a mode collapse
        for name, row in scores.items():
            print(f"{name:<20}" + "".join(f"{100 * share:7.1f}" for share in row["histogram"][0]))


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
