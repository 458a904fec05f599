"""ACGAN on faces with attributes: four adversarial losses, three norms of D, two conditions each of D and G.

Odena et al. 2017 (auxiliary classifier), Arjovsky et al. 2017 (clipping), Gulrajani et al. 2017 (WGAN-GP), Wu
et al. 2018 (WGAN-div), Huang et al. 2024 (paired), Miyato et al. 2018, Miyato & Koyama 2018 (projection).

    python acgan_celeba.py --quick                                # minutes on two CPU cores
    python acgan_celeba.py --d-norm spectral --d-cond projection  # the write-up's best of its six, one GPU
    python acgan_celeba.py --resume runs/acgan_celeba             # continue; or --sample, --eval a run
    python benchmarks/sweep.py acgan_celeba.py variants           # all six, one table

Results, with commands and hardware: results/README.md.
"""
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from common.blocks import Average, frozen, init_dcgan, moved, normed_once
from common.cli import Settings
from common.datasets import Batches, Data, load_faces, pick_columns
from common.errors import UserError
from common.pictures import real_above_generated, save_grid, save_images
from common.run import Run, launch


@dataclass
class Config(Settings):
    iters: int = 30_000  # iterations; one is n_dis steps of D and one of G
    batch_size: int = 32  # images a step
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
    beta1: float = 0.5  # Adam's first decay rate; the write-up gives none for its GAN: these are WGAN-GP's
    beta2: float = 0.9  # its second
    loss: Literal["wgan-gp", "wgan-clip", "wgan-div", "paired"] = "wgan-gp"  # adversarial loss
    d_norm: Literal["batch", "spectral", "none"] = "batch"  # D's norm: of activations, of weights, or none
    d_cond: Literal["concat", "projection"] = "concat"  # how the attributes enter D's score
    g_cond: Literal["maps", "input"] = "maps"  # attributes enter G before each layer, or with z only
    gp_weight: float = 10.0  # λ of WGAN-GP's penalty
    aux_weight: float = 20.0  # λ of the attributes' cross-entropy, in both losses
    clip: float = 0.01  # WGAN-clip: largest absolute weight of D
    augment: float = 0.0  # mirror D's images at random, shift them by up to this share of their size; 0: no
    gamma: float = 1.0  # paired: weight of the mean of R1 and R2, D's gradients at real, generated images

    def __post_init__(self):
        super().__post_init__()
        if self.loss == "wgan-clip" and self.d_norm == "spectral":
            raise UserError("--loss wgan-clip: clipping does nothing with --d-norm spectral: change one")


QUICK = dict(iters=4000, n_dis=1, ch=8, image_size=64, ema=0.99, loss="paired", d_norm="none",
             d_cond="projection", aux_weight=5.0, beta1=0.0, beta2=0.99, n_synthetic=4000, log_every=100,
             sample_every=200, eval_every=1000, save_every=1000, eval_images=1000)

# the write-up's table, for benchmarks/sweep.py; behind each its best FID there, of 5,000 images
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
    n = (image_size // 4).bit_length() - 1
    return [16 * ch >> k for k in reversed(range(n))]


class Generator(nn.Module):
    """z [B, z_dim], attributes y [B, A] of 0 and 1 → images [B, 3, S, S] in [-1, 1].

    cond "maps": y joins the input of every layer, as A constant planes from the first ConvT on; "input": y
    joins z only.
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

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.first(torch.cat([z, y], 1)).view(len(z), -1, 4, 4)  # [B, 16·ch, 4, 4]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = F.relu(norm(h))
            if self.maps:
                h = torch.cat([h, y[..., None, None].expand(-1, -1, *h.shape[2:])], 1)
            h = conv(h)  # at 128: [B, 8·ch, 8, 8], [B, 4·ch, 16, 16], …, [B, 3, 128, 128]
        return h.tanh()


class Discriminator(nn.Module):
    """images [B, 3, S, S], attributes y [B, A] → adversarial scores [B], attribute logits [B, A].

    cond "concat": a linear layer on (features, y), as in the write-up; y only shifts the score. "projection":
    ψ(h) + ⟨V y, h⟩ (Miyato & Koyama 2018, eq. 3). norm "spectral": on all layers but the attributes'.
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

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)  # at 128: [B, ch, 64, 64], …, [B, 16·ch, 4, 4]
        h = x.flatten(1)  # [B, 256·ch]
        if self.projection:
            score = self.score(h)[:, 0] + (self.embed(y) * h).sum(1)
        else:
            score = self.score(torch.cat([h, y], 1))[:, 0]
        return score, self.attributes(h)


# ---------------------------------------------------------------------- one step of D, one of G

def d_step(cfg: "Config", G: nn.Module, D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor,
           y: torch.Tensor, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update D with real images [B, 3, S, S] and generated ones of the same attributes [B, A]."""
    adversarial = losses.paired if cfg.loss == "paired" else losses.wasserstein_d
    with normed_once(D):
        with autocast():
            with torch.no_grad():
                fake = G(torch.randn(len(real), cfg.z_dim, device=real.device), y)
                real, fake = moved(real, cfg.augment), moved(fake, cfg.augment)
            # two passes, because real and fake images each need their own batch-norm statistics
            (score_real, logits), (score_fake, _) = D(real, y), D(fake, y)
        penalty = torch.zeros((), device=real.device)
        if cfg.loss == "wgan-gp":
            penalty = cfg.gp_weight * losses.gradient_penalty(lambda x: D(x, y)[0], real, fake)
        elif cfg.loss == "wgan-div":
            penalty = losses.wasserstein_divergence(lambda x: D(x, y)[0], real, fake)
        elif cfg.loss == "paired":  # an eighth of each kind is enough
            some, y_some = torch.cat([real[::8], fake[::8].float()]), y[::8].repeat(2, 1)
            penalty = cfg.gamma * losses.zero_centred_penalty(lambda x: D(x, y_some)[0], some)
    score_real, score_fake = score_real.float(), score_fake.float()
    aux = F.binary_cross_entropy_with_logits(logits.float(), y)  # of real images only
    loss = adversarial(score_real, score_fake) + penalty + cfg.aux_weight * aux
    opt.zero_grad()
    loss.backward()
    opt.step()
    if cfg.loss == "wgan-clip":
        with torch.no_grad():
            for name, weight in D.named_parameters():
                if not name.startswith("attributes"):  # which is not part of the critic
                    weight.clamp_(-cfg.clip, cfg.clip)
    return dict(d_loss=loss, d_real=score_real.mean(), d_fake=score_fake.mean(), penalty=penalty,
                aux_real=aux)


def g_step(cfg: "Config", G: nn.Module, D: nn.Module, opt: torch.optim.Optimizer, real: torch.Tensor,
           y: torch.Tensor, autocast=nullcontext) -> dict[str, torch.Tensor]:
    """Update G with images of the attributes [B, A], those of `real`, which the paired loss needs."""
    with frozen(D), normed_once(D), autocast():
        fake = G(torch.randn(len(y), cfg.z_dim, device=y.device), y)
        score, logits = D(moved(fake, cfg.augment), y)
        score_real = D(moved(real, cfg.augment), y)[0].float() if cfg.loss == "paired" else None
    score, aux = score.float(), F.binary_cross_entropy_with_logits(logits.float(), y)
    loss = losses.paired(score, score_real) if cfg.loss == "paired" else losses.hinge_g(score)
    loss = loss + cfg.aux_weight * aux
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(g_loss=loss, aux_fake=aux)


# ---------------------------------------------------------------------- requested attributes, pictures

def request(data: Data, n: int, g: torch.Generator, wanted: Sequence[int] = ()) -> torch.Tensor:
    """Attributes [n, A] to generate: uniform within each group; without groups, those of training images.

    wanted: attributes that all have. Raises UserError if two are of one group.
    """
    if data.groups:
        picks = [F.one_hot(torch.randint(len(c), (n,), generator=g), len(c)) for c in data.groups]
        y = torch.cat(picks, 1).float()
    else:
        y = data.labels[torch.randint(len(data.labels), (n,), generator=g)]
    for attribute in wanted:
        y = switched(y, attribute, 1, data)
    if not y[:, wanted].all():
        raise UserError(f"--with: a face has only one of {', '.join(data.classes[i] for i in wanted)}")
    return y


def switched(y: torch.Tensor, attribute: int, value: int, data: Data) -> torch.Tensor:
    """Attributes [N, A] with one set to `value`, and the others of its group to 0."""
    y = y.clone()
    y[:, next((list(columns) for columns in data.groups if attribute in columns), [])] = 0
    y[:, attribute] = value
    return y


@torch.no_grad()
def save_pictures(make: Callable, data: Data, run: Run, title: str) -> None:
    """Grids: samples, real beside generated, each attribute switched; make(z, y) → images."""
    folder, g = run.folder, torch.Generator().manual_seed(run.cfg.seed)
    z, y = torch.randn(64, run.cfg.z_dim, generator=g), request(data, 64, g)
    save_grid(folder / "samples.png", make(z, y), title)
    if len(data.images):
        index = torch.randint(len(data.images), (32,), generator=g)
        save_grid(folder / "real_beside_generated.png",
                  real_above_generated(data.images[index], make(z[:32], data.labels[index])),
                  f"{title}: lines of training images, below each generated ones with the same attributes")

    # a line for each attribute: eight faces with it or, without groups, four without and with it
    each = range(len(data.classes))
    if data.groups:
        what = "the same eight faces in each line, with one attribute set"
        pictures = [make(z[:8], switched(y[:8], a, 1, data)) for a in each]
    else:
        what = "four faces without one attribute, then with it"
        pictures = [make(z[:4].repeat(2, 1), torch.cat([switched(y[:4], a, value, data) for value in (0, 1)]))
                    for a in each]
    save_grid(folder / "attributes.png", torch.cat(pictures), f"{title}: {what}", rows=data.classes)


# ---------------------------------------------------------------------- training

def main(run: Run) -> None:
    cfg, device = run.cfg, run.device
    data = run.get_data(load_faces)
    batches = Batches(data, cfg.batch_size, cfg.seed, device)

    torch.manual_seed(cfg.seed)
    G = Generator(len(data.classes), cfg.z_dim, cfg.ch, cfg.image_size, cfg.g_cond)
    D = Discriminator(len(data.classes), cfg.ch, cfg.image_size, cfg.d_norm, cfg.d_cond)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    ema = Average(G, cfg.ema)  # what is sampled and scored
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr_g, betas=(cfg.beta1, cfg.beta2), fused=True)
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr_d, betas=(cfg.beta1, cfg.beta2), fused=True)
    run.track(data, G=G, D=D, ema=ema, opt_g=opt_g, opt_d=opt_d)
    judge = evaluator.get_judge(cfg, data, device) if run.wants_scores else None
    inception = evaluator.get_inception(cfg.fid_weights, device) if judge else None

    title = run.title(data, cfg.loss, f"D {cfg.d_norm} norm, {cfg.d_cond}", f"G {cfg.g_cond}", f"ch {cfg.ch}")
    g = torch.Generator().manual_seed(cfg.seed)
    fixed = torch.randn(64, cfg.z_dim, generator=g), request(data, 64, g)
    # best.pt is chosen by the distance to training images: held-out ones are for the final scores only
    validation = judge and judge.moments(data.validation_images())

    def make(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ema(z.to(device), y.to(device))

    def sample(n: int, g: torch.Generator, wanted: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        y = request(data, n, g, wanted)
        return make(torch.randn(n, cfg.z_dim, generator=g), y), y

    def wrong_labels(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return data.training_sample(n, g)[0], request(data, n, g)

    for step in run.steps():
        for k in range(cfg.n_dis):
            real, y = batches((step - 1) * cfg.n_dis + k)
            run.record(**d_step(cfg, G, D, opt_d, real, y, run.autocast))
        run.record(**g_step(cfg, G, D, opt_g, real, y, run.autocast))
        ema.update(step)

        if run.due("sample"):
            run.picture(make(*fixed), title)
        if judge and run.due("eval"):
            found = evaluator.score(sample, judge, cfg.eval_images, 1, cfg.seed, data.groups, validation)
            fd = found["FD (judge)"][0]
            run.score(best=-fd, fd_judge=fd, accuracy=found["accuracy"][0])

    if judge:  # other z than best.pt was chosen with
        options = dict(n=cfg.eval_images, draws=cfg.eval_draws, seed=cfg.seed + 1)
        scoring = options | dict(groups=data.groups, real=judge.moments(data.test_images))
        # the best possible scores, and those of a G with perfect images that ignores the attributes
        scores = {"training images": evaluator.score(data.training_sample, judge, **scoring),
                  "their labels shuffled": evaluator.score(wrong_labels, judge, **scoring)}
    for name, step in run.checkpoints("last", "best"):  # summary and pictures are of best.pt
        if judge:
            scores[name] = {"step": step} | evaluator.score(sample, judge, **scoring)
            if inception:
                scores[name]["FID"] = evaluator.score_fid(sample, inception, data.test_images, **options)
    if cfg.to:
        wanted = pick_columns(cfg.with_, data.classes, "the run", "--with") if cfg.with_ else []
        save_images(partial(sample, wanted=wanted), cfg, data.classes)
    elif run.wants_pictures:
        save_pictures(make, data, run, f"{title}, step {step}")
    if judge:
        evaluator.report(run, data, judge, scores, ["FD (judge)", "accuracy", "exact", "FID"])


if __name__ == "__main__":
    launch(main, Config, QUICK)
