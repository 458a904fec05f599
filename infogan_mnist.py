"""InfoGAN on MNIST: codes that learn digit, slant and stroke width without labels (Chen et al. 2016).

    python infogan_mnist.py --quick                          # minutes on two CPU cores
    python infogan_mnist.py --iters 70000                    # 150 epochs at 64×64, one GPU
    python infogan_mnist.py --resume runs/infogan_mnist      # continue; --sample and --eval take a run too

Results, with commands and hardware: results/README.md.
"""
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import evaluator
from common import losses
from common.blocks import Average, frozen, init_dcgan
from common.cli import Settings
from common.datasets import Batches, Data, load_digits
from common.errors import UserError, reading
from common.pictures import save_grid, save_images
from common.run import Run, launch
from synthetic.measures import category_digits, code_effects, match


@dataclass
class Config(Settings):
    iters: int = 70_000  # iterations, 150 epochs; one is a step of D and one of G and Q
    batch_size: int = 128  # images a step
    lr_g: float = 1e-3  # Adam's learning rate for G and Q
    lr_d: float = 2e-4  # Adam's learning rate for D and the shared body
    z_dim: int = 62  # dimensions of the noise z ~ U(-1, 1)
    ch: int = 64  # width: feature maps of the layers nearest the image
    image_size: Literal[32, 64] = 64  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (MNIST if available, else synthetic), mnist, synthetic, or a folder of MNIST
    n_synthetic: int = 60_000  # synthetic digits to train on
    eval_images: int = 10_000  # generated images per draw that are scored
    eval_draws: int = 3  # draws of z averaged per score
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    category: int = 0  # the one that category_K_code_C.png shows
    digit: Literal[("any", *"0123456789")] = "any"  # with --to: only the category that is this digit
    n_categories: int = 10  # values of the categorical code, a one-hot vector
    n_continuous: int = 2  # continuous codes, each U(-1, 1)
    q_weight: float = 0.1  # weight of the continuous codes' negative log-likelihood
    noise: float = 0.0  # standard deviation of the noise on all images that D and Q see, at the start
    noise_iters: int = 5000  # iterations in which the noise falls to 0
    augment: float = 0.0  # strength of the changes to slant, strokes … of images whose category Q reads

    def __post_init__(self):
        super().__post_init__()
        if self.n_categories < 2 or self.category >= self.n_categories:
            raise UserError(f"--n-categories {self.n_categories} must be at least 2, and --category "
                            f"{self.category} below it")


QUICK = dict(iters=9000, batch_size=64, ch=32, image_size=32, ema=0.99, noise=2.0, noise_iters=6000,
             augment=1.0, log_every=100, sample_every=300, eval_every=3000, save_every=1000, eval_images=2000)


# ---------------------------------------------------------------------- networks

def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at half the image's size, a quarter, … down to 4×4; at 64: 1, 2, 4, 8 times ch."""
    return [2**k * ch for k in range((image_size // 4).bit_length() - 1)]


class Generator(nn.Sequential):
    """Noise, one-hot category and continuous codes [B, code] → images [B, 1, S, S] in [-1, 1]."""

    def __init__(self, code: int, ch: int, image_size: int):
        def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        w = widths(ch, image_size)[::-1]
        layers = [layer for i, o in pairwise(w) for layer in up(i, o, 2, 1)]
        super().__init__(nn.Unflatten(1, (code, 1, 1)),
                         *up(code, w[0], 1, 0),  # [B, 8·ch, 4, 4]
                         *layers,  # [B, 4·ch, 8, 8], [B, 2·ch, 16, 16], [B, ch, 32, 32]
                         nn.ConvTranspose2d(ch, 1, 4, 2, 1, bias=False), nn.Tanh())  # [B, 1, 64, 64]


class Body(nn.Sequential):
    """images [B, 1, S, S] → the features that D's and Q's heads share, [B, 8·ch, 4, 4] (at 32×32: 4·ch)."""

    def __init__(self, ch: int, image_size: int):
        act = nn.LeakyReLU(0.2)

        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), act]
        super().__init__(nn.Conv2d(1, ch, 4, 2, 1, bias=False), act,  # [B, ch, 32, 32]
                         *(layer for i, o in pairwise(widths(ch, image_size)) for layer in down(i, o)))


class DHead(nn.Sequential):
    """[B, features, 4, 4] → logits [B, 1]; the sigmoid is in the loss."""

    def __init__(self, features: int):
        super().__init__(nn.Conv2d(features, 1, 4, bias=False), nn.Flatten())


class QHead(nn.Module):
    """[B, features, 4, 4] → Q's estimate of the codes: logits [B, K], means and variances [B, C]."""

    def __init__(self, features: int, n_categories: int, n_continuous: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(features * 4 * 4, 100), nn.ReLU(),
                                  nn.Linear(100, 10), nn.Unflatten(1, (10, 1, 1)))
        self.category = nn.Conv2d(10, n_categories, 1)
        self.mean = nn.Conv2d(10, n_continuous, 1)
        self.variance = nn.Conv2d(10, n_continuous, 1)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = self.body(h)
        # at least 0.01, a standard deviation of a tenth: otherwise the likelihood grows without bound
        variance = F.softplus(self.variance(h).float()) + 0.01
        return self.category(h).flatten(1).float(), self.mean(h).flatten(1).float(), variance.flatten(1)


# ---------------------------------------------------------------------- one step of D, one of G and Q

def join(z: torch.Tensor, category: torch.Tensor, continuous: torch.Tensor,
         n_categories: int) -> torch.Tensor:
    """G's input [B, z_dim + K + C]: noise, the category [B] as a one-hot vector, continuous codes [B, C]."""
    # F.one_hot would make the host read the values
    one_hot = category[:, None] == torch.arange(n_categories, device=z.device)
    return torch.cat([z, one_hot.to(z.dtype), continuous], 1)


def q_losses(estimate: tuple, category: torch.Tensor,
             continuous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative lower bounds of the mutual information of codes and images (Chen et al. 2016, eq. 5): the
    category's [B] cross-entropy; the continuous codes' [B, C] Gaussian negative log-likelihood, their mean.
    """
    logits, mean, variance = estimate
    nll = 0.5 * ((continuous - mean).square() / variance + variance.log() + math.log(2 * math.pi))
    return F.cross_entropy(logits, category), nll.mean()


def noisy(images: torch.Tensor, std: float) -> torch.Tensor:
    """Instance noise on all that D sees (Sønderby et al. 2017): D can't win by details that G lacks."""
    return images + std * torch.randn_like(images) if std else images


def augmented(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Each of the images [B, 1, S, S] with a stroke width, slant, size and place of its own.

    What a category says then can't be any of these: the continuous codes are left to tell them.
    """
    thick, thin = F.max_pool2d(images, 3, 1, 1), -F.max_pool2d(-images, 3, 1, 1)
    amount = strength * uniform(len(images), 1, 1, 1, device=images.device)
    images = images + amount.relu() * (thick - images) + (-amount).relu() * (thin - images)
    # x' = (1 ± 0.2) x ± 0.5 y ± 0.12, y' = ± 0.3 x + (1 ± 0.2) y ± 0.12, in half widths of the image
    most = strength * torch.tensor([[0.2, 0.5, 0.12], [0.3, 0.2, 0.12]], device=images.device)
    affine = torch.eye(2, 3, device=images.device) + most * uniform(len(images), 2, 3, device=images.device)
    with torch.autocast(images.device.type, enabled=False):  # in bf16 points would be 0.1 pixels off
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in from outside is black


def d_step(body: nn.Module, D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor,
           fake: torch.Tensor, noise: float = 0.0, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update the body and D's head with real and generated images [B, 1, S, S]."""
    with autocast():
        # two passes, because real and fake images each need their own batch-norm statistics
        score_real, score_fake = (D(body(noisy(x, noise))).float() for x in (real, fake.detach()))
    loss = losses.bce_d(score_real, score_fake)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(d_loss=loss, d_real=score_real.sigmoid().mean(), d_fake=score_fake.sigmoid().mean())


def gq_step(body: nn.Module, D: nn.Module, Q: nn.Module, opt: torch.optim.Optimizer, fake: torch.Tensor,
            category: torch.Tensor, continuous: torch.Tensor, q_weight: float = 0.1, noise: float = 0.0,
            augment: float = 0.0, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update G and Q's head by images fake = G(codes), still attached to G; only D's step trains the body."""
    with frozen(body, D), autocast():
        h = body(noisy(fake, noise))
        score, estimate = D(h).float(), Q(h)
        if augment:
            estimate = (Q(body(noisy(augmented(fake.float(), augment), noise)))[0], *estimate[1:])
    loss = losses.bce_g(score)
    q_category, q_continuous = q_losses(estimate, category, continuous)
    opt.zero_grad()
    (loss + q_category + q_weight * q_continuous).backward()
    opt.step()
    return dict(g_loss=loss, q_category=q_category, q_continuous=q_continuous,
                d_fake_updated=score.sigmoid().mean())


# ---------------------------------------------------------------------- codes, pictures

def uniform(*shape: int, g: torch.Generator | None = None, device=None) -> torch.Tensor:
    """U(-1, 1)"""
    return torch.rand(*shape, generator=g, device=device) * 2 - 1


def grid_codes(cfg: Config, g: torch.Generator, rows: int, varied: int | None) -> tuple:
    """Noise, categories and continuous codes of a grid, line by line, with one category per column.

    varied: the code that goes from -1 to 1 down the lines, the others being 0; None: all are random.
    """
    k = cfg.n_categories
    category = torch.arange(k).repeat(rows)
    if varied is None:
        return uniform(rows * k, cfg.z_dim, g=g), category, uniform(rows * k, cfg.n_continuous, g=g)
    continuous = torch.zeros(rows * k, cfg.n_continuous)
    continuous[:, varied] = torch.linspace(-1, 1, rows).repeat_interleave(k)
    return uniform(k, cfg.z_dim, g=g).repeat(rows, 1), category, continuous


def save_pictures(make: Callable[..., torch.Tensor], data: Data, run: Run, title: str) -> None:
    """Grids of make(z, category, continuous): samples, each continuous code varied, and within a category."""
    cfg, folder, g = run.cfg, run.folder, torch.Generator().manual_seed(run.cfg.seed)
    save_grid(folder / "samples.png", make(*grid_codes(cfg, g, 10, None)),
              f"{title}: one category per column, the other codes random", nrow=cfg.n_categories)
    for c in range(cfg.n_continuous):
        save_grid(folder / f"code_{c + 1}.png", make(*grid_codes(cfg, g, 10, c)), nrow=cfg.n_categories,
                  title=f"{title}: one category per column, code {c + 1} from -1 to 1 down the lines")
        # eight noises, the code in steps of a fifth, to twice the range that G was trained with
        z = uniform(8, cfg.z_dim, g=g).repeat_interleave(21, 0)
        continuous = torch.zeros(len(z), cfg.n_continuous)
        continuous[:, c] = torch.linspace(-2, 2, 21).repeat(8)
        save_grid(folder / f"category_{cfg.category}_code_{c + 1}.png",
                  make(z, torch.full((len(z),), cfg.category), continuous), nrow=21,
                  title=f"{title}: category {cfg.category}, code {c + 1} from -2 to 2 (trained: middle 11)")
    if len(data.images):
        real = data.training_sample(4 * cfg.n_categories, g)[0]
        pair = torch.cat([real, make(*grid_codes(cfg, g, 4, None)).cpu()])
        save_grid(folder / "real_beside_generated.png", pair,
                  f"{title}: four lines of training images, four of generated ones", cfg.n_categories)


def categories_of(cfg: Config, folder: Path) -> torch.Tensor:
    """The categories [K] that scores.json matches with --digit; all of them for "any". Raises UserError."""
    if cfg.digit == "any":
        return torch.arange(cfg.n_categories)
    with reading(folder / "scores.json", "the scores of this run, which --eval writes"):
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        digits, _ = match(torch.tensor(scores["last"]["shares"][0]))
        if int(cfg.digit) not in digits:
            raise ValueError(f"no category is matched with {cfg.digit}")
    return torch.tensor([k for k, digit in enumerate(digits) if digit == int(cfg.digit)])


# ---------------------------------------------------------------------- training

def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_digits, cfg.image_size)
    batches = Batches(data, cfg.batch_size, cfg.seed, device)

    torch.manual_seed(cfg.seed)
    features = widths(cfg.ch, cfg.image_size)[-1]
    G = Generator(cfg.z_dim + cfg.n_categories + cfg.n_continuous, cfg.ch, cfg.image_size)
    body, D = Body(cfg.ch, cfg.image_size), DHead(features)
    Q = QHead(features, cfg.n_categories, cfg.n_continuous)
    G, body, D, Q = (init_dcgan(net).to(device, memory_format=torch.channels_last)
                     for net in (G, body, D, Q))
    ema = Average(G, cfg.ema)  # what is sampled and scored
    opt_g = torch.optim.Adam([*G.parameters(), *Q.parameters()], cfg.lr_g, betas=(0.5, 0.999), fused=True)
    opt_d = torch.optim.Adam([*body.parameters(), *D.parameters()], cfg.lr_d, betas=(0.5, 0.999), fused=True)
    run.track(data, G=G, body=body, D=D, Q=Q, ema=ema, opt_g=opt_g, opt_d=opt_d)
    judge = evaluator.get_judge(cfg, data, device) if run.wants_scores else None
    inception = evaluator.get_inception(cfg.fid_weights, device) if judge else None

    title = run.title(data, f"ch {cfg.ch}")
    fixed = grid_codes(cfg, torch.Generator().manual_seed(cfg.seed), 10, None)
    # best.pt is chosen by the distance to training images: test images are for the final scores only
    validation = judge and judge.moments(data.validation_images())

    def make(z: torch.Tensor, category: torch.Tensor, continuous: torch.Tensor) -> torch.Tensor:
        return ema(join(z, category, continuous, cfg.n_categories).to(device))

    every = torch.arange(cfg.n_categories)

    def sample(n: int, g: torch.Generator, of: torch.Tensor = every) -> tuple[torch.Tensor, None]:
        category = of[torch.randint(len(of), (n,), generator=g)]
        return make(uniform(n, cfg.z_dim, g=g), category, uniform(n, cfg.n_continuous, g=g)), None

    sizes = cfg.z_dim, cfg.n_categories, cfg.n_continuous
    categories = partial(category_digits, make, judge, cfg.eval_images, *sizes)
    effects = partial(code_effects, make, *sizes)
    for step in run.steps():
        real, _ = batches(step - 1)
        z = uniform(len(real), cfg.z_dim, device=device)
        category = torch.randint(cfg.n_categories, (len(real),), device=device)
        continuous = uniform(len(real), cfg.n_continuous, device=device)
        with run.autocast():
            fake = G(join(z, category, continuous, cfg.n_categories))
        std = cfg.noise * max(0, 1 - step / cfg.noise_iters)
        run.record(**d_step(body, D, opt_d, real, fake, std, run.autocast))
        run.record(**gq_step(body, D, Q, opt_g, fake, category, continuous, cfg.q_weight, std, cfg.augment,
                             run.autocast))
        ema.update(step)

        if run.due("sample"):
            run.picture(make(*fixed), f"{title}: one category per column, the other codes random",
                        nrow=cfg.n_categories)
        if judge and run.due("eval"):
            found = evaluator.score(sample, judge, cfg.eval_images, 1, cfg.seed, real=validation)
            fd, codes = found["FD (judge)"][0], evaluator.over_draws(categories, 1, cfg.seed)
            run.score(best=-fd, fd_judge=fd, accuracy_code=codes["code → digit"][0])

    # the scores of both checkpoints, with other z than best.pt was chosen with
    scores, n, draws = {}, cfg.eval_images, dict(draws=cfg.eval_draws, seed=cfg.seed + 1)
    if judge:
        test = judge.moments(data.test_images)
    for name, step in run.checkpoints("best", "last"):  # summary and pictures are of last.pt
        if judge:
            row = {"step": step} | evaluator.score(sample, judge, n, real=test, **draws)
            row |= evaluator.over_draws(categories, **draws) | evaluator.over_draws(effects, **draws)
            if inception:
                row["FID"] = evaluator.score_fid(sample, inception, data.test_images, n=n, **draws)
            scores[name] = row
    if cfg.to:
        save_images(partial(sample, of=categories_of(cfg, run.folder)), cfg)
    elif run.wants_pictures:
        save_pictures(make, data, run, f"{title}, step {step}")
    if judge:
        evaluator.report(run, data, judge, scores, ["code → digit", "a code ~ slant", "a code ~ width",
                                                    "FD (judge)", "FID"])
        shares = torch.tensor(row["shares"][0])
        print("\ndigit of each category, and its share there: " + ", ".join(
            f"{digit} {shares[k, digit]:.0%}" for k, digit in enumerate(match(shares)[0]) if digit >= 0))


if __name__ == "__main__":
    launch(main, Config, QUICK)
