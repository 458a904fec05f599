"""SNGAN with a projection discriminator on i-CLEVR: images of one to three requested objects.

Spectral norm: Miyato et al. 2018; projection: Miyato & Koyama 2018. --recipe r3gan learns the labels far
faster: G draws each object by itself, D is plain, the loss is the relativistic pairing loss with R1 and R2
penalties (Huang et al. 2024), and there is an auxiliary classifier (Odena et al. 2017). Results: results/.

    python sngan_iclevr.py --quick                     # recipe r3gan, minutes on two CPU cores
    python sngan_iclevr.py --iters 30000               # the paper's recipe at full size, one GPU
"""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Adam, Optimizer
from torchvision.ops import MLP

import evaluator
from common import blocks, losses
from common.blocks import EMA, autocast, no_param_grads
from common.datasets import Batches, label_sets, load_iclevr
from harness import dist
from harness.cli import Settings
from harness.pictures import names_of, save_scenes
from harness.run import Run, launch


@dataclass
class Config(Settings):
    recipe: Literal["paper", "r3gan"] = "paper"  # method; r3gan learns the labels far faster
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
    labels: str = ""  # with --to: n images of each set: "red cube, blue sphere; gray cylinder", or test.json
    g_net: Literal["resnet", "cnn"] = "resnet"  # G: residual blocks, or each object by itself
    d_net: Literal["resnet", "cnn"] = "resnet"  # D: residual blocks, or strided convolutions
    d_norm: Literal["spectral", "none"] = "spectral"  # norm of D's weights
    label_embed: Literal["linear", "sum"] = "linear"  # how D joins an image's label vectors
    loss: Literal["hinge", "rahinge", "rpgan"] = "hinge"  # hinge, relativistic average hinge, or pairing loss
    gamma: float = 0.0  # γ of R1 and R2, penalties on D's gradients at real and generated images
    aux_weight: float = 0.0  # weight of an auxiliary classifier's cross-entropy, in both losses
    beta1: float = 0.5  # Adam's β1, for both networks
    beta2: float = 0.999  # Adam's β2
    add_noise: bool = True  # add U(0, 1/128) to the images D is given
    augment: float = 0.0  # shift D's images at random by up to this share of their size; 0: no
    flip_labels: float = 0.0  # share of images whose real/fake target is swapped for D
    lr_decay_from: float = 0.0  # iteration (below 1: share of --iters) from which rates fall to 0; 0: never


RECIPES = {
    "paper": {},
    "r3gan": dict(loss="rpgan", g_net="cnn", d_net="cnn", d_norm="none", label_embed="sum", aux_weight=5.0,
                  gamma=0.25, n_dis=1, batch_size=32, z_dim=24, lr_g=8e-4, lr_d=8e-4, lr_decay_from=0.5,
                  beta1=0.0, beta2=0.99, augment=0.0625),
}
QUICK = dict(recipe="r3gan", iters=2000, batch_size=16, ch=16, n_scenes=4000, judge_width=16,
             lr_g=1.5e-3, lr_d=1.5e-3, log_every=50, sample_every=100, eval_every=1000)


# ---------------------------------------------------------------------- networks
def init_xavier(module: nn.Module, gain: float = 0) -> nn.Module:
    """Xavier-uniform weight, zero bias; call it before spectral_norm. gain 0: √2, or 1 for 1×1 and linear."""
    nn.init.xavier_uniform_(module.weight, gain or (2**0.5 if module.weight[0, 0].numel() > 1 else 1))
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


class ConditionalBatchNorm(nn.Module):
    """Batch norm of gain γ + Σ γ[label], bias β + Σ β[label] over a set of labels (Dumoulin et al. 2017)."""

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.gain = nn.Embedding(n_classes + 1, channels, padding_idx=n_classes)
        self.bias = nn.Embedding(n_classes + 1, channels, padding_idx=n_classes)
        for embed in (self.gain, self.bias):
            nn.init.normal_(embed.weight[:n_classes], 0, 0.1)  # the null label's vector stays 0

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        gain = (self.gamma + self.gain(ids).sum(1))[..., None, None]
        bias = (self.beta + self.bias(ids).sum(1))[..., None, None]
        return self.norm(x) * gain + bias


class UpBlock(nn.Module):
    """Residual block [B, i, H, W] → [B, o, 2H, 2W] (Miyato & Koyama 2018, fig. 14 b)."""

    def __init__(self, i: int, o: int, n_classes: int):
        super().__init__()
        self.bn1 = ConditionalBatchNorm(i, n_classes)
        self.conv1 = init_xavier(nn.Conv2d(i, o, 3, padding=1))
        self.bn2 = ConditionalBatchNorm(o, n_classes)
        self.conv2 = init_xavier(nn.Conv2d(o, o, 3, padding=1))
        self.shortcut = init_xavier(nn.Conv2d(i, o, 1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = F.interpolate(F.leaky_relu(self.bn1(x, ids)), scale_factor=2)
        h = self.conv2(F.leaky_relu(self.bn2(self.conv1(h), ids)))
        return h + F.interpolate(self.shortcut(x), scale_factor=2)  # a 1×1 may come first, for a quarter


class DownBlock(nn.Module):
    """Residual block [B, i, H, W] → [B, o, H/2, W/2] (Miyato & Koyama 2018, fig. 14 c)."""

    def __init__(self, i: int, o: int, norm: Callable[[nn.Module], nn.Module], first: bool = False):
        super().__init__()
        self.first, hidden = first, o if first else i
        self.conv1 = norm(init_xavier(nn.Conv2d(i, hidden, 3, padding=1)))
        self.conv2 = norm(init_xavier(nn.Conv2d(hidden, o, 3, padding=1)))
        self.shortcut = norm(init_xavier(nn.Conv2d(i, o, 1)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.leaky_relu(x))  # an image gets no activation
        h = F.avg_pool2d(self.conv2(F.leaky_relu(h)), 2)
        return h + self.shortcut(F.avg_pool2d(x, 2))  # a 1×1 may come after pooling, for a quarter


def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at image_size, half of it, … down to 4×4; at 64: 1, 2, 4, 8, 16 times ch."""
    return [min(2**k, 16) * ch for k in range((image_size // 4).bit_length())]


class Generator(nn.Module):
    """z [B, z_dim], labels [B, 3] → images [B, 3, S, S] in [-1, 1]; labels enter by the norms. net "cnn":
    each object is drawn up to 8×8 by itself, of a third of z, whose first number draws its rank (the first
    one is in the middle, in i-CLEVR); the rank enters as labels do. At each place one covers the others.
    """

    def __init__(self, n_classes: int, z_dim: int, ch: int, image_size: int, net: str):
        super().__init__()
        w, self.net, self.null = widths(ch, image_size)[::-1], net, n_classes
        if net == "resnet":
            self.first = init_xavier(nn.Linear(z_dim, w[0] * 4 * 4))
            self.blocks = nn.ModuleList(UpBlock(i, o, n_classes) for i, o in pairwise(w))
            self.norm, self.last = nn.BatchNorm2d(ch), init_xavier(nn.Conv2d(ch, 3, 1))
        else:
            def up(i: int, o: int) -> list[nn.Module]:
                return [nn.BatchNorm2d(i), nn.LeakyReLU(), init_xavier(nn.ConvTranspose2d(i, o, 4, 2, 1))]
            self.first = MLP(z_dim // 3, [w[1], w[1], w[1] * 4 * 4], activation_layer=nn.LeakyReLU)
            for linear in list(self.first)[::3]:  # each is followed by an activation and dropout 0
                init_xavier(linear, 2**0.5)
            self.norms = nn.ModuleList(ConditionalBatchNorm(w[1], n_classes + 3) for _ in range(2))
            self.convs = nn.ModuleList([init_xavier(nn.ConvTranspose2d(w[1], w[1], 4, 2, 1)),
                                        init_xavier(nn.Conv2d(w[1], w[1] + 1, 1))])
            self.layers = nn.Sequential(*(layer for i, o in pairwise([*w[1:-1], 3]) for layer in up(i, o)))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if self.net == "resnet":
            h = self.first(z).unflatten(1, (-1, 4, 4))  # [B, 16·ch, 4, 4]
            for block in self.blocks:  # [B, 8·ch, 8, 8], [B, 4·ch, 16, 16], … [B, ch, 64, 64]
                h = block(h, labels)
            return self.last(F.leaky_relu(self.norm(h))).tanh()
        z, here = z[:, :3 * (z.shape[1] // 3)].unflatten(1, (3, -1)), labels != self.null
        rank = z[..., 0].masked_fill(~here, -torch.inf).argsort(1, descending=True).argsort(1)  # [B, 3]
        ids = torch.stack([labels.where(here, self.null + 3), self.null + rank], 2).flatten(0, 1)
        h = self.first(z.flatten(0, 1)).unflatten(1, (-1, 4, 4))  # [3·B, 8·ch, 4, 4]
        for norm, conv in zip(self.norms, self.convs, strict=True):  # [3·B, 8·ch (+ 1), 8, 8]
            h = conv(F.leaky_relu(norm(h, ids)))
        h = h.unflatten(0, (-1, 3))
        front = h[:, :, :1].masked_fill(~here[..., None, None, None], -torch.inf).softmax(1)
        return self.layers((front * h[:, :, 1:]).sum(1)).tanh()  # [B, 4·ch, 16, 16], … [B, 3, 64, 64]


class Discriminator(nn.Module):
    """images [B, 3, S, S], labels [B, 3] → scores [B], ψ(h) + ⟨labels, h⟩ (Miyato & Koyama 2018, eq. 3). net
    "resnet": features h summed over space; "cnn": flattened. norm "spectral": of all layers but `join`.
    classify(images) → logits [B, n_classes] of an auxiliary classifier, which shares nothing with the rest.
    """

    def __init__(self, n_classes: int, ch: int, image_size: int, net: str, norm: str, label_embed: str,
                 classifier: bool):
        super().__init__()
        w, self.net = widths(ch, image_size), net
        normed = spectral_norm if norm == "spectral" else lambda layer: layer
        if net == "resnet":  # [B, ch, S/2, S/2], [B, 2·ch, S/4, S/4], … [B, 16·ch, S/32, S/32]
            layers = [DownBlock(i, o, normed, first=i == 3) for i, o in pairwise([3, *w])]
        else:  # [B, ch, S/2, S/2], … [B, 8·ch, 4, 4]
            convs = [init_xavier(nn.Conv2d(i, o, 4, 2, 1)) for i, o in pairwise([3, *w[:-1]])]
            layers = [layer for conv in convs for layer in (normed(conv), nn.LeakyReLU(0.2))]
        features = w[-1] if net == "resnet" else w[-2] * 4 * 4
        self.layers = nn.Sequential(*layers)
        self.linear = normed(init_xavier(nn.Linear(features, 1)))
        embed = init_xavier(nn.Embedding(n_classes + 1, features, padding_idx=n_classes))
        nn.init.zeros_(embed.weight[n_classes])  # the null class: a zero vector, and no gradient
        self.embed = normed(embed)
        # without bias, so that a null label adds exactly zero to the score
        self.join = init_xavier(nn.Linear(3 * features, features, False)) if label_embed == "linear" else None
        self.classify = blocks.LocalClassifier(n_classes, ch, image_size) if classifier else None

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = self.layers(x)
        h = F.leaky_relu(h).sum((2, 3)) if self.net == "resnet" else h.flatten(1)
        y = self.embed(labels)  # [B, 3, features]
        y = self.join(y.flatten(1)) if self.join is not None else y.sum(1)
        return self.linear(h)[:, 0] + (y.float() * h).sum(1)


# ---------------------------------------------------------------------- one step of D, one of G
D_LOSS = {"hinge": losses.hinge_d, "rpgan": losses.rpgan,
          "rahinge": lambda first, second: losses.rahinge(first, second, dist.mean)}


def d_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, y: Tensor, cfg: Config) -> dict:
    """Update D with real and generated images [B, 3, S, S] of the same labels [B, 3]. Reads cfg.loss,
    flip_labels, gamma, aux_weight, precision.
    """
    aux = nothing = gp = real.new_zeros(())
    with blocks.cached_spectral_norm(D):
        with autocast(real, cfg.precision):
            scores = D(torch.cat([real, fake]), y.repeat(2, 1))  # in one pass, for D has no batch norm
            if cfg.aux_weight:
                aux = losses.aux_classification_loss(D.classify(real), y)
                # it is to find nothing in generated images, else mere specks please it; 0 and 1 teach less
                nothing = 0.3 * F.softplus(D.classify(fake)).mean()
        score_real, score_fake = first, second = scores.float().chunk(2)
        if cfg.gamma:  # an eighth of the batch gives an unbiased estimate at an eighth of the cost
            y_some = y[::8].repeat(2, 1)
            gp = losses.r1r2_penalty(lambda x: D(x, y_some), torch.cat([real[::8], fake[::8]]))
    if cfg.flip_labels:  # swap the targets of some pairs of a real and a generated image
        swap = torch.rand(len(real), device=real.device) < cfg.flip_labels
        first, second = score_real.where(~swap, score_fake), score_fake.where(~swap, score_real)
    loss = D_LOSS[cfg.loss](first, second) + cfg.gamma * gp + cfg.aux_weight * (aux + nothing)
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(d_loss=loss, d_real=score_real.mean(), d_fake=score_fake.mean(), penalty=gp, aux_real=aux)


def g_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, y: Tensor, cfg: Config) -> dict:
    """Update G by its images fake = G(z, y), still attached to it. Reads cfg.loss, aux_weight, precision."""
    aux = real.new_zeros(())
    with no_param_grads(D), blocks.cached_spectral_norm(D), autocast(real, cfg.precision):
        score = D(fake, y)
        if cfg.loss == "hinge":  # -E[D(G(z))] (Miyato et al. 2018, eq. 17)
            loss = -score.float().mean()
        else:  # only the relativistic losses use real images
            loss = D_LOSS[cfg.loss](score.float(), D(real, y).float())
        if cfg.aux_weight:
            aux = losses.aux_classification_loss(D.classify(fake), y)
    loss = loss + cfg.aux_weight * aux
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(g_loss=loss, aux_fake=aux)


# ---------------------------------------------------------------------- training
def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_iclevr)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size, cfg.g_net)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_net, cfg.d_norm, cfg.label_embed,
                      classifier=cfg.aux_weight > 0)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = EMA(G, cfg.ema)  # is sampled and scored
    opt_g = Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.register(data, f"ch {cfg.ch}", G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    scorer = evaluator.get_scorer(run, data)
    requested = data.test_label_sets["test"]

    def sample(n: int, g: torch.Generator, y: Tensor) -> tuple[Tensor, Tensor]:
        return ema(torch.randn(n, cfg.z_dim, generator=g), y), y

    for step in run.steps():
        share = blocks.linear_decay(step, cfg.iters, cfg.lr_decay_from)
        opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * share, cfg.lr_d * share
        for k in range(cfg.n_dis):  # each step of D has its own images; G's step shares the last ones
            real, y = batches((step - 1) * cfg.n_dis + k)
            with autocast(real, cfg.precision):
                fake = G(torch.randn(len(real), cfg.z_dim, device=device), y)
            real, fake = (blocks.random_translate(x.float(), cfg.augment) for x in (real, fake))  # for D
            if cfg.add_noise:
                real, fake = (x + torch.rand_like(x) / 128 for x in (real, fake))
            run.log(**d_step(D, opt_d, real, fake.detach(), y, cfg))
        run.log(**g_step(D, opt_g, real, fake, y, cfg))
        ema.update(step)

        if run.is_due("sample"):
            images, _ = sample(len(requested), torch.Generator().manual_seed(cfg.seed), requested)
            run.log_images(images, captions=names_of(requested, data.classes))
        if scorer and run.is_due("eval"):
            run.log_scores(**scorer.validate(sample))

    evaluator.finish(run, data, scorer, sample, lambda: save_scenes(sample, data, run),
                     labels=label_sets(cfg.labels, data, cfg.n))


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
