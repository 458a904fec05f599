"""SNGAN with a projection discriminator on i-CLEVR: images of one to three requested objects.

Spectral norm: Miyato et al. 2018; projection: Miyato & Koyama 2018. --recipe r3gan learns the labels several
times faster: no norm in D, the relativistic pairing loss with R1 and R2 penalties (Huang et al. 2024), and an
auxiliary classifier (Odena et al. 2017).

    python sngan_iclevr.py --quick                     # recipe r3gan, minutes on two CPU cores
    python sngan_iclevr.py --iters 30000               # the paper's recipe at full size, one GPU
    python sngan_iclevr.py --recipe r3gan              # the other recipe at full size
    python sngan_iclevr.py --resume runs/sngan_iclevr  # continue; --sample and --eval take a run too

Results, with commands and hardware: results/README.md.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import evaluator
from common import losses
from common.blocks import EMA, autocast, cached_spectral_norm, no_param_grads, random_flip_translate
from common.datasets import Batches, Data, label_sets, load_iclevr
from harness import dist
from harness.cli import Settings
from harness.pictures import names_of, real_above_generated, save_grid
from harness.run import Run, launch


@dataclass
class Config(Settings):
    recipe: Literal["paper", "r3gan"] = "paper"  # method; r3gan learns the labels several times faster
    iters: int = 30_000  # iterations; one is n_dis steps of D and one of G
    batch_size: int = 64  # images per step
    lr_g: float = 3e-4  # Adam's learning rate for G
    lr_d: float = 1e-4  # Adam's learning rate for D
    n_dis: int = 4  # D steps before each G step
    z_dim: int = 128  # dimensions of the latent z ~ N(0, I)
    ch: int = 64  # width: feature maps of the layers nearest the image
    image_size: Literal[32, 64, 128] = 64  # height and width of the images
    ema: float = 0.999  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (data/iclevr if it exists, else synthetic), synthetic, or the folder of i-CLEVR
    n_scenes: int = 6003  # synthetic scenes, of three images each
    eval_draws: int = 10  # draws of z averaged per score
    labels: str = ""  # with --to: sets of objects, such as "red cube, blue sphere; gray cylinder"
    d_net: Literal["resnet", "cnn"] = "resnet"  # D: residual blocks, or strided convolutions
    d_norm: Literal["spectral", "none"] = "spectral"  # norm of D's weights
    label_embed: Literal["linear", "sum"] = "linear"  # how D joins an image's label vectors
    loss: Literal["hinge", "rahinge", "rpgan"] = "hinge"  # hinge, relativistic average hinge, or pairing loss
    gamma: float = 0.0  # γ of R1 and R2, penalties on D's gradients at real and generated images
    aux_weight: float = 0.0  # weight of an auxiliary classifier's cross-entropy, in both losses
    beta1: float = 0.5  # Adam's β1, for both networks
    beta2: float = 0.999  # Adam's β2
    add_noise: bool = True  # add U(0, 1/128) to the images D is given
    augment: float = 0.0  # mirror D's images at random, shift them by up to this share of their size; 0: no
    flip_labels: float = 0.0  # share of images whose real/fake target is swapped for D
    lr_decay_from: float = 0.0  # iteration (below 1: share of --iters) from which rates fall to 0; 0: never


RECIPES = {
    "paper": {},
    "r3gan": dict(loss="rpgan", d_net="cnn", d_norm="none", label_embed="sum", gamma=0.25, aux_weight=5.0,
                  n_dis=1, batch_size=32, z_dim=64, lr_g=8e-4, lr_d=8e-4, lr_decay_from=0.5, beta1=0.0,
                  beta2=0.99, augment=0.0625),
}
QUICK = dict(recipe="r3gan", iters=3600, batch_size=32, ch=16, n_scenes=4000, judge_width=16,
             augment=0.0, lr_decay_from=0.0,  # they pay off in long runs only
             log_every=50, sample_every=200, eval_every=600)


# ---------------------------------------------------------------------- networks

def init_xavier(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weight, zero bias (Miyato & Koyama 2018). Call it before spectral_norm, which
    re-parametrises the weight.
    """
    nn.init.xavier_uniform_(module.weight, gain)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


def residual_conv(i: int, o: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size: 3×3 in a residual branch (gain √2), 1×1 in a shortcut (gain 1)."""
    return init_xavier(nn.Conv2d(i, o, kernel, padding=kernel // 2), math.sqrt(2) if kernel > 1 else 1.0)


def set_embedding(n_classes: int, dim: int) -> nn.EmbeddingBag:
    """Class ids [B, K] → the sum of their vectors [B, dim]; the null id `n_classes` adds exactly 0."""
    embed = nn.EmbeddingBag(n_classes + 1, dim, mode="sum", padding_idx=n_classes)
    nn.init.normal_(embed.weight, 0, 0.1)
    nn.init.zeros_(embed.weight[n_classes])
    return embed


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias depend on a set of labels (de Vries et al. 2017; Dumoulin et al. 2017).

    gain = γ + Σ γ[label], bias = β + Σ β[label]: the labels' order doesn't matter; a null label adds nothing.
    """

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.gain, self.bias = set_embedding(n_classes, channels), set_embedding(n_classes, channels)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], ids [B, K] → [B, C, H, W]"""
        gain = (self.gamma + self.gain(ids))[..., None, None]
        bias = (self.beta + self.bias(ids))[..., None, None]
        return self.norm(x) * gain + bias


class UpBlock(nn.Module):
    """Residual block [B, i, H, W] → [B, o, 2H, 2W] (Miyato & Koyama 2018, fig. 14 b)."""

    def __init__(self, i: int, o: int, n_classes: int):
        super().__init__()
        self.bn1, self.conv1 = ConditionalBatchNorm(i, n_classes), residual_conv(i, o, 3)
        self.bn2, self.conv2 = ConditionalBatchNorm(o, n_classes), residual_conv(o, o, 3)
        self.shortcut = residual_conv(i, o, 1)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        h = F.interpolate(F.leaky_relu(self.bn1(x, ids)), scale_factor=2)
        h = self.conv2(F.leaky_relu(self.bn2(self.conv1(h), ids)))
        # a 1×1 convolution commutes with nearest up-sampling; first, it costs a quarter
        return h + F.interpolate(self.shortcut(x), scale_factor=2)


class DownBlock(nn.Module):
    """Residual block of D, [B, i, H, W] → [B, o, H/2, W/2] (Miyato & Koyama 2018, fig. 14 c).

    first: the input is an image, so there is no activation before the first convolution. norm wraps each layer.
    """

    def __init__(self, i: int, o: int, norm: Callable[[nn.Module], nn.Module], first: bool = False):
        super().__init__()
        self.first, hidden = first, o if first else i
        self.conv1 = norm(residual_conv(i, hidden, 3))
        self.conv2 = norm(residual_conv(hidden, o, 3))
        self.shortcut = norm(residual_conv(i, o, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(x if self.first else F.leaky_relu(x))
        h = F.avg_pool2d(self.conv2(F.leaky_relu(h)), 2)
        # pooling commutes with a 1×1 convolution; first, it saves three quarters of the cost
        return h + self.shortcut(F.avg_pool2d(x, 2))


def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at image_size, half of it, … down to 4×4; at 64: 1, 2, 4, 8, 16 times ch."""
    return [min(2**k, 16) * ch for k in range((image_size // 4).bit_length())]


class Generator(nn.Module):
    """z [B, z_dim], labels [B, 3] → images [B, 3, S, S] in [-1, 1]; labels enter by each block's norms."""

    def __init__(self, n_classes: int, z_dim: int, ch: int, image_size: int):
        super().__init__()
        w = widths(ch, image_size)[::-1]
        self.first = init_xavier(nn.Linear(z_dim, w[0] * 4 * 4))
        self.blocks = nn.ModuleList(UpBlock(i, o, n_classes) for i, o in pairwise(w))
        self.norm = nn.BatchNorm2d(ch)
        self.last = init_xavier(nn.Conv2d(ch, 3, 1))

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.first(z).view(len(z), -1, 4, 4)  # [B, 16·ch, 4, 4]
        for block in self.blocks:
            h = block(h, labels)  # [B, 8·ch, 8, 8], [B, 4·ch, 16, 16], [B, 2·ch, 32, 32], [B, ch, 64, 64]
        return self.last(F.leaky_relu(self.norm(h))).tanh()


class Discriminator(nn.Module):
    """images [B, 3, S, S], labels [B, 3] → scores [B], ψ(h) + ⟨labels, h⟩ (Miyato & Koyama 2018, eq. 3), and
    the logits [B, n_classes] of an auxiliary classifier (Odena et al. 2017), if there is one.

    net "resnet": features h summed over space; "cnn": flattened. norm "spectral": on all layers but the one
    that joins the label vectors, as in the reference report.
    """

    def __init__(self, n_classes: int, ch: int, image_size: int, net: str, norm: str, label_embed: str,
                 classifier: bool):
        super().__init__()
        w, self.net = widths(ch, image_size), net
        normed = spectral_norm if norm == "spectral" else lambda layer: layer
        if net == "resnet":  # [B, ch, S/2, S/2], [B, 2·ch, S/4, S/4], … [B, 16·ch, S/32, S/32]
            layers = [DownBlock(i, o, normed, first=i == 3) for i, o in pairwise([3, *w])]
        else:  # [B, ch, S/2, S/2], … [B, 8·ch, 4, 4]
            layers = []
            for i, o in pairwise([3, *w[:-1]]):
                conv = init_xavier(nn.Conv2d(i, o, 4, 2, 1), math.sqrt(2))
                layers += [normed(conv), nn.LeakyReLU(0.2)]
        features = w[-1] if net == "resnet" else w[-2] * 4 * 4
        self.layers = nn.Sequential(*layers)
        self.linear = normed(init_xavier(nn.Linear(features, 1)))
        embed = init_xavier(nn.Embedding(n_classes + 1, features, padding_idx=n_classes))
        nn.init.zeros_(embed.weight[n_classes])  # the null class: a zero vector, and no gradient
        self.embed = normed(embed)
        self.join = None
        if label_embed == "linear":  # without bias, so that a null label adds exactly zero to the score
            self.join = init_xavier(nn.Linear(3 * features, features, bias=False))
        self.classify = normed(init_xavier(nn.Linear(features, n_classes))) if classifier else None

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        h = self.layers(x)
        h = F.leaky_relu(h).sum((2, 3)) if self.net == "resnet" else h.flatten(1)
        y = self.embed(labels)  # [B, 3, features]
        y = self.join(y.flatten(1)) if self.join is not None else y.sum(1)
        return self.linear(h)[:, 0] + (y * h).sum(1), self.classify(h) if self.classify else None


# ---------------------------------------------------------------------- one step of D, one of G

ADVERSARIAL = {"hinge": losses.hinge_d, "rahinge": losses.rahinge, "rpgan": losses.rpgan}


def d_step(D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor, y: torch.Tensor,
           cfg: Config) -> dict[str, torch.Tensor]:
    """Update D with real and generated images [B, 3, S, S] of the same labels [B, 3].

    Reads cfg.loss, flip_labels, gamma, aux_weight, precision.
    """
    aux_real = penalty = real.new_zeros(())
    with cached_spectral_norm(D):
        with autocast(real, cfg.precision):  # D has no batch norm, so real and fake images share one pass
            scores, logits = D(torch.cat([real, fake]), y.repeat(2, 1))
        score_real, score_fake = scores.float().chunk(2)
        if cfg.aux_weight:  # the classifier learns from real images only
            aux_real = losses.aux_classification_loss(logits[:len(real)], y)
        if cfg.gamma:  # of an eighth of the batch: an unbiased estimate of the penalty, at an eighth of the cost
            y_some = y[::8].repeat(2, 1)
            penalty = losses.r1r2_penalty(lambda x: D(x, y_some)[0], torch.cat([real[::8], fake[::8]]))
    if cfg.flip_labels:  # swap the targets of some pairs of a real and a generated image
        swap = torch.rand(len(real), device=real.device) < cfg.flip_labels
        score_real, score_fake = score_real.where(~swap, score_fake), score_fake.where(~swap, score_real)
    loss = ADVERSARIAL[cfg.loss](score_real, score_fake)
    loss = loss + cfg.aux_weight * aux_real + cfg.gamma * penalty
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)
    opt.step()
    return dict(d_loss=loss, d_real=score_real.mean(), d_fake=score_fake.mean(), penalty=penalty,
                aux_real=aux_real)


def g_step(D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor, y: torch.Tensor,
           cfg: Config) -> dict[str, torch.Tensor]:
    """Update G by its images fake = G(z, y), still attached to it. Reads cfg.loss, aux_weight, precision.

    Real images are used only by the relativistic losses.
    """
    aux_fake = real.new_zeros(())
    with no_param_grads(D), cached_spectral_norm(D), autocast(real, cfg.precision):
        score, logits = D(fake, y)
        score_real = D(real, y)[0].float() if cfg.loss != "hinge" else None
    score = score.float()
    if cfg.aux_weight:
        aux_fake = losses.aux_classification_loss(logits, y)
    # G's hinge loss is -E[D(G(z))] (Miyato et al. 2018, eq. 17); the relativistic ones swap their arguments
    loss = -score.mean() if cfg.loss == "hinge" else ADVERSARIAL[cfg.loss](score, score_real)
    loss = loss + cfg.aux_weight * aux_fake
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)
    opt.step()
    return dict(g_loss=loss, aux_fake=aux_fake)


def augment(x: torch.Tensor, cfg: Config) -> torch.Tensor:
    """The images [B, 3, S, S] as D is given them. Their colours stay: the labels name them."""
    x = random_flip_translate(x.float(), cfg.augment)
    return x + torch.rand_like(x) / 128 if cfg.add_noise else x


# ---------------------------------------------------------------------- sample grids

def save_pictures(ema: EMA, data: Data, run: Run) -> None:
    """Save grids: both test lists, real above generated, each object alone."""
    g, null = torch.Generator().manual_seed(run.cfg.seed), len(data.classes)

    def save(name: str, what: str, images: torch.Tensor, y: torch.Tensor) -> None:
        save_grid(run.folder / f"{name}.png", images, f"{run.title}: {what}", captions=names_of(y, data.classes))

    for name, y in data.test_label_sets.items():
        images = ema(torch.randn(len(y), run.cfg.z_dim, generator=g), y)
        save(name, f"{name}.json, requested objects below each image", images, y)
    if len(data.images):
        index = torch.randint(len(data.images), (32,), generator=g)
        images = ema(torch.randn(32, run.cfg.z_dim, generator=g), data.labels[index])
        save("real_beside_generated", "training images, below each row generated ones with the same labels",
             real_above_generated(data.images[index], images),
             data.labels[index].view(4, 8, 3).repeat(1, 2, 1).view(64, 3))
    y = torch.tensor([[i, null, null] for i in range(null)])
    z = torch.randn(1, run.cfg.z_dim, generator=g).expand(null, -1)
    save("objects", "each object alone, one z", ema(z, y), y)


# ---------------------------------------------------------------------- training

def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_iclevr)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_net, cfg.d_norm, cfg.label_embed,
                      classifier=cfg.aux_weight > 0)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = EMA(G, cfg.ema)  # is sampled and scored
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.register(data, f"ch {cfg.ch}", G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    scorer = evaluator.get_scorer(run, data)
    requested = data.test_label_sets["test"]
    fixed = torch.randn(len(requested), cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))

    def sample(n: int, g: torch.Generator, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ema(torch.randn(n, cfg.z_dim, generator=g), y), y

    decay_from = cfg.lr_decay_from * (cfg.iters if cfg.lr_decay_from < 1 else 1)
    for step in run.steps():
        left = (cfg.iters - step + 1) / (cfg.iters - decay_from) if 0 < decay_from < step else 1
        opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * left, cfg.lr_d * left
        for k in range(cfg.n_dis):  # each step of D has its own images; G's step shares the last ones
            real, y = batches((step - 1) * cfg.n_dis + k)
            with autocast(real, cfg.precision):
                fake = G(torch.randn(len(real), cfg.z_dim, device=device), y)
            real, fake = augment(real, cfg), augment(fake, cfg)
            run.log(**d_step(D, opt_d, real, fake.detach(), y, cfg))
        run.log(**g_step(D, opt_g, real, fake, y, cfg))
        ema.update(step)

        if run.is_due("sample"):
            run.log_images(ema(fixed, requested), captions=names_of(requested, data.classes))
        if scorer and run.is_due("eval"):
            run.log_scores(**scorer.validate(sample))

    sets = label_sets(cfg.labels, data.classes) if cfg.labels else data.labels  # for --to
    evaluator.finish(run, data, scorer, sample, partial(save_pictures, ema, data, run), labels=sets)


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
