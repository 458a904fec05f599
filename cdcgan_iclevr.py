"""Concat-conditioned DCGAN on i-CLEVR: images of one to three requested objects.

DCGAN: Radford et al. 2016; conditions as inputs of both networks: Mirza & Osindero 2014. sngan_iclevr.py,
with spectral norm and projection, has the same data, scores and pictures. Both squeeze whole images to a
square; the write-up crops, which would cut off objects that the labels name.

    python cdcgan_iclevr.py --quick                      # minutes on two CPU cores
    python cdcgan_iclevr.py                              # the full run, 700 epochs, one GPU
    python cdcgan_iclevr.py --smooth-labels              # or --flip-labels 0.05, --d-cond projection
    python cdcgan_iclevr.py --resume runs/cdcgan_iclevr  # continue; --sample and --eval take a run too

Results, with commands and hardware: results/README.md.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import evaluator
from common import losses
from common.blocks import Average, frozen, init_dcgan, moved, multi_hot
from common.cli import Settings
from common.datasets import Batches, load_iclevr
from common.errors import UserError
from common.pictures import names_of, save_scenes
from common.run import Run, launch


@dataclass
class Config(Settings):
    iters: int = 98_000  # iterations; one is a step of D and one of G; 140 are an epoch of i-CLEVR
    batch_size: int = 128  # images a step
    lr_g: float = 2e-4  # Adam's learning rate for G
    lr_d: float = 1e-4  # Adam's learning rate for D; with equal rates D won, says the write-up
    halve_every: int = 50  # epochs after which both rates are halved, again and again; 0: never
    z_dim: int = 100  # dimensions of the latent z ~ N(0, I)
    ch: int = 64  # width: feature maps of the layers nearest the image
    image_size: Literal[32, 64, 128] = 64  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (data/iclevr if it exists, else synthetic), synthetic, or the folder of i-CLEVR
    n_scenes: int = 6003  # synthetic scenes, of three images each
    eval_draws: int = 10  # draws of z averaged per score
    labels: str = ""  # with --to: sets of objects, such as "red cube, blue sphere; gray cylinder"
    d_cond: Literal["plane", "projection"] = "plane"  # labels enter D as a fourth plane, or by projection
    smooth_labels: bool = False  # D's targets: U(0.8, 1.2) for real images, U(0, 0.2) for generated ones
    flip_labels: float = 0.0  # share of images whose real/fake target is swapped for D
    augment: float = 0.0  # mirror D's images at random, shift them by up to this share of their size; 0: no
    d_norm: Literal["batch", "none"] = "batch"  # D's norm
    loss: Literal["bce", "paired"] = "bce"  # minimax, or of pairs of a real and a generated image
    gamma: float = 0.0  # weight of the mean of R1 and R2, D's gradients at real and generated images
    aux_weight: float = 0.0  # weight of an auxiliary classifier's cross-entropy, in both losses; 0 with plane
    beta1: float = 0.5  # Adam's decay rate of the gradient's mean, for both networks
    beta2: float = 0.999  # and of its square's

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "paired" and (self.smooth_labels or self.flip_labels):
            raise UserError("--smooth-labels and --flip-labels are for --loss bce: pairs have no targets")
        if self.d_cond == "plane" and self.aux_weight:
            raise UserError("--d-cond plane needs --aux-weight 0: D's classifier would read the labels there")


QUICK = dict(iters=5000, batch_size=32, lr_g=1e-3, lr_d=1e-3, halve_every=0, ch=32, ema=0.998, n_scenes=4000,
             d_cond="projection", d_norm="none", loss="paired", gamma=0.5, aux_weight=5.0, beta1=0.0,
             beta2=0.99, log_every=50, sample_every=250, eval_every=1000, save_every=1000, judge_width=16)


# ---------------------------------------------------------------------- networks

def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at half the image's size, a quarter, … down to 4×4; at 64: 1, 2, 4, 8 times ch."""
    return [2**k * ch for k in range((image_size // 4).bit_length() - 1)]


class Generator(nn.Module):
    """z [B, z_dim], labels [B, 3] → images [B, 3, S, S] in [-1, 1]; the labels are concatenated to z."""

    def __init__(self, n_classes: int, z_dim: int, ch: int, image_size: int):
        super().__init__()
        self.n_classes, w = n_classes, widths(ch, image_size)[::-1]

        def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        layers = [layer for i, o in pairwise(w) for layer in up(i, o, 2, 1)]
        self.layers = nn.Sequential(*up(z_dim + n_classes, w[0], 1, 0),  # [B, 8·ch, 4, 4]
                                    *layers,  # [B, 4·ch, 8, 8], [B, 2·ch, 16, 16], [B, ch, 32, 32]
                                    nn.ConvTranspose2d(ch, 3, 4, 2, 1), nn.Tanh())  # [B, 3, 64, 64]
        init_dcgan(self)

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([z, multi_hot(labels, self.n_classes)], 1)[..., None, None])


class Discriminator(nn.Module):
    """images [B, 3, S, S], labels [B, 3] → logits [B], real or generated, and [B, n_classes], an auxiliary
    classifier's (Odena et al. 2017); the sigmoid is in the losses.

    cond "plane", as in the write-up: a linear layer turns the labels into a plane [B, 1, S, S], the image's
    fourth channel. "projection": no plane, and ⟨V y, h⟩ is added to the logits (Miyato & Koyama 2018, eq. 3).
    All weights, the plane's too, are initialised as in the DCGAN paper.
    """

    def __init__(self, n_classes: int, ch: int, image_size: int, cond: str, norm: str = "batch"):
        super().__init__()
        self.n_classes, self.plane, w = n_classes, None, widths(ch, image_size)
        if cond == "plane":
            self.plane = nn.Sequential(nn.Linear(n_classes, image_size**2),
                                       nn.Unflatten(1, (1, image_size, image_size)))
        else:
            self.embed = nn.Linear(n_classes, w[-1] * 4 * 4, bias=False)

        def down(i: int, o: int) -> list[nn.Module]:
            act = nn.LeakyReLU(0.2)
            if norm == "none":
                return [nn.Conv2d(i, o, 4, 2, 1), act]
            return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), act]
        layers = [layer for i, o in pairwise(w) for layer in down(i, o)]
        self.layers = nn.Sequential(nn.Conv2d(4 if self.plane else 3, ch, 4, 2, 1), nn.LeakyReLU(0.2),
                                    *layers)  # [B, ch, 32, 32], [B, 2·ch, 16, 16], …, [B, 8·ch, 4, 4]
        self.last = nn.Conv2d(w[-1], 1, 4)
        self.classify = nn.Linear(w[-1] * 4 * 4, n_classes)
        init_dcgan(self)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = multi_hot(labels, self.n_classes)
        h = self.layers(torch.cat([x, self.plane(y)], 1) if self.plane else x)
        score = self.last(h).flatten()
        if not self.plane:
            score = score + (self.embed(y) * h.flatten(1)).sum(1)
        return score, self.classify(h.flatten(1))


# ---------------------------------------------------------------------- one step of D, one of G

def targets(cfg: Config, n: int, device: torch.device) -> torch.Tensor:
    """D's targets for n real images (row 0) and n generated ones (row 1), [2, n]."""
    target = torch.stack([torch.ones(n, device=device), torch.zeros(n, device=device)])
    if cfg.smooth_labels:
        noise = torch.rand(2, n, device=device)
        target = torch.stack([0.8 + 0.4 * noise[0], 0.2 * noise[1]])
    if cfg.flip_labels:
        target = torch.where(torch.rand(2, n, device=device) < cfg.flip_labels, target.flip(0), target)
    return target


def d_step(cfg: "Config", D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor,
           labels: torch.Tensor, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update D with real and generated images [B, 3, S, S] of the same labels [B, 3]."""
    real, fake = moved(real, cfg.augment), moved(fake.detach(), cfg.augment)
    with autocast():
        # two passes, because real and fake images each need their own batch-norm statistics
        (score_real, logits), (score_fake, _) = D(real, labels), D(fake, labels)
    score_real, score_fake = score_real.float(), score_fake.float()
    aux_real, penalty = losses.auxiliary(logits, labels), torch.zeros((), device=real.device)
    if cfg.loss == "paired":
        loss = losses.paired(score_real, score_fake)
    else:
        target_real, target_fake = targets(cfg, len(real), real.device)
        loss = (F.binary_cross_entropy_with_logits(score_real, target_real)
                + F.binary_cross_entropy_with_logits(score_fake, target_fake))
    if cfg.gamma:  # an eighth of each kind is enough
        some, y = torch.cat([real[::8], fake[::8].float()]), labels[::8].repeat(2, 1)
        penalty = losses.zero_centred_penalty(lambda x: D(x, y)[0], some)
    loss = loss + cfg.aux_weight * aux_real + cfg.gamma * penalty
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(d_loss=loss, d_real=score_real.sigmoid().mean(), d_fake=score_fake.sigmoid().mean(),
                aux_real=aux_real, penalty=penalty)


def g_step(cfg: "Config", D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor,
           labels: torch.Tensor, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update G by its images fake = G(z, labels), still attached to it; real ones are for pairs only."""
    with frozen(D), autocast():
        score, logits = D(moved(fake, cfg.augment), labels)
        score_real = D(moved(real, cfg.augment), labels)[0].float() if cfg.loss == "paired" else None
    score, aux_fake = score.float(), losses.auxiliary(logits, labels)
    loss = losses.paired(score, score_real) if cfg.loss == "paired" else losses.bce_g(score)
    loss = loss + cfg.aux_weight * aux_fake
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(g_loss=loss, d_fake_updated=score.sigmoid().mean(), aux_fake=aux_fake)


# ---------------------------------------------------------------------- training

def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_iclevr)
    batches = Batches(data, cfg.batch_size, cfg.seed, device)

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_cond, cfg.d_norm)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = Average(G, cfg.ema)  # what is sampled and scored
    betas = cfg.beta1, cfg.beta2
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr_g, betas, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr_d, betas, fused=True)
    run.track(data, G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    judge = evaluator.get_judge(cfg, data, device) if run.wants_scores else None

    title, requested = run.title(data, cfg.d_cond, f"ch {cfg.ch}"), data.tests["test"]
    fixed = torch.randn(len(requested), cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))
    sets = {"val": data.validation_sets(), **data.tests}  # "val", sets of training images, chooses best.pt

    def sample(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ema(z.to(device), labels.to(device))

    for step in run.steps():
        if cfg.halve_every:
            half = 0.5 ** ((step - 1) // batches.per_epoch // cfg.halve_every)
            opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * half, cfg.lr_d * half
        real, labels = batches(step - 1)
        with run.autocast():
            fake = G(torch.randn(len(real), cfg.z_dim, device=device), labels)
        run.record(**d_step(cfg, D, opt_d, real, fake, labels, run.autocast))
        run.record(**g_step(cfg, D, opt_g, real, fake, labels, run.autocast))
        ema.update(step)

        if run.due("sample"):
            run.picture(sample(fixed, requested), title, captions=names_of(requested, data.classes))
        if judge and run.due("eval"):
            found = evaluator.score_sets(sample, cfg.z_dim, judge, sets, cfg.eval_draws, cfg.seed)
            accuracy = {f"accuracy_{name}": found[f"accuracy {name}"][0] for name in sets}
            run.score(best=accuracy["accuracy_val"], **accuracy)

    scores = {}
    for name, step in run.checkpoints("last", "best"):  # summary and pictures are of best.pt
        if judge:  # other z than best.pt was chosen with
            scores[name] = {"step": step} | evaluator.score_sets(sample, cfg.z_dim, judge, data.tests,
                                                                 cfg.eval_draws, cfg.seed + 1)
    if run.wants_pictures:
        save_scenes(sample, cfg, data, run.folder, f"{title}, step {step}")
    if judge:
        evaluator.report(run, data, judge, scores, [f"accuracy {name}" for name in data.tests])


if __name__ == "__main__":
    launch(main, Config, QUICK)
