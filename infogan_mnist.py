"""InfoGAN on MNIST: codes that learn digit, slant and stroke width without labels (Chen et al. 2016).

--recipe robust adds noise to all that D sees, and lets Q read the category from images whose stroke width,
slant, size and place are changed at random, so that it can't be one of these. Results: results/README.md.

    python infogan_mnist.py --quick                          # recipe robust, minutes on two CPU cores
    python infogan_mnist.py --iters 70000                    # the paper's recipe at 64×64, one GPU
"""
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import evaluator
from common import losses
from common.blocks import EMA, autocast, init_dcgan, no_param_grads
from common.datasets import Batches, Data, load_digits
from common.files import UserError, reading
from harness import dist
from harness.cli import Settings
from harness.pictures import save_grid
from harness.run import Run, launch
from synthetic.measures import category_digits, code_effects, match


@dataclass
class Config(Settings):
    recipe: Literal["paper", "robust"] = "paper"  # method; robust: noise for D, changed images for Q
    iters: int = 70_000  # iterations, 150 epochs; one is a step of D and one of G and Q
    batch_size: int = 128  # images per step
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
    category: int = 0  # category shown in category_K_code_C.png
    digit: Literal[("any", *"0123456789")] = "any"  # with --to: only the category that is this digit
    n_categories: int = 10  # values of the categorical code, a one-hot vector
    n_continuous: int = 2  # continuous codes, each U(-1, 1)
    q_weight: float = 0.1  # weight of the continuous codes' negative log-likelihood
    noise: float = 0.0  # standard deviation of the noise on all images that D and Q see, at the start
    noise_iters: int = 5000  # iterations in which the noise falls to 0
    augment: float = 0.0  # strength of the changes to slant, strokes … of images whose category Q reads

    def __post_init__(self):
        super().__post_init__()
        if self.category >= self.n_categories:
            raise UserError(f"--category {self.category} must be below --n-categories {self.n_categories}")


RECIPES = {
    "paper": {},
    "robust": dict(noise=2.0, noise_iters=6000, augment=1.0, ema=0.99),
}
QUICK = dict(recipe="robust", iters=9000, batch_size=64, ch=32, image_size=32, eval_images=2000,
             log_every=100, sample_every=300, eval_every=3000, save_every=1000)


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
        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
        super().__init__(nn.Conv2d(1, ch, 4, 2, 1, bias=False), nn.LeakyReLU(0.2),  # [B, ch, 32, 32]
                         *(layer for i, o in pairwise(widths(ch, image_size)) for layer in down(i, o)))


class QHead(nn.Module):
    """[B, features, 4, 4] → Q's estimate of the codes: logits [B, K], means and variances [B, C]."""

    def __init__(self, features: int, n_categories: int, n_continuous: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(features * 4 * 4, 100), nn.ReLU(),
                                  nn.Linear(100, 10), nn.Unflatten(1, (10, 1, 1)))
        self.category = nn.Conv2d(10, n_categories, 1)
        self.mean = nn.Conv2d(10, n_continuous, 1)
        self.variance = nn.Conv2d(10, n_continuous, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(h)
        # at least 0.01, a standard deviation of a tenth: otherwise the likelihood grows without bound
        variance = F.softplus(self.variance(h).float()) + 0.01
        return self.category(h).flatten(1).float(), self.mean(h).flatten(1).float(), variance.flatten(1)


# ---------------------------------------------------------------------- one step of D, one of G and Q
def join(z: Tensor, category: Tensor, continuous: Tensor, n_categories: int) -> Tensor:
    """G's input [B, z_dim + K + C]: noise, the category [B] as a one-hot vector, continuous codes [B, C]."""
    one_hot = category[:, None] == torch.arange(n_categories, device=z.device)
    return torch.cat([z, one_hot.to(z.dtype), continuous], 1)


def q_losses(estimate: tuple, category: Tensor, continuous: Tensor) -> tuple[Tensor, Tensor]:
    """Negative lower bounds of the codes' mutual information with images (Chen et al. 2016, eq. 5): the
    category's [B] cross-entropy; the continuous codes' [B, C] mean Gaussian negative log-likelihood.
    """
    logits, mean, variance = estimate
    nll = 0.5 * ((continuous - mean).square() / variance + variance.log() + math.log(2 * math.pi))
    return F.cross_entropy(logits, category), nll.mean()


def instance_noise(x: Tensor, std: float) -> Tensor:
    """Add noise to images for D (Sønderby et al. 2017), which then can't win by details that G lacks."""
    return x + std * torch.randn_like(x) if std else x


def random_affine(images: Tensor, strength: float) -> Tensor:
    """Give each image [B, 1, S, S] another stroke width, slant, size and place; 0: unchanged. A category that
    is read from such images can't be any of these, which are left to the continuous codes.
    """
    if not strength:
        return images
    images, device = images.float(), images.device
    thick, thin = F.max_pool2d(images, 3, 1, 1), -F.max_pool2d(-images, 3, 1, 1)
    amount = strength * uniform(len(images), 1, 1, 1, device=device)
    images = images + amount.relu() * (thick - images) + (-amount).relu() * (thin - images)
    # x' = (1 ± 0.2) x ± 0.5 y ± 0.12, y' = ± 0.3 x + (1 ± 0.2) y ± 0.12, in half widths of the image
    a, b, c, d, e, f = (strength * uniform(len(images), 6, device=device)).unbind(1)
    affine = torch.stack([1 + 0.2 * a, 0.5 * b, 0.12 * c, 0.3 * d, 1 + 0.2 * e, 0.12 * f], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # black comes in from outside


def d_step(body: nn.Module, D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, cfg: Config) -> dict:
    """Update the body and D's head with real and generated images [B, 1, S, S]. Reads cfg.precision."""
    with autocast(real, cfg.precision):
        # two passes, because real and fake images each need their own batch-norm statistics
        score_real, score_fake = D(body(real)).float(), D(body(fake)).float()
    loss = losses.minimax_d(score_real, score_fake)
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(d_loss=loss, d_real=score_real.sigmoid().mean(), d_fake=score_fake.sigmoid().mean())


def g_step(body: nn.Module, D: nn.Module, Q: nn.Module, opt: Optimizer, fake: Tensor, changed: Tensor,
           category: Tensor, continuous: Tensor, cfg: Config) -> dict:
    """Update G and Q's head by images fake = G(codes), still attached to G. Q reads the category from
    `changed`, these images after random_affine. Reads cfg.q_weight, augment, precision.
    """
    with no_param_grads(body, D), autocast(fake, cfg.precision):
        h = body(fake)
        score, (logits, mean, variance) = D(h).float(), Q(h)
        if cfg.augment:
            logits = Q(body(changed))[0]
    loss = losses.nonsaturating_g(score)
    q_category, q_continuous = q_losses((logits, mean, variance), category, continuous)
    opt.zero_grad()
    (loss + q_category + cfg.q_weight * q_continuous).backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(g_loss=loss, q_category=q_category, q_continuous=q_continuous,
                d_fake_updated=score.sigmoid().mean())


# ---------------------------------------------------------------------- codes, sample grids
def uniform(*shape: int, g: torch.Generator | None = None, device=None) -> Tensor:
    """U(-1, 1)"""
    return torch.rand(*shape, generator=g, device=device) * 2 - 1


def grid_codes(cfg: Config, g: torch.Generator, rows: int, varied: int | None) -> tuple:
    """Noise, categories and continuous codes of a grid, row by row, with one category per column. The code
    `varied` goes from -1 to 1 down the rows, the others being 0; None: all are random.
    """
    k = cfg.n_categories
    category = torch.arange(k).repeat(rows)
    if varied is None:
        return uniform(rows * k, cfg.z_dim, g=g), category, uniform(rows * k, cfg.n_continuous, g=g)
    continuous = torch.zeros(rows * k, cfg.n_continuous)
    continuous[:, varied] = torch.linspace(-1, 1, rows).repeat_interleave(k)
    return uniform(k, cfg.z_dim, g=g).repeat(rows, 1), category, continuous


def save_pictures(generate: Callable[..., Tensor], data: Data, run: Run) -> None:
    """Save grids of generate(z, category, continuous): samples, each code varied, real above generated."""
    cfg, folder, g = run.cfg, run.folder, torch.Generator().manual_seed(run.cfg.seed)
    title, k = f"{run.title}: one category per column", cfg.n_categories
    save_grid(folder / "samples.png", generate(*grid_codes(cfg, g, 10, None)), title, k)
    for c in range(cfg.n_continuous):
        save_grid(folder / f"code_{c + 1}.png", generate(*grid_codes(cfg, g, 10, c)),
                  f"{title}, code {c + 1} from -1 to 1 down the rows", k)
        z = uniform(8, cfg.z_dim, g=g).repeat_interleave(21, 0)
        continuous = torch.zeros(len(z), cfg.n_continuous)
        continuous[:, c] = torch.linspace(-2, 2, 21).repeat(8)
        save_grid(folder / f"category_{cfg.category}_code_{c + 1}.png",
                  generate(z, torch.full((len(z),), cfg.category), continuous), nrow=21,
                  title=f"{run.title}: category {cfg.category}, code {c + 1} from -2 to 2 (trained: -1 to 1)")
    if len(data.images):
        pair = torch.cat([data.random_images(4 * k, g), generate(*grid_codes(cfg, g, 4, None)).cpu()])
        save_grid(folder / "real_beside_generated.png", pair,
                  f"{run.title}: four rows of training images, four of generated ones", k)


def matched_digits(run: Run) -> list[int]:
    """The digit of each category by scores.json; -1: none. UserError where --digit is none of them."""
    path, digits = run.folder / "scores.json", [-1] * run.cfg.n_categories
    if run.cfg.digit != "any" or path.exists():
        with reading(path, "the scores of this run, which --eval writes"):
            digits, _ = match(torch.tensor(json.loads(path.read_bytes())["last"]["shares"][0]))
    if run.cfg.digit not in ("any", *map(str, digits)):
        raise UserError(f"--digit {run.cfg.digit}: no category of {run.folder} is this digit")
    return digits


def score_codes(cfg: Config, generate: Callable, judge: evaluator.Judge, draws: int, seed: int) -> dict:
    """Scores of the codes, (mean, std) over draws; "shares" [K, 10] is as match takes it."""
    sizes = cfg.z_dim, cfg.n_categories, cfg.n_continuous
    digits = partial(category_digits, generate, judge, cfg.eval_images, *sizes)
    effects = partial(code_effects, generate, *sizes)
    return evaluator.over_draws(digits, draws, seed) | evaluator.over_draws(effects, draws, seed)


# ---------------------------------------------------------------------- training
def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    if cfg.deterministic and cfg.augment and device.type == "cuda":
        raise UserError("--deterministic: grid_sample's gradient can't be on CUDA: give --augment 0, too")
    data = run.get_data(load_digits, cfg.image_size)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    features = widths(cfg.ch, cfg.image_size)[-1]
    G = Generator(cfg.z_dim + cfg.n_categories + cfg.n_continuous, cfg.ch, cfg.image_size)
    body, Q = Body(cfg.ch, cfg.image_size), QHead(features, cfg.n_categories, cfg.n_continuous)
    D = nn.Sequential(nn.Conv2d(features, 1, 4, bias=False), nn.Flatten())  # logits [B, 1]
    for net in (G, body, D, Q):
        init_dcgan(net).to(device, memory_format=torch.channels_last)
    ema = EMA(G, cfg.ema)  # is sampled and scored
    opt_g = Adam([*G.parameters(), *Q.parameters()], cfg.lr_g, betas=(0.5, 0.999), fused=True)
    opt_d = Adam([*body.parameters(), *D.parameters()], cfg.lr_d, betas=(0.5, 0.999), fused=True)
    run.register(data, f"ch {cfg.ch}", G=G, body=body, D=D, Q=Q, ema=ema, opt_g=opt_g, opt_d=opt_d)
    scorer = evaluator.get_scorer(run, data)
    digits = matched_digits(run) if cfg.to else [-1] * cfg.n_categories
    allowed = torch.tensor([k for k, digit in enumerate(digits) if cfg.digit in ("any", str(digit))])

    def generate(z: Tensor, category: Tensor, continuous: Tensor) -> Tensor:
        return ema(join(z, category, continuous, cfg.n_categories))

    def sample(n: int, g: torch.Generator) -> tuple[Tensor, Tensor | None]:
        category = allowed[torch.randint(len(allowed), (n,), generator=g)]
        z, codes = uniform(n, cfg.z_dim, g=g), uniform(n, cfg.n_continuous, g=g)
        return generate(z, category, codes), torch.cat([category[:, None], codes], 1) if cfg.to else None

    for step in run.steps():
        real, _ = batches(step - 1)
        z = uniform(len(real), cfg.z_dim, device=device)
        category = torch.randint(cfg.n_categories, (len(real),), device=device)
        continuous = uniform(len(real), cfg.n_continuous, device=device)
        with autocast(real, cfg.precision):
            fake = G(join(z, category, continuous, cfg.n_categories))
        std = cfg.noise * max(0, 1 - step / cfg.noise_iters)
        run.log(**d_step(body, D, opt_d, instance_noise(real, std), instance_noise(fake.detach(), std), cfg))
        noisy = instance_noise(fake, std)  # fresh noise, which D has not just been trained on
        changed = instance_noise(random_affine(fake, cfg.augment), std)
        run.log(**g_step(body, D, Q, opt_g, noisy, changed, category, continuous, cfg))
        ema.update(step)

        if run.is_due("sample"):
            codes = grid_codes(cfg, torch.Generator().manual_seed(cfg.seed), 10, None)
            run.log_images(generate(*codes), ": one category per column", nrow=cfg.n_categories)
        if scorer and run.is_due("eval"):
            codes = score_codes(cfg, generate, scorer.judge, 1, cfg.seed)
            run.log_scores(**scorer.validate(sample), accuracy_code=codes["code → digit"][0])

    evaluator.finish(run, data, scorer, sample, lambda: save_pictures(generate, data, run), "last",
                     columns=["code → digit", "a code ~ slant", "a code ~ width", "FD (judge)", "FID"],
                     more=lambda: score_codes(cfg, generate, scorer.judge, cfg.eval_draws, cfg.seed + 1),
                     describe=lambda found: [{"category": int(k), "digit": digits[int(k)], "codes": codes}
                                             for k, *codes in found.tolist()])


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
