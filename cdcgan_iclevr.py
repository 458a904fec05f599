"""Concat-conditioned DCGAN on i-CLEVR: images of one to three requested objects.

DCGAN: Radford et al. 2016; conditions as inputs of both networks: Mirza & Osindero 2014. --recipe r3gan
learns the labels far faster: G draws each object by itself, D has projection (Miyato & Koyama 2018) and no
norm, the loss is the relativistic pairing loss with R1 and R2 penalties (Huang et al. 2024), and there is an
auxiliary classifier (Odena et al. 2017). sngan_iclevr.py has the same data, scores and sample grids. Whole
images are squeezed to a square: cropped, as in the reference report, they would lack objects of their labels.

    python cdcgan_iclevr.py --quick                      # recipe r3gan, minutes on two CPU cores
    python cdcgan_iclevr.py                              # the paper's recipe, 700 epochs, one GPU
    python cdcgan_iclevr.py --smooth-labels              # or --flip-labels 0.05, --d-cond projection
    python cdcgan_iclevr.py --resume runs/cdcgan_iclevr  # continue; --sample and --eval take a run too

Results, with commands and hardware: results/README.md.
"""
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import evaluator
from common import blocks, losses
from common.blocks import EMA, autocast, init_dcgan, no_param_grads
from common.datasets import Batches, label_sets, load_iclevr
from common.files import UserError
from harness import dist
from harness.cli import Settings
from harness.pictures import names_of, save_scenes
from harness.run import Run, launch


@dataclass
class Config(Settings):
    recipe: Literal["paper", "r3gan"] = "paper"  # method; r3gan learns the labels far faster
    iters: int = 98_000  # iterations; one is a step of D and one of G; 140 are an epoch of i-CLEVR
    batch_size: int = 128  # images per step
    lr_g: float = 2e-4  # Adam's learning rate for G
    lr_d: float = 1e-4  # Adam's learning rate for D; with equal rates D wins, says the reference report
    halve_every: int = 50  # halve both learning rates every this many epochs; 0: never
    z_dim: int = 100  # dimensions of the latent z ~ N(0, I)
    ch: int = 64  # width: feature maps of the layers nearest the image
    image_size: Literal[32, 64, 128] = 64  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (data/iclevr if it exists, else synthetic), synthetic, or the folder of i-CLEVR
    n_scenes: int = 6003  # synthetic scenes, of three images each
    eval_draws: int = 10  # draws of z averaged per score
    labels: str = ""  # with --to: n images of each set: "red cube, blue sphere; gray cylinder", or test.json
    g_cond: Literal["joint", "objects"] = "joint"  # G gets all labels beside z, or each object alone
    d_cond: Literal["plane", "projection"] = "plane"  # labels enter D as a label map, or by projection
    d_norm: Literal["batch", "none"] = "batch"  # D's norm
    loss: Literal["bce", "rpgan"] = "bce"  # minimax with G's non-saturating loss, or relativistic pairing
    gamma: float = 0.0  # γ of R1 and R2, penalties on D's gradients at real and generated images
    aux_weight: float = 0.0  # weight of an auxiliary classifier's cross-entropy, in both losses
    smooth_labels: bool = False  # D's targets: U(0.8, 1.2) for real images, U(0, 0.2) for generated ones
    flip_labels: float = 0.0  # share of images whose real/fake target is swapped for D
    augment: float = 0.0  # shift D's images at random by up to this share of their size; 0: no
    beta1: float = 0.5  # Adam's β1, for both networks
    beta2: float = 0.999  # Adam's β2
    lr_decay_from: float = 0.0  # iteration (below 1: share of --iters) from which rates fall to 0; 0: never

    def __post_init__(self):
        super().__post_init__()
        if self.loss != "bce" and (self.smooth_labels or self.flip_labels):
            raise UserError("--smooth-labels and --flip-labels are for --loss bce: pairs have no targets")


RECIPES = {
    "paper": {},
    "r3gan": dict(loss="rpgan", g_cond="objects", d_cond="projection", d_norm="none", gamma=0.25,
                  aux_weight=5.0, batch_size=32, z_dim=24, lr_g=8e-4, lr_d=8e-4, halve_every=0,
                  lr_decay_from=0.5, beta1=0.0, beta2=0.99, ema=0.999, augment=0.0625),
}
QUICK = dict(recipe="r3gan", iters=2500, batch_size=16, ch=16, n_scenes=4000, judge_width=16,
             lr_g=1.5e-3, lr_d=1.5e-3,  # narrow layers bear higher rates than wide ones
             log_every=50, sample_every=125, eval_every=1250)


# ---------------------------------------------------------------------- networks
def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at half the image's size, a quarter, … down to 4×4; at 64: 1, 2, 4, 8 times ch."""
    return [2**k * ch for k in range((image_size // 4).bit_length() - 1)]


class Generator(nn.Module):
    """z [B, z_dim], labels [B, 3] → images [B, 3, S, S] in [-1, 1]; the labels are concatenated to z. cond
    "objects": each object is drawn up to 8×8 by itself, of its label and a third of z, whose first number
    draws which is first (in the middle, in i-CLEVR), second and third; at each place one covers the others.
    """

    def __init__(self, n_classes: int, z_dim: int, ch: int, image_size: int, cond: str):
        super().__init__()
        self.n_classes, self.cond, w = n_classes, cond, widths(ch, image_size)[::-1]
        dims, out = (z_dim + n_classes, w[1]) if cond == "joint" else (z_dim // 3 + n_classes + 4, w[1] + 1)

        def up(i: int, o: int, stride: int = 2, padding: int = 1) -> nn.Module:
            return nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False)
        self.first = nn.Sequential(up(dims, w[0], 1, 0), nn.BatchNorm2d(w[0]), nn.ReLU(),  # [B, 8·ch, 4, 4]
                                   up(w[0], out))  # [B, 4·ch, 8, 8], of objects [3·B, 4·ch + 1, 8, 8]
        ups = [(nn.BatchNorm2d(i), nn.ReLU(), up(i, o)) for i, o in pairwise(w[1:])]
        self.layers = nn.Sequential(*(layer for layers in ups for layer in layers),
                                    nn.BatchNorm2d(ch), nn.ReLU(),  # [B, 2·ch, 16, 16], [B, ch, 32, 32]
                                    nn.ConvTranspose2d(ch, 3, 4, 2, 1), nn.Tanh())  # [B, 3, 64, 64]
        init_dcgan(self)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if self.cond == "joint":
            y = blocks.multi_hot(labels, self.n_classes)
            return self.layers(self.first(torch.cat([z, y], 1)[..., None, None]))
        z, here = z[:, :3 * (z.shape[1] // 3)].unflatten(1, (3, -1)), labels < self.n_classes
        rank = z[..., 0].masked_fill(~here, -torch.inf).argsort(1, descending=True).argsort(1)  # [B, 3]
        y = [torch.eye(n, device=z.device)[ids] for n, ids in ((self.n_classes + 1, labels), (3, rank))]
        h = self.first(torch.cat([z, *y], 2).flatten(0, 1)[..., None, None]).unflatten(0, (-1, 3))
        front = h[:, :, :1].masked_fill(~here[..., None, None, None], -torch.inf).softmax(1)
        return self.layers((front * h[:, :, 1:]).sum(1))


class Discriminator(nn.Module):
    """images [B, 3, S, S], labels [B, 3] → logits [B], real or generated; the sigmoid is in the losses.
    classify(images) → logits [B, n_classes] of an auxiliary classifier, which shares nothing with the rest.

    cond "plane", as in the reference report: a linear layer makes a label map [B, 1, S, S] of the labels, the
    image's fourth channel; "projection": ⟨V y, h⟩ is added to the logits (Miyato & Koyama 2018, eq. 3).
    """

    def __init__(self, n_classes: int, ch: int, image_size: int, cond: str, norm: str, classifier: bool):
        super().__init__()
        w = widths(ch, image_size)
        self.n_classes, self.plane = n_classes, None
        if cond == "plane":
            self.plane = nn.Sequential(nn.Linear(n_classes, image_size**2),
                                       nn.Unflatten(1, (1, image_size, image_size)))
        else:
            self.embed = nn.Linear(n_classes, w[-1] * 4 * 4, bias=False)

        def down(i: int, o: int) -> list[nn.Module]:
            if norm == "none":
                return [nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2)]
            return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
        layers = [layer for i, o in pairwise(w) for layer in down(i, o)]
        self.layers = nn.Sequential(nn.Conv2d(4 if self.plane else 3, ch, 4, 2, 1), nn.LeakyReLU(0.2),
                                    *layers)  # [B, ch, 32, 32], [B, 2·ch, 16, 16], …, [B, 8·ch, 4, 4]
        self.last = nn.Conv2d(w[-1], 1, 4)
        init_dcgan(self)
        self.classify = blocks.LocalClassifier(n_classes, ch, image_size) if classifier else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = blocks.multi_hot(labels, self.n_classes)
        h = self.layers(torch.cat([x, self.plane(y)], 1) if self.plane else x)
        score = self.last(h).flatten()
        if not self.plane:
            score = score + (self.embed(y).float() * h.flatten(1)).sum(1)
        return score


# ---------------------------------------------------------------------- one step of D, one of G
def targets(cfg: Config, n: int, device: torch.device) -> Tensor:
    """D's targets for n real images (row 0) and n generated ones (row 1), [2, n]."""
    target = torch.stack([torch.ones(n, device=device), torch.zeros(n, device=device)])
    if cfg.smooth_labels:
        noise = torch.rand(2, n, device=device)
        target = torch.stack([0.8 + 0.4 * noise[0], 0.2 * noise[1]])
    if cfg.flip_labels:
        target = torch.where(torch.rand(2, n, device=device) < cfg.flip_labels, target.flip(0), target)
    return target


def d_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, y: Tensor, cfg: Config) -> dict:
    """Update D with real and generated images [B, 3, S, S] of the same labels [B, 3].

    Reads cfg.loss, smooth_labels, flip_labels, gamma, aux_weight, precision.
    """
    aux = nothing = gp = real.new_zeros(())
    with autocast(real, cfg.precision):
        # two passes, because real and fake images each need their own batch-norm statistics
        score_real, score_fake = D(real, y), D(fake, y)
        if cfg.aux_weight:
            aux = losses.aux_classification_loss(D.classify(real), y)
            # it is to find nothing in generated images, else mere specks please it; 0 and 1 teach less
            nothing = 0.3 * F.softplus(D.classify(fake)).mean()
    score_real, score_fake = score_real.float(), score_fake.float()
    if cfg.gamma:  # an unbiased estimate of the penalty from an eighth of the batch, at an eighth of the cost
        y_some = y[::8].repeat(2, 1)
        gp = losses.r1r2_penalty(lambda x: D(x, y_some), torch.cat([real[::8], fake[::8]]))
    if cfg.loss != "bce":
        loss = losses.rpgan(score_real, score_fake)
    else:
        target_real, target_fake = targets(cfg, len(real), real.device)
        loss = (F.binary_cross_entropy_with_logits(score_real, target_real)
                + F.binary_cross_entropy_with_logits(score_fake, target_fake))
    loss = loss + cfg.gamma * gp + cfg.aux_weight * (aux + nothing)
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(d_loss=loss, d_real=score_real.sigmoid().mean(), d_fake=score_fake.sigmoid().mean(),
                penalty=gp, aux_real=aux)


def g_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, y: Tensor, cfg: Config) -> dict:
    """Update G by its images fake = G(z, y), still attached to it. Reads cfg.loss, aux_weight, precision.

    Real images are used only by the relativistic loss. d_fake_updated: the mean of D(G(z, y)) after D's step.
    """
    aux = real.new_zeros(())
    with no_param_grads(D), autocast(real, cfg.precision):
        score = D(fake, y).float()
        score_real = D(real, y).float() if cfg.loss != "bce" else None
        if cfg.aux_weight:
            aux = losses.aux_classification_loss(D.classify(fake), y)
    loss = losses.nonsaturating_g(score) if cfg.loss == "bce" else losses.rpgan(score, score_real)
    loss = loss + cfg.aux_weight * aux
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(g_loss=loss, d_fake_updated=score.sigmoid().mean(), aux_fake=aux)


# ---------------------------------------------------------------------- training
def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_iclevr)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size, cfg.g_cond)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_cond, cfg.d_norm,
                      classifier=cfg.aux_weight > 0)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = EMA(G, cfg.ema)  # is sampled and scored
    opt_g = Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.register(data, f"ch {cfg.ch}", G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    scorer = evaluator.get_scorer(run, data)
    requested = data.test_label_sets["test"]
    fixed = torch.randn(len(requested), cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))

    def sample(n: int, g: torch.Generator, y: Tensor) -> tuple[Tensor, Tensor]:
        return ema(torch.randn(n, cfg.z_dim, generator=g), y), y

    for step in run.steps():
        share = blocks.linear_decay(step, cfg.iters, cfg.lr_decay_from)
        if cfg.halve_every:
            share *= 0.5 ** ((step - 1) // batches.per_epoch // cfg.halve_every)
        opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * share, cfg.lr_d * share
        real, y = batches(step - 1)
        with autocast(real, cfg.precision):
            fake = G(torch.randn(len(real), cfg.z_dim, device=device), y)
        real, fake = (blocks.random_translate(x, cfg.augment) for x in (real, fake))  # for D
        run.log(**d_step(D, opt_d, real, fake.detach(), y, cfg))
        run.log(**g_step(D, opt_g, real, fake, y, cfg))
        ema.update(step)

        if run.is_due("sample"):
            run.log_images(ema(fixed, requested), captions=names_of(requested, data.classes))
        if scorer and run.is_due("eval"):
            run.log_scores(**scorer.validate(sample))

    evaluator.finish(run, data, scorer, sample, lambda: save_scenes(sample, data, run),
                     labels=label_sets(cfg.labels, data, cfg.n))


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
