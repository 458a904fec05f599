"""SNGAN with a projection discriminator on i-CLEVR: images of one to three requested objects.

Spectral norm: Miyato et al. 2018; projection: Miyato & Koyama 2018. --quick has a plain D without norm, pairs
and zero-centred penalties instead (Huang et al. 2024), which learn the labels several times faster.

    python sngan_iclevr.py --quick                     # minutes on two CPU cores
    python sngan_iclevr.py --iters 30000               # the full run, one GPU
    python sngan_iclevr.py --resume runs/sngan_iclevr  # continue; --sample and --eval take a run too

Results, with commands and hardware: results/README.md.
"""
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import evaluator
from common import losses
from common.blocks import Average, frozen, moved, normed_once
from common.cli import Settings
from common.datasets import Batches, load_iclevr
from common.pictures import names_of, save_scenes
from common.run import Run, launch


@dataclass
class Config(Settings):
    iters: int = 30_000  # iterations; one is n_dis steps of D and one of G
    batch_size: int = 64  # images a step
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
    d_net: Literal["resnet", "cnn"] = "resnet"  # D: the write-up's residual blocks, or strided convolutions
    d_norm: Literal["spectral", "none"] = "spectral"  # norm of D's weights
    label_embed: Literal["linear", "sum"] = "linear"  # how D combines an image's label vectors
    loss: Literal["hinge", "relativistic", "paired"] = "hinge"  # relativistic: to the other kind's mean score
    gamma: float = 0.0  # weight of the mean of R1 and R2, D's gradients at real and generated images
    aux_weight: float = 0.0  # weight of an auxiliary classifier's cross-entropy, in both losses
    beta1: float = 0.5  # Adam's decay rate of the gradient's mean, for both networks
    beta2: float = 0.999  # and of its square's
    add_noise: bool = True  # add U(0, 1/128) to the images D is given
    augment: float = 0.0  # mirror D's images at random, shift them by up to this share of their size; 0: no
    flip_labels: float = 0.0  # share of images whose real/fake target is swapped for D
    lr_decay_from: int = 0  # iteration from which both rates fall linearly to 0 at the last; 0: never


QUICK = dict(iters=3600, batch_size=32, lr_g=1e-3, lr_d=1e-3, n_dis=1, ch=16, ema=0.998, n_scenes=4000,
             d_net="cnn", d_norm="none", label_embed="sum", loss="paired", gamma=0.5, aux_weight=5.0,
             beta1=0.0, beta2=0.99, log_every=50, sample_every=200, eval_every=600, judge_width=16)


# ---------------------------------------------------------------------- networks

def init_xavier(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weight, zero bias (Miyato & Koyama 2018). After spectral_norm it would be lost."""
    nn.init.xavier_uniform_(module.weight, gain)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


def residual_conv(i: int, o: int, kernel: int) -> nn.Conv2d:
    """Convolution that keeps the size: 3×3 in a residual branch (gain √2), 1×1 in a shortcut (gain 1)."""
    return init_xavier(nn.Conv2d(i, o, kernel, padding=kernel // 2), math.sqrt(2) if kernel > 1 else 1.0)


class SetEmbedding(nn.Embedding):
    """Class ids [B, K] → the sum of their vectors [B, dim]; the null id `n_classes` adds exactly 0."""

    def __init__(self, n_classes: int, dim: int, std: float = 0.1):
        super().__init__(n_classes + 1, dim, padding_idx=n_classes)
        nn.init.normal_(self.weight, 0, std)
        nn.init.zeros_(self.weight[n_classes])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).sum(1)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias depend on a set of labels (de Vries et al. 2017; Dumoulin et al. 2017).

    gain = γ + Σ γ[label], bias = β + Σ β[label]: the labels' order doesn't matter; a null label adds nothing.
    """

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.gain, self.bias = SetEmbedding(n_classes, channels), SetEmbedding(n_classes, channels)

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

    first: it takes an image, and has no activation before its first convolution. norm: of each layer.
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
    the auxiliary classifier's logits [B, n_classes] (Odena et al. 2017).

    net "resnet": features h summed over space, as in the write-up; "cnn": flattened. norm "spectral": on all
    layers but the one that combines the label vectors, as in the write-up.
    """

    def __init__(self, n_classes: int, ch: int, image_size: int, net: str, norm: str, label_embed: str):
        super().__init__()
        w, self.net = widths(ch, image_size), net
        normed = spectral_norm if norm == "spectral" else nn.Identity()  # which returns its input
        if net == "resnet":  # [B, ch, S/2, S/2], [B, 2·ch, S/4, S/4], … [B, 16·ch, S/32, S/32]
            layers = [DownBlock(i, o, normed, first=i == 3) for i, o in pairwise([3, *w])]
        else:  # [B, ch, S/2, S/2], … [B, 8·ch, 4, 4]
            layers = []
            for i, o in pairwise([3, *w[:-1]]):
                conv = init_xavier(nn.Conv2d(i, o, 4, 2, 1), math.sqrt(2))
                layers += [normed(conv), nn.LeakyReLU(0.2)]
        self.layers, features = nn.Sequential(*layers), w[-1] if net == "resnet" else w[-2] * 4 * 4
        self.linear = normed(init_xavier(nn.Linear(features, 1)))
        embed = init_xavier(nn.Embedding(n_classes + 1, features, padding_idx=n_classes))
        nn.init.zeros_(embed.weight[n_classes])  # the null class: a zero vector, and no gradient
        self.embed = normed(embed)
        self.join = None
        if label_embed == "linear":  # without bias, so that a null label adds exactly zero to the score
            self.join = init_xavier(nn.Linear(3 * features, features, bias=False))
        self.classify = normed(init_xavier(nn.Linear(features, n_classes)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.layers(x)
        h = F.leaky_relu(h).sum((2, 3)) if self.net == "resnet" else h.flatten(1)
        y = self.embed(labels)  # [B, 3, features]
        y = self.join(y.flatten(1)) if self.join is not None else y.sum(1)
        return self.linear(h)[:, 0] + (y * h).sum(1), self.classify(h)


# ---------------------------------------------------------------------- one step of D, one of G

def d_step(cfg: "Config", G: nn.Module, D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor,
           labels: torch.Tensor, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update D with real images [B, 3, S, S] and generated ones of the same labels [B, 3]."""
    penalty = torch.zeros((), device=real.device)
    with normed_once(D):
        with autocast():
            with torch.no_grad():
                fake = G(torch.randn(len(real), cfg.z_dim, device=real.device), labels)
            # D has no batch norm, so real and fake images share one pass
            images = perturbed(torch.cat([real, fake]), cfg.add_noise, cfg.augment)
            scores, logits = D(images, labels.repeat(2, 1))
        score_real, score_fake = scores.float().chunk(2)
        aux_real = losses.auxiliary(logits[:len(real)], labels)  # it learns from real images alone
        if cfg.gamma:  # an eighth of each kind is enough
            some, y = torch.cat([part[::8] for part in images.chunk(2)]), labels[::8].repeat(2, 1)
            penalty = losses.zero_centred_penalty(lambda x: D(x, y)[0], some.float())
    loss = adversarial(cfg.loss, score_real, score_fake, cfg.flip_labels)
    loss = loss + cfg.aux_weight * aux_real + cfg.gamma * penalty
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(d_loss=loss, d_real=score_real.mean(), d_fake=score_fake.mean(), penalty=penalty,
                aux_real=aux_real)


def g_step(cfg: "Config", G: nn.Module, D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor,
           labels: torch.Tensor, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update G; real images [B, 3, S, S] are needed by the losses that compare scores only."""
    with frozen(D), normed_once(D), autocast():
        fake = G(torch.randn(len(real), cfg.z_dim, device=real.device), labels)
        score, logits = D(perturbed(fake, cfg.add_noise, cfg.augment), labels)
        if cfg.loss != "hinge":
            score_real = D(perturbed(real, cfg.add_noise, cfg.augment), labels)[0].float()
    score, aux_fake = score.float(), losses.auxiliary(logits, labels)
    loss = losses.hinge_g(score) if cfg.loss == "hinge" else adversarial(cfg.loss, score, score_real)
    loss = loss + cfg.aux_weight * aux_fake
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(g_loss=loss, aux_fake=aux_fake)


def adversarial(loss: str, first: torch.Tensor, second: torch.Tensor, flip: float = 0.0) -> torch.Tensor:
    """D's loss of the scores [B] of real and generated images; G's, if it compares scores, of both swapped.

    "relativistic": scores relative to the other kind's mean (Jolicoeur-Martineau 2018, section 4.2.1).
    """
    if loss == "relativistic":
        first, second = first - second.mean(), second - first.mean()
    if flip:  # a negated score has the hinge of the other target; pairs are swapped as such
        swapped = torch.rand(1 if loss == "paired" else 2, len(first), device=first.device) < flip
        first, second = torch.where(swapped, -1, 1) * torch.stack([first, second])
    return losses.paired(first, second) if loss == "paired" else losses.hinge_d(first, second)


def perturbed(x: torch.Tensor, add_noise: bool, augment: float = 0.0) -> torch.Tensor:
    """The images [B, 3, S, S] as D is given them. Their colours stay: the labels name them."""
    x = moved(x, augment)
    return x + torch.rand_like(x) / 128 if add_noise else x


# ---------------------------------------------------------------------- training

def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_iclevr)
    batches = Batches(data, cfg.batch_size, cfg.seed, device)

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_net, cfg.d_norm, cfg.label_embed)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = Average(G, cfg.ema)  # what is sampled and scored
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.track(data, G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    judge = evaluator.get_judge(cfg, data, device) if run.wants_scores else None

    title, requested = run.title(data, f"ch {cfg.ch}"), data.tests["test"]
    fixed = torch.randn(len(requested), cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed))
    sets = {"val": data.validation_sets(), **data.tests}  # "val", sets of training images, chooses best.pt

    def sample(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ema(z.to(device), labels.to(device))

    if cfg.lr_decay_from and run.trains:
        print(f"learning rates fall from iteration {cfg.lr_decay_from:,} on, to 0 at --iters {cfg.iters:,}")
    for step in run.steps():
        if cfg.lr_decay_from and step > cfg.lr_decay_from:
            left = (cfg.iters - step + 1) / (cfg.iters - cfg.lr_decay_from)
            opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * left, cfg.lr_d * left
        for k in range(cfg.n_dis):
            real, labels = batches((step - 1) * cfg.n_dis + k)
            run.record(**d_step(cfg, G, D, opt_d, real, labels, run.autocast))
        run.record(**g_step(cfg, G, D, opt_g, real, labels, run.autocast))
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
