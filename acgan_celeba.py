"""ACGAN on faces with attributes: five adversarial losses, two norms of D, two conditions each of D and G.

Auxiliary classifier: Odena et al. 2017; WGAN by clipping: Arjovsky et al. 2017; WGAN-GP: Gulrajani et al.
2017; WGAN-div: Wu et al. 2018; spectral norm: Miyato et al. 2018; projection: Miyato & Koyama 2018.

    python acgan_celeba.py --quick                                   # minutes on two CPU cores
    python acgan_celeba.py --d-norm spectral --d-cond projection     # the write-up's best of its six, one GPU
    python acgan_celeba.py --sweep                                   # all six, one table
    python acgan_celeba.py --resume runs/acgan_celeba                # go on; or --sample, --eval a run

Measured so far on a CPU (AMD EPYC; see results/), 64×64, --ch 8, 2,000 iterations with one D step each, about
13 minutes of one core: FD (judge) 62 on drawn faces and 4.1 on CelebA for the baseline, 38 and 2.7 with
--g-cond input, 112 and 12 for the write-up's best; training images have 5.9 and 1.1. The full size has not
been run yet.
"""
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import evaluator
from common import losses, run
from common.blocks import init_dcgan, normed_once
from common.datasets import Batches, Faces, load_faces, pick_source


@dataclass
class Config:
    iters: int = 30_000  # iterations; one is n_dis steps of D and one of G
    batch_size: int = 32  # images a step
    lr_g: float = 1e-3  # Adam's rate for G
    lr_d: float = 1e-3  # Adam's rate for D
    n_dis: int = 5  # D steps before each G step
    z_dim: int = 128  # dimensions of the latent z ~ N(0, I)
    ch: int = 32  # width: a sixteenth of the feature maps at 4×4
    image_size: Literal[32, 64, 128] = 128  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (data/celeba if it is there, else drawn), drawn, or a folder of faces
    attributes: str = ""  # names of attributes, with commas between; empty: eight of CelebA's, all of others
    crop: int = 0  # side of the square cut out of the middle of each image; 0: the largest
    skip_bad_images: bool = False  # leave out, and count, images that can't be used
    n_drawn: int = 10_000  # drawn faces
    out: str = ""  # folder of the run; empty: runs/acgan_celeba
    seed: int = 0  # of weights, noise and the order of batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks; penalties stay in fp32
    deterministic: bool = False  # the same bits on every CUDA run, a little slower
    log_every: int = 100  # iterations between rows of metrics.csv
    sample_every: int = 500  # iterations between pictures
    eval_every: int = 1000  # iterations between scores; the best is kept as best.pt
    save_every: int = 1000  # iterations between checkpoints
    judge: str = "auto"  # auto (trained once and cached), none, or a checkpoint
    judge_width: int = 64  # width of the judge trained by auto; 64 is ResNet-18
    judge_steps: int = 5000  # its training steps, of 32 images each
    eval_images: int = 5000  # generated images a score is measured on
    eval_draws: int = 3  # draws of z and labels that a score is the mean of
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    # the method
    loss: Literal["wgan-gp", "wgan-clip", "wgan-div", "hinge", "bce"] = "wgan-gp"  # adversarial loss
    d_norm: Literal["batch", "spectral"] = "batch"  # D's norm: of activations, or of weights
    d_cond: Literal["concat", "projection"] = "concat"  # how the attributes enter D's score
    g_cond: Literal["maps", "input"] = "maps"  # attributes enter G before each layer, or with z only
    gp_weight: float = 10.0  # λ of WGAN-GP's penalty
    aux_weight: float = 20.0  # λ of the attributes' cross-entropy, in both losses
    aux_fake: bool = False  # D learns attributes from generated images too, not from real ones alone
    clip: float = 0.01  # WGAN-clip: largest weight of D
    div_k: float = 2.0  # WGAN-div: weight of its penalty
    div_p: float = 6.0  # WGAN-div: power of the gradient's norm


QUICK = dict(iters=1000, n_dis=1, ch=8, image_size=64, ema=0.99, n_drawn=4000, log_every=50, sample_every=100,
             eval_every=250, save_every=250, judge_width=16, judge_steps=1000, eval_images=1000)

# what --sweep goes through: the write-up's table; behind each its best FID there, of 5,000 images
VARIANTS = {
    "gp-bn-concat-maps": {},  # 89.276, the baseline
    "gp-sn-concat-maps": dict(d_norm="spectral"),  # 63.240
    "gp-bn-concat-input": dict(g_cond="input"),  # 131.046
    "gp-sn-projection-maps": dict(d_norm="spectral", d_cond="projection"),  # 44.292
    "clip-bn-concat-maps": dict(loss="wgan-clip"),  # 216.239
    "div-bn-concat-maps": dict(loss="wgan-div"),  # 55.371
}


# ---------------------------------------------------------------------- networks

class Generator(nn.Module):
    """z [B, z_dim], attributes y [B, A] of 0 and 1 → images [B, 3, S, S] in [-1, 1].

    cond "maps": y joins the input of every layer, as A constant planes from the first ConvT on; "input": z
    alone.
    """

    def __init__(self, n_attributes: int, z_dim: int, ch: int, image_size: int, cond: str):
        super().__init__()
        n_blocks = (image_size // 4).bit_length() - 1  # 4×4 doubled until it is the image
        widths = [16 * ch >> k for k in range(n_blocks)]  # at 128: 16, 8, 4, 2, 1 times ch
        self.maps = cond == "maps"
        planes = n_attributes if self.maps else 0
        self.first = nn.Linear(z_dim + n_attributes, widths[0] * 4 * 4, bias=False)
        self.convs = nn.ModuleList(nn.ConvTranspose2d(i + planes, o, 4, 2, 1, bias=o == 3)
                                   for i, o in zip(widths, [*widths[1:], 3]))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        init_dcgan(self)

    def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.first(torch.cat([z, y], 1)).view(len(z), -1, 4, 4)  # [B, 16·ch, 4, 4]
        for norm, conv in zip(self.norms, self.convs):
            h = F.relu(norm(h))
            if self.maps:
                h = torch.cat([h, y[..., None, None].expand(-1, -1, *h.shape[2:])], 1)
            h = conv(h)  # at 128: [B, 8·ch, 8, 8], [B, 4·ch, 16, 16], …, [B, 3, 128, 128]
        return h.tanh()


class Discriminator(nn.Module):
    """images [B, 3, S, S], attributes y [B, A] → adversarial scores [B], attribute logits [B, A].

    cond "concat": the score is one linear layer on (features, y), as in the write-up, so that y only shifts
    it; "projection": ψ(h) + ⟨V y, h⟩ (Miyato & Koyama 2018, eq. 3). norm "spectral" is of every layer
    that the score passes; the attributes' layer, a classifier, needs no bound.
    """

    def __init__(self, n_attributes: int, ch: int, image_size: int, norm: str, cond: str):
        super().__init__()
        n_blocks = (image_size // 4).bit_length() - 1
        widths = [16 * ch >> k for k in range(n_blocks)][::-1]  # at 128: 1, 2, 4, 8, 16 times ch
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in zip([3, *widths], widths))
        batch = norm == "batch"
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) if batch and k else nn.Identity()
                                   for k, w in enumerate(widths))  # none next to the image
        features = widths[-1] * 4 * 4
        self.projection = cond == "projection"
        self.score = nn.Linear(features + (0 if self.projection else n_attributes), 1)
        self.embed = nn.Linear(n_attributes, features, bias=False) if self.projection else None
        self.attributes = nn.Linear(features, n_attributes)
        init_dcgan(self)
        if norm == "spectral":  # after the initialisation, which a wrapped weight would lose
            for layer in [*self.convs, self.score, *([self.embed] if self.projection else [])]:
                spectral_norm(layer)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(conv(x)), 0.2)  # at 128: [B, ch, 64, 64], …, [B, 16·ch, 4, 4]
        h = x.flatten(1)  # [B, 256·ch]
        if self.projection:
            score = self.score(h)[:, 0] + (self.embed(y) * h).sum(1)
        else:
            score = self.score(torch.cat([h, y], 1))[:, 0]
        return score, self.attributes(h)


# ---------------------------------------------------------------------- training

def build(cfg: Config, n_attributes: int, device: torch.device) -> tuple[Generator, Discriminator, Generator]:
    """G, D and the averaged copy of G, freshly initialised from the global random state."""
    G = Generator(n_attributes, cfg.z_dim, cfg.ch, cfg.image_size, cfg.g_cond)
    D = Discriminator(n_attributes, cfg.ch, cfg.image_size, cfg.d_norm, cfg.d_cond)
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    return G, D, copy.deepcopy(G).eval().requires_grad_(False)


def check(cfg: Config) -> None:
    """Raises UserError for values that do not go together."""
    refused = {
        f"--ema {cfg.ema}: must be below 1": cfg.ema >= 1,
        "--loss wgan-clip with --d-norm spectral: spectral norm divides a weight's size out again, so "
        "clipping does nothing; take --d-norm batch, or another loss":
            cfg.loss == "wgan-clip" and cfg.d_norm == "spectral",
        "--loss wgan-clip with --clip 0 leaves D no weights": cfg.loss == "wgan-clip" and not cfg.clip,
        f"--div-p {cfg.div_p}: below 1 the penalty's slope is infinite where a gradient is 0": cfg.div_p < 1,
        "--aux-fake with --aux-weight 0: there is no loss of attributes to extend; leave one of them out":
            cfg.aux_fake and not cfg.aux_weight,
    }
    for reason, holds in refused.items():
        if holds:
            raise run.UserError(reason)


def load_data(cfg: Config) -> Faces:
    return load_faces(cfg.data, cfg.image_size, cfg.attributes, cfg.crop, cfg.skip_bad_images, cfg.n_drawn)


def train(cfg: Config, resume: Path | None = None) -> int:
    """Train, score, and leave everything in the run's folder; returns the exit status."""
    # ---- data, judge, networks, optimisers
    device = run.pick_device(cfg.device)
    if cfg.deterministic:
        run.set_deterministic()
    check(cfg)
    cfg.data = pick_source(cfg.data, "data/celeba")
    data = load_data(cfg)
    batches = Batches(data.images, data.labels, cfg.batch_size, cfg.seed, device)
    if resume is None and cfg.out:
        run.free_folder(cfg.out, "")  # ends here where it exists, not after the judge's training
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)

    torch.manual_seed(cfg.seed)
    G, D, ema = build(cfg, len(data.classes), device)
    # the write-up names the betas of its VAE alone; these are also WGAN-GP's authors' for such networks
    adam = dict(betas=(0.5, 0.9), fused=True, capturable=device.type == "cuda")
    opt_g = torch.optim.Adam(G.parameters(), torch.tensor(cfg.lr_g, device=device), **adam)
    opt_d = torch.optim.Adam(D.parameters(), torch.tensor(cfg.lr_d, device=device), **adam)
    ema_weight = torch.tensor(1.0, device=device)  # the new G's share in the average
    names = ("d_loss", "g_loss", "d_real", "d_fake", "penalty", "aux_real", "aux_fake")
    sums, logged = torch.zeros(len(names), device=device), 0  # their sums since the step last logged
    start, best = 0, -1.0

    # ---- resume
    if resume is not None and (resume / "last.pt").exists():
        state = run.load_checkpoint(resume / "last.pt", device)
        if state["data"] != data.digest:
            raise run.UserError(f"{cfg.data} no longer holds the images of {resume}: bring them back")
        for name, thing in (("G", G), ("D", D), ("ema", ema), ("opt_g", opt_g), ("opt_d", opt_d)):
            thing.load_state_dict(state[name])
        start, best, sums, logged = (state[key] for key in ("step", "best", "sums", "logged"))
        run.set_rng_state(state["rng"], device)

    # ---- one iteration: n_dis steps of D, one of G, the average. The host reads nothing back
    averaged = list(zip(ema.state_dict().values(), G.state_dict().values()))  # batch norm's statistics too
    adversarial_d = {"hinge": losses.hinge_d, "bce": losses.bce_d}.get(cfg.loss, losses.wasserstein_d)
    adversarial_g = losses.bce_g if cfg.loss == "bce" else losses.hinge_g  # -E[D(G(z))]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    def d_step(images: torch.Tensor, labels: torch.Tensor) -> None:
        real, y = images.float() / 127.5 - 1, labels.float()
        z = torch.randn(len(real), cfg.z_dim, device=device)
        with normed_once(D):
            with autocast():
                with torch.no_grad():
                    fake = G(z, y)
                # real and fake apart: each has its own statistics in D's batch norm
                (score_real, seen_real), (score_fake, seen_fake) = D(real, y), D(fake, y)

            def critic(x: torch.Tensor) -> torch.Tensor:
                return D(x, y)[0]

            penalty = torch.zeros((), device=device)
            if cfg.loss == "wgan-gp":
                penalty = cfg.gp_weight * losses.gradient_penalty(critic, real, fake)
            elif cfg.loss == "wgan-div":
                penalty = losses.wasserstein_divergence(critic, real, fake, cfg.div_k, cfg.div_p)
        aux_real = F.binary_cross_entropy_with_logits(seen_real.float(), y)
        aux_fake = F.binary_cross_entropy_with_logits(seen_fake.float(), y)
        aux = aux_real + aux_fake if cfg.aux_fake else aux_real
        d_loss = adversarial_d(score_real.float(), score_fake.float()) + penalty + cfg.aux_weight * aux
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()
        if cfg.loss == "wgan-clip":
            with torch.no_grad():
                for weight in D.parameters():
                    weight.clamp_(-cfg.clip, cfg.clip)
        seen = torch.stack([d_loss, torch.zeros_like(d_loss), score_real.float().mean(),
                            score_fake.float().mean(), penalty, aux_real, torch.zeros_like(d_loss)])
        sums.add_(seen.detach(), alpha=1 / cfg.n_dis)

    def g_step(labels: torch.Tensor) -> None:
        y = labels.float()
        z = torch.randn(len(y), cfg.z_dim, device=device)
        D.requires_grad_(False)
        with normed_once(D), autocast():
            score, seen = D(G(z, y), y)
        D.requires_grad_(True)
        aux_fake = F.binary_cross_entropy_with_logits(seen.float(), y)
        g_loss = adversarial_g(score.float()) + cfg.aux_weight * aux_fake
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()
        sums[1] += g_loss.detach()
        sums[6] += aux_fake.detach()

    def iteration(chunk: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for images, labels in chunk:
            d_step(images, labels)
        g_step(chunk[-1][1])
        with torch.no_grad():
            for average, new in averaged:
                average.lerp_(new, ema_weight) if new.is_floating_point() else average.copy_(new)

    # ---- what is written along the way
    g = torch.Generator().manual_seed(cfg.seed)
    fixed = torch.randn(64, cfg.z_dim, generator=g).to(device), ask(data, 64, g).to(device)
    if judge:  # best.pt is chosen by the distance to training images; scores are told with held-out ones
        g = torch.Generator().manual_seed(0)
        chosen = data.images[torch.randperm(len(data.images), generator=g)[:len(data.test_images)]]
        choice = evaluator.real_moments(judge, chosen, device)

    def save(name: str, step: int) -> None:
        run.save_checkpoint(folder.folder / name, dict(
            G=G.state_dict(), D=D.state_dict(), ema=ema.state_dict(), opt_g=opt_g.state_dict(),
            opt_d=opt_d.state_dict(), step=step, best=best, sums=sums, logged=logged,
            data=data.digest, rng=run.rng_state(device), config=vars(cfg)))

    def due(every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == cfg.iters)

    # ---- the loop
    columns = [*names, "fd_judge", "accuracy"]
    name = "acgan_celeba" + ("-drawn" if cfg.data == "drawn" else "")
    with run.Run(cfg, Path(__file__).name, name, resume, start, columns) as folder:
        step = start
        for step in range(start + 1, cfg.iters + 1):
            ema_weight.fill_(1 - min(cfg.ema, step / (step + 10)))  # the first steps are soon forgotten
            iteration([batches((step - 1) * cfg.n_dis + k) for k in range(cfg.n_dis)])

            stop = folder.signal is not None
            if due(cfg.log_every, step):
                means = dict(zip(names, (sums / (step - logged)).tolist()))
                sums.zero_()
                logged = step
                folder.log(step, **means)
                folder.status(step, **means)
            if due(cfg.sample_every, step):
                folder.picture(step, ema(fixed[0], fixed[1].float()), f"{title(cfg, data)}, step {step}")
            if judge and due(cfg.eval_every, step):
                result = evaluator.score_faces(sampler(cfg, ema, data), judge, choice, data.groups,
                                               cfg.eval_images, 1, cfg.seed)
                fd = result["FD (judge)"][0]
                folder.log(step, fd_judge=fd, accuracy=result["accuracy"][0])
                if best < 0 or fd < best:
                    best = fd
                    save("best.pt", step)
            if stop or step == cfg.iters or due(cfg.save_every, step):  # the end is always kept
                save("last.pt", step)
            if stop:
                break

        # ---- the end
        folder.draw_progress(title(cfg, data), frames=10)
        if folder.signal is not None:
            print(f"\nstopped at step {step}; to go on: {Path(__file__).name} --resume {folder.folder}")
            return 128 + folder.signal
        draw(cfg, ema, data, folder.folder, title(cfg, data))
        print(f"{folder.folder}: {step} iterations, {folder.seconds:.0f} s")
        if judge:
            evaluate(cfg, data, judge, folder.folder, device)
    return 0


def title(cfg: Config, data: Faces) -> str:
    return (f"acgan_celeba on {data.name}, {cfg.loss}, D {cfg.d_norm} norm and {cfg.d_cond}, G {cfg.g_cond}, "
            f"ch {cfg.ch}, seed {cfg.seed}")


# ---------------------------------------------------------------------- pictures and scores

def ask(data: Faces, n: int, g: torch.Generator) -> torch.Tensor:
    """Attributes [n, A] to ask for: of each group one, evenly; without groups, as training images have."""
    if not data.groups:
        return data.labels[torch.randint(len(data.labels), (n,), generator=g)]
    picks = [torch.randint(len(columns), (n,), generator=g) for columns in data.groups]
    return torch.cat([F.one_hot(pick, len(columns)) for pick, columns in zip(picks, data.groups)], 1)


def switched(y: torch.Tensor, attribute: int, value: int, data: Faces) -> torch.Tensor:
    """Attributes [N, A] with one set to `value`, and the others of its group to 0."""
    y = y.clone()
    for columns in data.groups:
        if attribute in columns:
            y[:, list(columns)] = 0
    y[:, attribute] = value
    return y


def sampler(cfg: Config, G: nn.Module, data: Faces):
    """A function (how many, generator) → images, attributes asked for, as evaluator.score_faces takes it."""
    device = next(G.parameters()).device

    def sample(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        y, z = ask(data, n, g), torch.randn(n, cfg.z_dim, generator=g)
        return G(z.to(device), y.float().to(device)), y
    return sample


def load(cfg: Config, folder: Path, name: str, data: Faces, device: torch.device) -> tuple[Generator, int]:
    """The averaged G of a checkpoint and the step it is from."""
    state = run.load_checkpoint(folder / name, device)
    _, _, ema = build(cfg, len(data.classes), device)
    ema.load_state_dict(state["ema"])
    return ema, state["step"]


@torch.no_grad()
def draw(cfg: Config, ema: nn.Module, data: Faces, folder: Path, heading: str) -> None:
    """Grids: samples, real beside generated, each attribute switched, all combinations."""
    device, g = next(ema.parameters()).device, torch.Generator().manual_seed(cfg.seed)

    def make(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ema(z.to(device), y.float().to(device)).cpu()

    z, y = torch.randn(64, cfg.z_dim, generator=g), ask(data, 64, g)
    run.save_grid(folder / "samples.png", make(z, y), heading)

    # four pairs of rows: real images, and under them generated ones with the same attributes
    index = torch.randint(len(data.images), (32,), generator=g)
    real = data.images[index].float() / 127.5 - 1
    rows = torch.stack([real, make(z[:32], data.labels[index])]).unflatten(1, (4, 8)).transpose(0, 1)
    kind = "drawn" if cfg.data == "drawn" else "real"
    run.save_grid(folder / "real_beside_generated.png", rows.flatten(0, 2),
                  f"{heading}: rows of {kind} images, under each generated ones with the same attributes")

    # a row for each attribute; along it eight faces with it, or four without and with it
    each = range(len(data.classes))
    if data.groups:
        said = "the same eight faces in every row, with"
        pictures = [make(z[:8], switched(y[:8], a, 1, data)) for a in each]
    else:
        said = "four faces, each without and with"
        pairs = [torch.stack([switched(y[:4], a, value, data) for value in (0, 1)], 1) for a in each]
        pictures = [make(z[:4].repeat_interleave(2, 0), pair.flatten(0, 1)) for pair in pairs]
    run.save_grid(folder / "attributes.png", torch.cat(pictures),
                  f"{heading}: {said} {', '.join(data.classes)}")

    if data.groups:
        every = torch.cartesian_prod(*(torch.arange(len(columns)) for columns in data.groups))
        every = torch.cat([F.one_hot(k, len(columns)) for k, columns in zip(every.T, data.groups)], 1)
        nrow = math.prod(map(len, data.groups[len(data.groups) // 2:]))
        run.save_grid(folder / "combinations.png", make(z[:1].expand(len(every), -1), every),
                      f"{heading}: all {len(every)} combinations, one z", nrow=nrow)


def evaluate(cfg: Config, data: Faces, judge: evaluator.Judge, folder: Path, device: torch.device) -> None:
    """Score best.pt and last.pt against the held-out images; print the tables and write scores.json."""
    real = evaluator.real_moments(judge, data.test_images, device)
    inception = evaluator.get_inception(cfg.fid_weights, device)
    much = cfg.eval_images, cfg.eval_draws, cfg.seed + 1  # other z than best.pt was chosen with
    scores = {"data": data.name, "judge": judge.title, "judge_held_out": judge.held_out,
              "n_real": len(data.test_images), "n_fake": cfg.eval_images, "draws": cfg.eval_draws,
              "attributes": evaluator.attribute_names(data)}

    def training_images(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(len(data.images), (n,), generator=g)
        return data.images[index].to(device) / 127.5 - 1, data.labels[index]

    def wrong_labels(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images, _ = training_images(n, g)
        return images, ask(data, n, g)

    # what is as good as it gets, and what a G would score that makes real images but heeds no attribute
    rows = {name: evaluator.score_faces(make, judge, real, data.groups, *much)
            for name, make in (("training images", training_images), ("their labels shuffled", wrong_labels))}
    for name in ("last", "best"):
        if (folder / f"{name}.pt").exists():
            ema, step = load(cfg, folder, f"{name}.pt", data, device)
            sample = sampler(cfg, ema, data)
            result = evaluator.score_faces(sample, judge, real, data.groups, *much)
            if inception:
                result["FID"] = evaluator.score_fid(lambda n, g: sample(n, g)[0], inception, data.test_images,
                                                    *much)
            rows[f"{name}.pt (step {step})"] = result
            scores[name] = {"step": step} | result
    scores |= {name: rows[name] for name in list(rows)[:2]}
    columns = ["FD (judge)", "accuracy", "exact", *(["FID"] if inception else [])]
    shown = scores.get("best", scores["last"])  # the write-up's figures are each variant's best
    scores["summary"] = {name: shown[name] for name in columns}
    print(f"\n{folder}: {cfg.eval_images} generated images against {len(data.test_images)} held-out images "
          f"of {data.name}, {cfg.eval_draws} draws; judge: {judge.title}")
    evaluator.print_table(rows, columns)
    print(f"\naccuracy of each attribute: {', '.join(rows)}")
    for k, attribute in enumerate(scores["attributes"]):
        shares = "".join(f"{result['by attribute'][0][k]:10.4f}" for result in rows.values())
        print(f"{attribute:<36}{shares}")
    run.write_whole(folder / "scores.json", lambda p: p.write_text(json.dumps(scores, indent=1) + "\n"))


def main() -> int:
    action, cfg, folder = run.parse(Config, QUICK, __doc__, variants=VARIANTS)
    if action == "sweep":
        return run.sweep(cfg, train)
    if action in ("train", "resume"):
        return train(cfg, folder)
    device = run.pick_device(cfg.device)
    data = load_data(cfg)
    name = "best.pt" if (folder / "best.pt").exists() else "last.pt"
    ema, step = load(cfg, folder, name, data, device)
    if action == "sample":
        draw(cfg, ema, data, folder, f"{title(cfg, data)}, step {step}")
        print(f"wrote the grids to {folder}")
        return 0
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)
    if judge is None:
        raise run.UserError("--eval needs a judge: --judge auto, or the path of one")
    evaluate(cfg, data, judge, folder, device)
    return 0


if __name__ == "__main__":
    run.entry(main)
