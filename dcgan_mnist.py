"""DCGAN on MNIST at 32×32, and a fully connected GAN for comparison.

DCGAN: Radford et al. 2016; non-saturating minimax loss: Goodfellow et al. 2014.

    python dcgan_mnist.py --quick                              # minutes on two CPU cores
    python dcgan_mnist.py --latent-dim 100 --hidden-dim 100    # or --net mlp; the full run, one GPU
    python dcgan_mnist.py --resume runs/dcgan_mnist            # continue; --sample and --eval take a run too
    python benchmarks/sweep.py dcgan_mnist.py latent_dim=16,100 hidden_dim=16,100

Results, with commands and hardware: results/README.md.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import evaluator
from common import losses
from common.blocks import Average, frozen, init_dcgan
from common.cli import Settings
from common.datasets import Batches, Data, load_digits
from common.pictures import save_grid, save_images
from common.run import Run, launch


@dataclass
class Config(Settings):
    iters: int = 12_000  # iterations; one is a step of D and one of G
    batch_size: int = 128  # images a step
    lr_g: float = 2e-4  # Adam's learning rate for G
    lr_d: float = 2e-4  # Adam's learning rate for D
    latent_dim: int = 16  # dimensions of the latent z ~ N(0, I)
    hidden_dim: int = 16  # width: feature maps of the layers nearest the image
    net: Literal["conv", "mlp"] = "conv"  # DCGAN, or fully connected layers in both networks
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    d_norm: Literal["batch", "none"] = "batch"  # D's norm
    loss: Literal["bce", "paired"] = "bce"  # minimax, or of pairs of a real and a generated image
    gamma: float = 0.0  # weight of the mean of R1 and R2, D's gradients at real and generated images
    beta1: float = 0.5  # Adam's decay rate of the gradient's mean, for both networks
    beta2: float = 0.999  # and of its square's
    data: str = "auto"  # auto (MNIST if available, else synthetic), mnist, synthetic, or a folder of MNIST
    n_synthetic: int = 60_000  # synthetic digits to train on
    eval_images: int = 10_000  # generated images per draw that are scored
    eval_draws: int = 3  # draws of z averaged per score
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    pairs: int = 5  # pairs of z in the interpolation grids


QUICK = dict(iters=8000, batch_size=64, lr_g=1e-3, lr_d=1e-3, hidden_dim=32, ema=0.995, d_norm="none",
             loss="paired", gamma=0.5, beta1=0.0, beta2=0.99, log_every=100, sample_every=250,
             eval_every=2000, save_every=1000, eval_images=2000)


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
        act, plain = nn.LeakyReLU(0.2), norm == "none"

        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 4, 2, 1, bias=plain), nn.Identity() if plain else nn.BatchNorm2d(o), act]

        if net == "mlp":
            layers = [nn.Flatten(),
                      nn.Linear(32 * 32, 32 * h), act,
                      nn.Linear(32 * h, 16 * h, bias=plain),
                      nn.Identity() if plain else nn.BatchNorm1d(16 * h), act,
                      nn.Linear(16 * h, 1)]
        else:
            layers = [nn.Conv2d(1, h, 4, 2, 1), act,  # [B, h, 16, 16]; no norm next to the image
                      *down(h, 2 * h),  # [B, 2h, 8, 8]
                      *down(2 * h, 4 * h),  # [B, 4h, 4, 4]
                      nn.Conv2d(4 * h, 1, 4), nn.Flatten()]  # [B, 1]
        super().__init__(*layers)
        init_dcgan(self)


# ---------------------------------------------------------------------- one step of D, one of G

def d_step(D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor,
           loss: str = "bce", gamma: float = 0.0, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update D with real and generated images [B, 1, 32, 32]; d_real, d_fake: means of D(x), D(G(z))."""
    fake = fake.detach()
    with autocast():
        # two passes, because real and fake images each need their own batch-norm statistics
        score_real, score_fake = D(real).float(), D(fake).float()
    d_loss = (losses.paired if loss == "paired" else losses.bce_d)(score_real, score_fake)
    if gamma:  # an eighth of each kind is enough
        some = torch.cat([real[::8], fake[::8].float()])
        d_loss = d_loss + gamma * losses.zero_centred_penalty(D, some)
    opt.zero_grad()
    d_loss.backward()
    opt.step()
    return dict(d_loss=d_loss, d_real=score_real.sigmoid().mean(), d_fake=score_fake.sigmoid().mean())


def g_step(D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor,
           loss: str = "bce", autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update G by its images fake = G(z), still attached to it; real ones are for pairs only.

    d_fake_updated: the mean of D(G(z)) after D's update.
    """
    with frozen(D), autocast():
        score = D(fake).float()
        g_loss = losses.paired(score, D(real).float()) if loss == "paired" else losses.bce_g(score)
    opt.zero_grad()
    g_loss.backward()
    opt.step()
    return dict(g_loss=g_loss, d_fake_updated=score.sigmoid().mean())


# ---------------------------------------------------------------------- pictures and shares

def print_shares(scores: dict[str, dict]) -> None:
    """The share of each digit among the samples, which shows a mode collapse."""
    print("\nshare of each digit, %")
    for name, row in scores.items():
        print(f"{name:<20}" + "".join(f"{100 * share:7.1f}" for share in row["histogram"][0]))



@torch.no_grad()
def save_pictures(ema: Average, data: Data, cfg: Config, folder: Path, device: torch.device,
                  title: str) -> None:
    """Grids: samples, real beside generated, interpolation and extrapolation between two z."""
    g = torch.Generator().manual_seed(cfg.seed)
    fake = ema(torch.randn(100, cfg.latent_dim, generator=g).to(device)).cpu()
    save_grid(folder / "samples.png", fake, title, nrow=10)
    if len(data.images):
        real, _ = data.training_sample(40, g)
        save_grid(folder / "real_beside_generated.png", torch.cat([real, fake[:40]]),
                  f"{title}: four lines of training images, four of generated ones", nrow=10)
    # z1 + i/9 (z2 - z1) for i = 0 … 9, then for i = -5 … 14
    a, b = torch.randn(2, cfg.pairs, 1, cfg.latent_dim, generator=g)
    for name, first, last in (("interpolation", 0, 9), ("extrapolation", -5, 14)):
        z = torch.lerp(a, b, torch.arange(first, last + 1)[:, None] / 9)  # [pairs, last - first + 1, latent]
        save_grid(folder / f"{name}.png", ema(z.flatten(0, 1).to(device)),
                  f"{title}: z1 + i/9 (z2 - z1), i = {first} to {last}, a pair per line", nrow=z.shape[1])


# ---------------------------------------------------------------------- training

def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_digits, 32)
    batches = Batches(data, cfg.batch_size, cfg.seed, device)

    torch.manual_seed(cfg.seed)
    G = Generator(cfg.net, cfg.latent_dim, cfg.hidden_dim)
    D = Discriminator(cfg.net, cfg.hidden_dim, cfg.d_norm)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = Average(G, cfg.ema)  # what is sampled and scored
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.track(data, G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    judge = evaluator.get_judge(cfg, data, device) if run.wants_scores else None
    inception = evaluator.get_inception(cfg.fid_weights, device) if judge else None

    title = run.title(data, cfg.net, f"latent {cfg.latent_dim}", f"hidden {cfg.hidden_dim}")
    fixed = torch.randn(64, cfg.latent_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(device)
    # best.pt is chosen by the distance to training images: test images are for the final scores only
    validation = judge and judge.moments(data.validation_images())

    def sample(n: int, g: torch.Generator) -> tuple[torch.Tensor, None]:
        return ema(torch.randn(n, cfg.latent_dim, generator=g).to(device)), None

    for step in run.steps():
        real, _ = batches(step - 1)
        with run.autocast():
            fake = G(torch.randn(len(real), cfg.latent_dim, device=device))
        run.record(**d_step(D, opt_d, real, fake, cfg.loss, cfg.gamma, run.autocast))
        run.record(**g_step(D, opt_g, real, fake, cfg.loss, run.autocast))
        ema.update(step)

        if run.due("sample"):
            run.picture(ema(fixed), title)
        if judge and run.due("eval"):
            found = evaluator.score(sample, judge, cfg.eval_images, 1, cfg.seed, real=validation)
            fd, tv = found["FD (judge)"][0], found["TV"][0]
            run.score(best=-fd, fd_judge=fd, tv_digits=tv)

    # the scores of both checkpoints; summary and pictures are of last.pt
    options = dict(n=cfg.eval_images, draws=cfg.eval_draws, seed=cfg.seed + 1)
    if judge:  # other z than best.pt was chosen with
        test = judge.moments(data.test_images)
        scores = {"training images": evaluator.score(data.training_sample, judge, real=test, **options)}
    for name, step in run.checkpoints("best", "last"):
        if judge:
            scores[name] = evaluator.score(sample, judge, real=test, **options) | {"step": step}
            if inception:
                scores[name]["FID"] = evaluator.score_fid(sample, inception, data.test_images, **options)
    if cfg.to:
        save_images(sample, cfg)
    elif run.wants_pictures:
        save_pictures(ema, data, cfg, run.folder, device, f"{title}, step {step}")
    if judge:
        evaluator.report(run, data, judge, scores, ["FD (judge)", "TV", "FID"])
        print_shares(scores)


if __name__ == "__main__":
    launch(main, Config, QUICK)
