"""ACGAN on faces with attributes: four adversarial losses, three norms of D, two conditions each of D and G.

ACGAN: Odena et al. 2017; WGAN-GP: Gulrajani et al. 2017; weight clipping: Arjovsky et al. 2017; WGAN-div: Wu
et al. 2018; projection: Miyato & Koyama 2018. --recipe r3gan has the relativistic pairing loss with R1 and R2
penalties (Huang et al. 2024), no norm in D, and projection. Results: results/README.md.

    python acgan_celeba.py --quick                                # recipe r3gan, minutes on two CPU cores
    python acgan_celeba.py --d-norm spectral --d-cond projection  # the report's best of six variants, one GPU
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Adam, Optimizer

import evaluator
from common import blocks
from common.blocks import EMA, autocast, init_dcgan, no_param_grads
from common.datasets import Batches, Data, load_faces, pick_columns
from common.files import UserError
from common.losses import r1r2_penalty, rpgan
from harness import dist
from harness.cli import Settings
from harness.pictures import real_above_generated, save_grid
from harness.run import Run, launch


@dataclass
class Config(Settings):
    recipe: Literal["paper", "r3gan"] = "paper"  # method; r3gan learns several times faster
    iters: int = 30_000  # iterations; one is n_dis steps of D and one of G
    batch_size: int = 32  # images per step
    lr_g: float = 1e-3  # Adam's learning rate for G
    lr_d: float = 1e-3  # Adam's learning rate for D
    n_dis: int = 5  # D steps before each G step
    z_dim: int = 128  # dimensions of the latent z ~ N(0, I)
    ch: int = 32  # width: a sixteenth of the feature maps at 4×4
    image_size: Literal[32, 64, 128] = 128  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (data/celeba if it exists, else synthetic), synthetic, or a folder of faces
    attributes: str = ""  # attributes, joined by commas; empty: eight of CelebA's, all of another set's
    crop: int = 0  # side of the square cut out of the middle of each image; 0: the largest
    skip_bad_images: bool = False  # leave out, and count, images that can't be used
    n_synthetic: int = 10_000  # synthetic faces
    eval_images: int = 5000  # generated images per draw that are scored
    eval_draws: int = 3  # draws of z and attributes averaged per score
    with_: str = ""  # with --to: attributes of all these images, joined by commas
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    loss: Literal["wgan-gp", "wgan-clip", "wgan-div", "rpgan"] = "wgan-gp"  # adversarial loss
    d_norm: Literal["batch", "spectral", "none"] = "batch"  # D's norm: of activations, of weights, or none
    d_cond: Literal["concat", "projection"] = "concat"  # how the attributes enter D's score
    g_cond: Literal["maps", "input"] = "maps"  # attributes enter G before each layer, or with z only
    gp_weight: float = 10.0  # λ of WGAN-GP's penalty
    gamma: float = 0.5  # rpgan: γ of R1 and R2, penalties on D's gradients at real and generated images
    clip: float = 0.01  # wgan-clip: largest absolute weight of D
    aux_weight: float = 20.0  # λ of the attributes' cross-entropy, in both losses
    augment: float = 0.0  # shift D's images at random by up to this share of their size; 0: no
    lr_decay_from: float = 0.0  # iteration (below 1: share of --iters) from which rates fall to 0; 0: never
    beta1: float = 0.5  # Adam's β1, from WGAN-GP (the reference report states none)
    beta2: float = 0.9  # Adam's β2, likewise

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "wgan-clip" and self.d_norm == "spectral":
            raise UserError("--loss wgan-clip: clipping does nothing with --d-norm spectral: change one")


RECIPES = {
    "paper": {},
    "r3gan": dict(loss="rpgan", d_norm="none", d_cond="projection", aux_weight=0.5, n_dis=1, beta1=0.0,
                  beta2=0.99, ema=0.999, augment=0.0625),
}
QUICK = dict(recipe="r3gan", iters=4000, ch=8, image_size=64, n_synthetic=4000, eval_images=1000,
             log_every=100, sample_every=200, eval_every=1000, save_every=1000)

# the report's table, for tools/sweep.py; behind each its best FID there, of 5,000 images
VARIANTS = {
    "gp-bn-concat-maps": {},  # 89.276, the baseline
    "gp-sn-concat-maps": dict(d_norm="spectral"),  # 63.240
    "gp-bn-concat-input": dict(g_cond="input"),  # 131.046
    "gp-sn-projection-maps": dict(d_norm="spectral", d_cond="projection"),  # 44.292
    "clip-bn-concat-maps": dict(loss="wgan-clip"),  # 216.239
    "div-bn-concat-maps": dict(loss="wgan-div"),  # 55.371
}


# ---------------------------------------------------------------------- networks
def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at half the image's size, a quarter, … down to 4×4; at 128: 1, 2, 4, 8, 16 times ch."""
    return [16 * ch >> k for k in reversed(range((image_size // 4).bit_length() - 1))]


class Generator(nn.Module):
    """z [B, z_dim], attributes y [B, A] of 0 and 1 → images [B, 3, S, S] in [-1, 1]. cond "input": y joins z
    only; "maps": and the input of every ConvT, as A constant planes.
    """

    def __init__(self, n_attributes: int, z_dim: int, ch: int, image_size: int, cond: str):
        super().__init__()
        w, self.maps = widths(ch, image_size)[::-1], cond == "maps"
        planes = n_attributes if self.maps else 0
        self.first = nn.Linear(z_dim + n_attributes, w[0] * 4 * 4, bias=False)
        self.convs = nn.ModuleList(nn.ConvTranspose2d(i + planes, o, 4, 2, 1, bias=o == 3)
                                   for i, o in pairwise([*w, 3]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in w)
        init_dcgan(self)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        h = self.first(torch.cat([z, y], 1)).view(len(z), -1, 4, 4)  # [B, 16·ch, 4, 4]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = F.relu(norm(h))
            if self.maps:
                h = torch.cat([h, y[..., None, None].expand(-1, -1, *h.shape[2:])], 1)
            h = conv(h)  # at 128: [B, 8·ch, 8, 8], [B, 4·ch, 16, 16], …, [B, 3, 128, 128]
        return h.tanh()


class Discriminator(nn.Module):
    """images [B, 3, S, S], attributes y [B, A] → adversarial scores [B], attribute logits [B, A]. cond
    "concat": a linear layer on (features, y); "projection": ψ(h) + ⟨V y, h⟩ (Miyato & Koyama 2018, eq. 3).
    norm "spectral": on all layers but the attributes'.
    """

    def __init__(self, n_attributes: int, ch: int, image_size: int, norm: str, cond: str):
        super().__init__()
        w, self.projection = widths(ch, image_size), cond == "projection"
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in pairwise([3, *w]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm == "batch" and k else nn.Identity()
                                   for k, width in enumerate(w))  # none next to the image
        features = w[-1] * 4 * 4
        self.score = nn.Linear(features + (0 if self.projection else n_attributes), 1)
        self.embed = nn.Linear(n_attributes, features, bias=False) if self.projection else None
        self.attributes = nn.Linear(features, n_attributes)
        init_dcgan(self)
        if norm == "spectral":  # after the initialisation, which a wrapped weight would lose
            for layer in [*self.convs, self.score, *([self.embed] if self.projection else [])]:
                spectral_norm(layer)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)  # at 128: [B, ch, 64, 64], …, [B, 16·ch, 4, 4]
        h = x.flatten(1)  # [B, 256·ch]
        score = self.score(h if self.projection else torch.cat([h, y], 1))[:, 0]
        if self.projection:
            score = score + (self.embed(y).float() * h).sum(1)
        return score, self.attributes(h)


# ---------------------------------------------------------------------- losses; one step of D, one of G
def gradient_norms(D: Callable, real: Tensor, fake: Tensor) -> Tensor:
    """‖∇D(x̂)‖₂ [B] at a random point x̂ between each pair of real and fake [B, 3, S, S]; in fp32, as R1."""
    with torch.autocast(real.device.type, enabled=False):
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        x = torch.lerp(real, fake.float(), share).requires_grad_()
        gradients, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1)  # a square root would give NaN at norm 0


def wgan_gp(D: Callable, real: Tensor, fake: Tensor) -> Tensor:
    """E[(‖∇D(x̂)‖₂ - 1)²] (Gulrajani et al. 2017, eq. 3)."""
    return (gradient_norms(D, real, fake) - 1).square().mean()


def wgan_div(D: Callable, real: Tensor, fake: Tensor, k: float = 2, p: float = 6) -> Tensor:
    """k E[‖∇D(x̂)‖₂^p] (Wu et al. 2018, Algorithm 1)."""
    return k * gradient_norms(D, real, fake).pow(p).mean()


def d_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, y: Tensor, cfg: Config) -> dict:
    """Update D with real and generated images [B, 3, S, S] of the same attributes [B, A]. Reads cfg.loss,
    gp_weight, gamma, clip, aux_weight, precision.
    """
    gp = real.new_zeros(())
    with blocks.cached_spectral_norm(D):
        with autocast(real, cfg.precision):
            # two passes, because real and fake images each need their own batch-norm statistics
            (score_real, logits), (score_fake, _) = D(real, y), D(fake, y)
        if cfg.loss == "wgan-gp":
            gp = cfg.gp_weight * wgan_gp(lambda x: D(x, y)[0], real, fake)
        elif cfg.loss == "wgan-div":
            gp = wgan_div(lambda x: D(x, y)[0], real, fake)
        elif cfg.loss == "rpgan":  # an eighth of the batch gives an unbiased estimate, for less time
            y_some = y[::8].repeat(2, 1)
            gp = cfg.gamma * r1r2_penalty(lambda x: D(x, y_some)[0], torch.cat([real[::8], fake[::8]]))
    score_real, score_fake = score_real.float(), score_fake.float()
    aux = F.binary_cross_entropy_with_logits(logits.float(), y)  # of real images only
    # WGAN's is E[D(G(z))] - E[D(x)] (Arjovsky et al. 2017, eq. 2)
    loss = rpgan(score_real, score_fake) if cfg.loss == "rpgan" else score_fake.mean() - score_real.mean()
    loss = loss + gp + cfg.aux_weight * aux
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    if cfg.loss == "wgan-clip":
        for name, weight in D.named_parameters():
            if not name.startswith("attributes"):  # the critic's weights
                weight.data.clamp_(-cfg.clip, cfg.clip)
    return dict(d_loss=loss, d_real=score_real.mean(), d_fake=score_fake.mean(), penalty=gp, aux_real=aux)


def g_step(D: nn.Module, opt: Optimizer, real: Tensor, fake: Tensor, y: Tensor, cfg: Config) -> dict:
    """Update G by its images fake = G(z, y), still attached to it; real images are used only by the
    relativistic loss. Reads cfg.loss, aux_weight, precision.
    """
    with no_param_grads(D), blocks.cached_spectral_norm(D), autocast(real, cfg.precision):
        score, logits = D(fake, y)
        score_real = D(real, y)[0].float() if cfg.loss == "rpgan" else None
    score = score.float()
    aux = F.binary_cross_entropy_with_logits(logits.float(), y)
    loss = (rpgan(score, score_real) if cfg.loss == "rpgan" else -score.mean()) + cfg.aux_weight * aux
    opt.zero_grad()
    loss.backward()
    dist.average_gradients(opt)  # under torchrun
    opt.step()
    return dict(g_loss=loss, aux_fake=aux)


# ---------------------------------------------------------------------- attributes to generate, sample grids
def sample_attributes(data: Data, n: int, g: torch.Generator, wanted: Sequence[int] = ()) -> Tensor:
    """Draw attributes [n, A]: uniform within each group; without groups, those of training images. All have
    the `wanted` ones; UserError if two of these are of one group.
    """
    if data.groups:
        picks = [F.one_hot(torch.randint(len(c), (n,), generator=g), len(c)) for c in data.groups]
        y = torch.cat(picks, 1).float()
    else:
        y = data.labels[torch.randint(len(data.labels), (n,), generator=g)]
    for attribute in wanted:
        y = set_attribute(y, attribute, 1, data)
    if not y[:, wanted].all():
        raise UserError(f"--with: a face has only one of {', '.join(data.classes[i] for i in wanted)}")
    return y


def set_attribute(y: Tensor, attribute: int, value: int, data: Data) -> Tensor:
    """Attributes [N, A] with one set to `value`, and the others of its group to 0."""
    y = y.clone()
    y[:, next((list(columns) for columns in data.groups if attribute in columns), [])] = 0
    y[:, attribute] = value
    return y


def save_pictures(ema: EMA, data: Data, run: Run) -> None:
    """Save grids: samples, real above generated, each attribute set."""
    folder, g = run.folder, torch.Generator().manual_seed(run.cfg.seed)
    z, y = torch.randn(64, run.cfg.z_dim, generator=g), sample_attributes(data, 64, g)
    save_grid(folder / "samples.png", ema(z, y), run.title)
    if len(data.images):
        index = torch.randint(len(data.images), (32,), generator=g)
        save_grid(folder / "real_beside_generated.png",
                  real_above_generated(data.images[index], ema(z[:32], data.labels[index])),
                  f"{run.title}: training images, below each row generated ones with the same attributes")
    rows, what = [], "the same eight faces in each row, with one attribute set"
    for a in range(min(len(data.classes), 40)):
        rows.append(ema(z[:8], set_attribute(y[:8], a, 1, data)))
        if not data.groups:
            what = "four faces without one attribute, then with it"
            rows[a][4:], rows[a][:4] = rows[a][:4].clone(), ema(z[:4], set_attribute(y[:4], a, 0, data))
    save_grid(folder / "attributes.png", torch.cat(rows), f"{run.title}: {what}", rows=data.classes[:40])


# ---------------------------------------------------------------------- training
def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_faces)
    batches = Batches(data, cfg.batch_size, cfg.seed, device, dist.rank(), dist.world_size())

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size, cfg.g_cond)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_norm, cfg.d_cond)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = EMA(G, cfg.ema)  # is sampled and scored
    opt_g = Adam(G.parameters(), cfg.lr_g, (cfg.beta1, cfg.beta2), fused=True)
    opt_d = Adam(D.parameters(), cfg.lr_d, (cfg.beta1, cfg.beta2), fused=True)
    run.register(data, cfg.loss, f"D norm {cfg.d_norm}, {cfg.d_cond}", f"G {cfg.g_cond}", f"ch {cfg.ch}",
                 G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    scorer = evaluator.get_scorer(run, data)
    wanted = pick_columns(cfg.with_, data.classes, "the run", "--with") if cfg.with_ else []

    def sample(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        y = sample_attributes(data, n, g, wanted)
        return ema(torch.randn(n, cfg.z_dim, generator=g), y), y

    for step in run.steps():
        share = blocks.linear_decay(step, cfg.iters, cfg.lr_decay_from)
        opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = cfg.lr_g * share, cfg.lr_d * share
        for k in range(cfg.n_dis):  # each step of D has its own images; G's step shares the last ones
            real, y = batches((step - 1) * cfg.n_dis + k)
            with autocast(real, cfg.precision):
                fake = G(torch.randn(len(real), cfg.z_dim, device=device), y)
            real, fake = (blocks.random_translate(x, cfg.augment) for x in (real, fake))  # for D
            run.log(**d_step(D, opt_d, real, fake.detach(), y, cfg))
        run.log(**g_step(D, opt_g, real, fake, y, cfg))
        ema.update(step)

        if run.is_due("sample"):
            run.log_images(sample(64, torch.Generator().manual_seed(cfg.seed))[0])
        if scorer and run.is_due("eval"):
            run.log_scores(**scorer.validate(sample))

    evaluator.finish(run, data, scorer, sample, lambda: save_pictures(ema, data, run))


if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
