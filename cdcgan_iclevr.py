"""Concat-conditioned DCGAN on i-CLEVR: images of one to three asked-for objects.

DCGAN: Radford et al. 2016; conditions as inputs of both networks: Mirza & Osindero 2014. Its sibling with
spectral norm and projection is sngan_iclevr.py: same data, scores and pictures. Both see whole images,
squeezed to a square, where this one's write-up crops: that would cut off objects that the labels name.

    python cdcgan_iclevr.py --quick                      # minutes on two CPU cores
    python cdcgan_iclevr.py                              # the full job, 700 epochs, one GPU
    python cdcgan_iclevr.py --smooth-labels              # or --flip-labels 0.05, --d-cond projection
    python cdcgan_iclevr.py --resume runs/cdcgan_iclevr  # go on; --sample and --eval take a run as well

Measured so far on a CPU (AMD EPYC; see results/), accuracy on test.json and new_test.json of real i-CLEVR at
32×32, width 16, 7,500 iterations of 32 images, 6 minutes of one core, three seeds: 0.26 ± 0.07 and
0.35 ± 0.04; with --d-cond projection 0.35 ± 0.03 and 0.46 ± 0.02. The full size has not been run yet; the
write-up has 0.62 by another judge.
"""
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import evaluator
from common import losses, run
from common.blocks import init_dcgan
from common.datasets import Batches, LabelledScenes, load_iclevr, pick_source


@dataclass
class Config:
    iters: int = 98_000  # iterations; one is a step of D and one of G; 140 are an epoch of i-CLEVR
    batch_size: int = 128  # images a step
    lr_g: float = 2e-4  # Adam's rate for G
    lr_d: float = 1e-4  # Adam's rate for D; with equal rates D won, says the write-up
    halve_every: int = 50  # epochs after which both rates are halved, again and again; 0: never
    z_dim: int = 100  # dimensions of the latent z ~ N(0, I)
    ch: int = 64  # width: feature maps of the layers nearest the image
    image_size: Literal[32, 64, 128] = 64  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (data/iclevr if it is there, else drawn), drawn, or the folder of i-CLEVR
    n_scenes: int = 6003  # drawn scenes, of three images each
    out: str = ""  # folder of the run; empty: runs/cdcgan_iclevr
    seed: int = 0  # of weights, noise and the order of batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks
    deterministic: bool = False  # the same bits on every CUDA run, a little slower
    log_every: int = 100  # iterations between rows of metrics.csv
    sample_every: int = 500  # iterations between pictures
    eval_every: int = 1000  # iterations between scores; the best is kept as best.pt
    save_every: int = 1000  # iterations between checkpoints
    judge: str = "auto"  # auto (trained once and cached), none, or a checkpoint such as the course's
    judge_width: int = 64  # width of the judge trained by auto; 64 is ResNet-18
    judge_steps: int = 5000  # its training steps, of 32 images each
    eval_draws: int = 10  # draws of z that a score is the mean of
    # the method, and the tricks of the write-up
    d_cond: Literal["plane", "projection"] = "plane"  # the labels enter D as a fourth plane, or last
    smooth_labels: bool = False  # D's targets: U(0.8, 1.2) of real images, U(0, 0.2) of others
    flip_labels: float = 0.0  # share of images that D is told the wrong kind of


QUICK = dict(iters=3000, batch_size=32, lr_g=1e-3, lr_d=5e-4, ch=16, image_size=32, ema=0.99, n_scenes=2000,
             log_every=50, sample_every=100, eval_every=500, save_every=500, judge_width=16, judge_steps=1000)


# ---------------------------------------------------------------------- networks

def multi_hot(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Class ids [B, 3], padded with n_classes → [B, n_classes] of 0 and 1."""
    return torch.zeros(len(labels), n_classes + 1, device=labels.device).scatter_(1, labels, 1.0)[:, :-1]


class Generator(nn.Module):
    """z [B, z_dim], labels [B, 3] → images [B, 3, S, S] in [-1, 1]; the labels are joined to z."""

    def __init__(self, n_classes: int, z_dim: int, ch: int, image_size: int):
        super().__init__()
        n_blocks = (image_size // 4).bit_length() - 1  # 4×4 doubled until it is the image
        widths = [2**k * ch for k in range(n_blocks - 1, -1, -1)]  # at 64: 8, 4, 2, 1 times ch

        def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in up(i, o, 2, 1)]
        self.n_classes = n_classes
        self.layers = nn.Sequential(*up(z_dim + n_classes, widths[0], 1, 0),  # [B, 8·ch, 4, 4]
                                    *layers,  # [B, 4·ch, 8, 8], [B, 2·ch, 16, 16], [B, ch, 32, 32]
                                    nn.ConvTranspose2d(ch, 3, 4, 2, 1), nn.Tanh())  # [B, 3, 64, 64]

    def forward(self, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([z, multi_hot(labels, self.n_classes)], 1)[..., None, None])


class Discriminator(nn.Module):
    """images [B, 3, S, S], labels [B, 3] → logits [B]; the sigmoid is in the loss.

    cond "plane", as in the write-up: one linear layer makes of the labels a plane [B, 1, S, S], the image's
    fourth channel. "projection": no plane, and ⟨V y, h⟩ is added to the logits (Miyato & Koyama 2018, eq. 3).
    """

    def __init__(self, n_classes: int, ch: int, image_size: int, cond: str):
        super().__init__()
        n_blocks = (image_size // 4).bit_length() - 1
        widths = [2**k * ch for k in range(n_blocks)]  # at 64: 1, 2, 4, 8 times ch
        self.n_classes, self.plane = n_classes, None
        if cond == "plane":
            self.plane = nn.Sequential(nn.Linear(n_classes, image_size**2),
                                       nn.Unflatten(1, (1, image_size, image_size)))
        else:
            self.embed = nn.Linear(n_classes, widths[-1] * 4 * 4, bias=False)

        def down(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in down(i, o)]
        self.layers = nn.Sequential(nn.Conv2d(4 if self.plane else 3, ch, 4, 2, 1), nn.LeakyReLU(0.2),
                                    *layers)  # [B, ch, 32, 32], [B, 2·ch, 16, 16], …, [B, 8·ch, 4, 4]
        self.last = nn.Conv2d(widths[-1], 1, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        y = multi_hot(labels, self.n_classes)
        if self.plane:
            return self.last(self.layers(torch.cat([x, self.plane(y)], 1))).flatten()
        h = self.layers(x)
        return self.last(h).flatten() + (self.embed(y) * h.flatten(1)).sum(1)


# ---------------------------------------------------------------------- training

def build(cfg: Config, n_classes: int, device: torch.device) -> tuple[Generator, Discriminator, Generator]:
    """G, D and the averaged copy of G, freshly initialised from the global random state."""
    # all weights, those of the labels' plane too, as in the DCGAN paper
    G = init_dcgan(Generator(n_classes, cfg.z_dim, cfg.ch, cfg.image_size))
    D = init_dcgan(Discriminator(n_classes, cfg.ch, cfg.image_size, cfg.d_cond))
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    return G, D, copy.deepcopy(G).eval().requires_grad_(False)


def train(cfg: Config, resume: Path | None = None) -> int:
    """Train, score, and leave everything in the run's folder; returns the exit status."""
    # ---- data, judge, networks, optimisers
    device = run.pick_device(cfg.device)
    if cfg.deterministic:
        run.set_deterministic()
    if cfg.ema >= 1 or cfg.flip_labels > 1:
        raise run.UserError(f"--ema {cfg.ema} must be below 1, --flip-labels {cfg.flip_labels} at most 1")
    cfg.data = pick_source(cfg.data, "data/iclevr")
    data = load_iclevr(cfg.data, cfg.image_size, cfg.n_scenes)
    batches = Batches(data.images, data.labels, cfg.batch_size, cfg.seed, device)
    if resume is None and cfg.out:
        run.free_folder(cfg.out, "")  # ends here where it exists, not after the judge's training
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)

    torch.manual_seed(cfg.seed)
    G, D, ema = build(cfg, len(data.classes), device)
    adam = dict(betas=(0.5, 0.999), fused=True, capturable=device.type == "cuda")
    opt_g = torch.optim.Adam(G.parameters(), torch.tensor(cfg.lr_g, device=device), **adam)
    opt_d = torch.optim.Adam(D.parameters(), torch.tensor(cfg.lr_d, device=device), **adam)
    ema_weight = torch.tensor(1.0, device=device)  # the new G's share in the average
    names = ("d_loss", "g_loss", "d_real", "d_fake")
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

    # ---- one iteration: a step of D, one of G, the average. The host reads nothing back
    averaged = list(zip(ema.state_dict().values(), G.state_dict().values()))  # batch norm's statistics too

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    kinds = torch.tensor([[1.0], [0.0]], device=device)  # what D is to say of real and of generated images

    def targets(n: int) -> torch.Tensor:
        """The targets of n real (row 0) and n generated (row 1) images, [2, n]."""
        right = kinds.expand(2, n)
        if cfg.smooth_labels:
            noise = torch.rand(2, n, device=device)
            right = torch.stack([0.8 + 0.4 * noise[0], 0.2 * noise[1]])
        if cfg.flip_labels:
            right = torch.where(torch.rand(2, n, device=device) < cfg.flip_labels, right.flip(0), right)
        return right

    def iteration(images: torch.Tensor, labels: torch.Tensor) -> None:
        real, n = images.float() / 127.5 - 1, len(images)
        z = torch.randn(n, cfg.z_dim, device=device)
        with autocast():
            fake = G(z, labels)
            # real and fake apart: each has its own statistics in D's batch norm
            score_real, score_fake = D(real, labels).float(), D(fake.detach(), labels).float()
        d_loss = sum(F.binary_cross_entropy_with_logits(score, target) for score, target in
                     zip((score_real, score_fake), targets(n)))
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()

        D.requires_grad_(False)
        with autocast():
            score = D(fake, labels).float()
        D.requires_grad_(True)
        g_loss = losses.bce_g(score)
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()

        with torch.no_grad():
            for average, new in averaged:
                average.lerp_(new, ema_weight) if new.is_floating_point() else average.copy_(new)
            probabilities = [score_real.sigmoid().mean(), score_fake.sigmoid().mean()]
            sums.add_(torch.stack([d_loss.detach(), g_loss.detach(), *probabilities]))

    # ---- what is written along the way
    shown = data.tests["test"].to(device)
    fixed = torch.randn(len(shown), cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(device)
    scored = {"val": data.choice_sets(), **data.tests}  # best.pt is chosen on "val": training label sets

    def save(name: str, step: int) -> None:
        run.save_checkpoint(folder.folder / name, dict(
            G=G.state_dict(), D=D.state_dict(), ema=ema.state_dict(), opt_g=opt_g.state_dict(),
            opt_d=opt_d.state_dict(), step=step, best=best, sums=sums, logged=logged,
            data=data.digest, rng=run.rng_state(device), config=vars(cfg)))

    def due(every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == cfg.iters)

    # ---- the loop
    columns = [*names, *(f"accuracy_{name}" for name in scored)]
    name = "cdcgan_iclevr" + ("-drawn" if cfg.data == "drawn" else "")
    with run.Run(cfg, Path(__file__).name, name, resume, start, columns) as folder:
        step = start
        for step in range(start + 1, cfg.iters + 1):
            if cfg.halve_every:
                halvings = (step - 1) // batches.per_epoch // cfg.halve_every
                opt_g.param_groups[0]["lr"].fill_(cfg.lr_g * 0.5**halvings)
                opt_d.param_groups[0]["lr"].fill_(cfg.lr_d * 0.5**halvings)
            ema_weight.fill_(1 - min(cfg.ema, step / (step + 10)))  # the first steps are soon forgotten
            iteration(*batches(step - 1))

            stop = folder.signal is not None
            if due(cfg.log_every, step):
                means = dict(zip(names, (sums / (step - logged)).tolist()))
                sums.zero_()
                logged = step
                folder.log(step, **means)
                folder.status(step, **means)
            if due(cfg.sample_every, step):
                heading = f"{title(cfg, data)}, step {step}: test.json, one set each"
                folder.picture(step, ema(fixed, shown), heading)
            if judge and due(cfg.eval_every, step):
                results = evaluator.score_sets(ema, cfg.z_dim, judge, scored, cfg.eval_draws, cfg.seed,
                                               device)
                folder.log(step, **{f"accuracy_{name}": r["accuracy"][0] for name, r in results.items()})
                if results["val"]["accuracy"][0] > best:
                    best = results["val"]["accuracy"][0]
                    save("best.pt", step)
            if stop or step == cfg.iters or due(cfg.save_every, step):  # the end is always kept
                save("last.pt", step)
            if stop:
                break

        # ---- the end
        folder.draw_progress(title(cfg, data))
        if folder.signal is not None:
            print(f"\nstopped at step {step}; to go on: {Path(__file__).name} --resume {folder.folder}")
            return 128 + folder.signal
        draw(cfg, ema, data, folder.folder, title(cfg, data))
        print(f"{folder.folder}: {step} iterations, {folder.seconds:.0f} s")
        if judge:
            evaluate(cfg, data, judge, folder.folder, device)
    return 0


def title(cfg: Config, data: LabelledScenes) -> str:
    return f"cdcgan_iclevr ({cfg.d_cond}) on {data.name}, ch {cfg.ch}, seed {cfg.seed}"


# ---------------------------------------------------------------------- pictures and scores

def load(cfg: Config, folder: Path, name: str, n_classes: int, device: torch.device) -> tuple[Generator, int]:
    """The averaged G of a checkpoint and the step it is from."""
    state = run.load_checkpoint(folder / name, device)
    _, _, ema = build(cfg, n_classes, device)
    ema.load_state_dict(state["ema"])
    return ema, state["step"]


@torch.no_grad()
def draw(cfg: Config, ema: Generator, data: LabelledScenes, folder: Path, heading: str) -> None:
    """Grids: both test lists, real beside generated, every object alone, and ways from one z to another."""
    device, g = next(ema.parameters()).device, torch.Generator().manual_seed(cfg.seed)

    def make(labels: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        z = torch.randn(len(labels), cfg.z_dim, generator=g) if z is None else z
        return ema(z.to(device), labels.to(device)).cpu()

    for name, labels in data.tests.items():
        run.save_grid(folder / f"{name}.png", make(labels), f"{heading}: {name}.json, one set each")

    # four pairs of rows: real images, and under them generated ones with the same labels
    index = torch.randint(len(data.images), (32,), generator=g)
    real = data.images[index].float() / 127.5 - 1
    rows = torch.stack([real, make(data.labels[index])]).unflatten(1, (4, 8)).transpose(0, 1)
    kind = "drawn" if cfg.data == "drawn" else "real"
    run.save_grid(folder / "real_beside_generated.png", rows.flatten(0, 2),
                  f"{heading}: rows of {kind} images, under each generated ones with the same labels")

    null = len(data.classes)
    alone = torch.tensor([[i, null, null] for i in range(null)])
    one_z = torch.randn(1, cfg.z_dim, generator=g).expand(null, -1)
    run.save_grid(folder / "objects.png", make(alone, one_z), f"{heading}: each object alone, one z")

    labels = data.tests["test"][torch.randperm(len(data.tests["test"]), generator=g)[:6]]
    ends = torch.randn(2, len(labels), 1, cfg.z_dim, generator=g)
    way = ends[0] + torch.linspace(0, 1, 8)[:, None] * (ends[1] - ends[0])  # [6, 8, z_dim]
    run.save_grid(folder / "interpolation.png", make(labels.repeat_interleave(8, 0), way.flatten(0, 1)),
                  f"{heading}: from one z to another, labels fixed along a row")


def evaluate(cfg: Config, data: LabelledScenes, judge: evaluator.Judge, folder: Path,
             device: torch.device) -> None:
    """Score best.pt and last.pt on both test lists; print the tables and write scores.json."""
    scores = {"data": data.name, "judge": judge.title, "judge_held_out": judge.held_out,
              "draws": cfg.eval_draws, "seed": cfg.seed}
    for name in ("best", "last"):
        if (folder / f"{name}.pt").exists():
            ema, step = load(cfg, folder, f"{name}.pt", len(data.classes), device)
            results = evaluator.score_sets(ema, cfg.z_dim, judge, data.tests, cfg.eval_draws, cfg.seed + 1,
                                           device)  # other z than best.pt was chosen with
            scores[name] = {"step": step, **results}
            print(f"\n{name}.pt (step {step}), {data.name}, {cfg.eval_draws} draws; judge: {judge.title}")
            # a sweep's and the README's table take this; of best.pt where there is one
            scores.setdefault("summary", {f"accuracy {test}": r["accuracy"] for test, r in results.items()})
            evaluator.print_table(results, ["accuracy", "exact", "accuracy_1", "accuracy_2", "accuracy_3"])
    run.write_whole(folder / "scores.json", lambda p: p.write_text(json.dumps(scores, indent=1) + "\n"))


def main() -> int:
    action, cfg, folder = run.parse(Config, QUICK, __doc__)
    if action == "sweep":
        return run.sweep(cfg, train)
    if action in ("train", "resume"):
        return train(cfg, folder)
    device = run.pick_device(cfg.device)
    data = load_iclevr(cfg.data, cfg.image_size, cfg.n_scenes)
    name = "best.pt" if (folder / "best.pt").exists() else "last.pt"
    ema, step = load(cfg, folder, name, len(data.classes), device)
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
