"""DCGAN on MNIST at 32×32, and the MLP GAN beside it.

DCGAN: Radford et al. 2016; minimax loss with the -log D trick: Goodfellow et al. 2014.

    python dcgan_mnist.py --quick                                # minutes on two CPU cores
    python dcgan_mnist.py --latent-dim 100 --hidden-dim 100      # or --net mlp
    python dcgan_mnist.py --sweep latent_dim=16,100 hidden_dim=16,100    # four runs, one table
    python dcgan_mnist.py --resume runs/dcgan_mnist              # go on; --sample and --eval take a run too

Measured so far on a CPU (AMD EPYC; see results/), real MNIST, batches of 64, as FD (judge), of which training
images have 1.9: latent 16, hidden 16: 173 after 1,500 iterations (about a minute on two cores), 93 after
4,000 and no better later; hidden 100: 69 after 1,500 (15 minutes). FID (in the write-up: below 60) is not
measured yet.
"""
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import evaluator
from common import losses, run
from common.blocks import init_dcgan
from common.datasets import Batches, Digits, load_digits, pick_digits


@dataclass
class Config:
    iters: int = 12_000  # iterations; one is a step of D and one of G
    batch_size: int = 128  # images a step
    lr_g: float = 2e-4  # Adam's rate for G
    lr_d: float = 2e-4  # Adam's rate for D
    latent_dim: int = 16  # dimensions of the latent z ~ N(0, I)
    hidden_dim: int = 16  # width: feature maps of the layers nearest the image
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (MNIST if it can be had, else drawn), mnist, drawn, or the folder of MNIST/raw
    n_drawn: int = 60_000  # drawn digits to train on
    out: str = ""  # folder of the run; empty: runs/dcgan_mnist
    seed: int = 0  # of weights, noise and the order of batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks
    deterministic: bool = False  # the same bits on every CUDA run, a little slower
    log_every: int = 100  # iterations between rows of metrics.csv
    sample_every: int = 500  # iterations between pictures
    eval_every: int = 1000  # iterations between scores; the best is kept as best.pt
    save_every: int = 1000  # iterations between checkpoints
    judge: str = "auto"  # auto (trained once and cached), none, or a checkpoint
    judge_width: int = 64  # width of the judge trained by auto
    judge_steps: int = 5000  # its training steps, of 64 images each
    eval_images: int = 10_000  # generated images a score is measured on
    eval_draws: int = 3  # draws of z that a score is the mean of
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    pairs: int = 5  # pairs of z in the interpolation grids
    # the method
    net: Literal["conv", "mlp"] = "conv"  # DCGAN, or fully connected layers in both networks


QUICK = dict(iters=1500, batch_size=64, log_every=50, sample_every=100, eval_every=500, save_every=500,
             judge_steps=1000, eval_images=2000)


# ---------------------------------------------------------------------- networks

def generator(net: str, latent: int, h: int) -> nn.Sequential:
    """z [B, latent] → images [B, 1, 32, 32] in [-1, 1]."""
    if net == "mlp":
        def layer(i: int, o: int) -> list[nn.Module]:
            return [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
        return nn.Sequential(*layer(latent, 16 * h),
                             *layer(16 * h, 32 * h),
                             nn.Linear(32 * h, 32 * 32), nn.Tanh(), nn.Unflatten(1, (1, 32, 32)))

    def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(nn.Unflatten(1, (latent, 1, 1)),
                         *up(latent, 4 * h, 1, 0),  # [B, 4h, 4, 4]
                         *up(4 * h, 2 * h, 2, 1),  # [B, 2h, 8, 8]
                         *up(2 * h, h, 2, 1),  # [B, h, 16, 16]
                         nn.ConvTranspose2d(h, 1, 4, 2, 1), nn.Tanh())  # [B, 1, 32, 32]


def discriminator(net: str, h: int) -> nn.Sequential:
    """images [B, 1, 32, 32] → logits [B, 1]; the sigmoid is in the loss."""
    act = nn.LeakyReLU(0.2)
    if net == "mlp":
        return nn.Sequential(nn.Flatten(),
                             nn.Linear(32 * 32, 32 * h), act,
                             nn.Linear(32 * h, 16 * h, bias=False), nn.BatchNorm1d(16 * h), act,
                             nn.Linear(16 * h, 1))

    def down(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), act]
    return nn.Sequential(nn.Conv2d(1, h, 4, 2, 1), act,  # [B, h, 16, 16]; no norm next to the image
                         *down(h, 2 * h),  # [B, 2h, 8, 8]
                         *down(2 * h, 4 * h),  # [B, 4h, 4, 4]
                         nn.Conv2d(4 * h, 1, 4), nn.Flatten())  # [B, 1]


# ---------------------------------------------------------------------- training

def build(cfg: Config, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """G, D and the averaged copy of G, freshly initialised from the global random state."""
    G = init_dcgan(generator(cfg.net, cfg.latent_dim, cfg.hidden_dim))
    D = init_dcgan(discriminator(cfg.net, cfg.hidden_dim))
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (G, D))
    return G, D, copy.deepcopy(G).eval().requires_grad_(False)


def train(cfg: Config, resume: Path | None = None) -> int:
    """Train, score, and leave everything in the run's folder; returns the exit status."""
    # ---- data, judge, networks, optimisers
    device = run.pick_device(cfg.device)
    if cfg.deterministic:
        run.set_deterministic()
    if cfg.ema >= 1:
        raise run.UserError(f"--ema {cfg.ema} must be below 1")
    cfg.data = pick_digits(cfg.data)
    data = load_digits(cfg.data, 32, cfg.n_drawn)
    batches = Batches(data.images, data.labels, cfg.batch_size, cfg.seed, device)
    if resume is None and cfg.out:
        run.free_folder(cfg.out, "")  # ends here where it exists, not after the judge's training
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)

    torch.manual_seed(cfg.seed)
    G, D, ema = build(cfg, device)
    adam = dict(betas=(0.5, 0.999), fused=True, capturable=device.type == "cuda")
    opt_g = torch.optim.Adam(G.parameters(), torch.tensor(cfg.lr_g, device=device), **adam)
    opt_d = torch.optim.Adam(D.parameters(), torch.tensor(cfg.lr_d, device=device), **adam)
    ema_weight = torch.tensor(1.0, device=device)  # the new G's share in the average
    names = ("d_loss", "g_loss", "d_real", "d_fake_before", "d_fake_after")
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

    def iteration(images: torch.Tensor) -> None:
        real = images.float() / 127.5 - 1
        z = torch.randn(len(real), cfg.latent_dim, device=device)
        with autocast():
            fake = G(z)
            # real and fake apart: each has its own statistics in D's batch norm
            score_real, score_fake = D(real).float(), D(fake.detach()).float()
        d_loss = losses.bce_d(score_real, score_fake)  # the gradients of both halves make one update
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()

        D.requires_grad_(False)
        with autocast():
            score_again = D(fake).float()
        D.requires_grad_(True)
        g_loss = losses.bce_g(score_again)
        opt_g.zero_grad()
        g_loss.backward()
        opt_g.step()

        with torch.no_grad():
            for average, new in averaged:
                average.lerp_(new, ema_weight) if new.is_floating_point() else average.copy_(new)
            # D(G(z)) before G's step: of the updated D. After it: what D first says in the next iteration
            probabilities = [score.sigmoid().mean() for score in (score_real, score_again, score_fake)]
            sums.add_(torch.stack([d_loss.detach(), g_loss.detach(), *probabilities]))

    # ---- what is written along the way
    fixed = torch.randn(64, cfg.latent_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(device)
    if judge:  # best.pt is chosen by the distance to training images; scores are told with test images
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
    columns = [*names, "fd_judge", "tv_digits"]
    name = "dcgan_mnist" + ("-drawn" if cfg.data == "drawn" else "")
    with run.Run(cfg, Path(__file__).name, name, resume, start, columns) as folder:
        step = start
        for step in range(start + 1, cfg.iters + 1):
            ema_weight.fill_(1 - min(cfg.ema, step / (step + 10)))  # the first steps are soon forgotten
            iteration(batches(step - 1)[0])

            stop = folder.signal is not None
            if due(cfg.log_every, step):
                means = dict(zip(names, (sums / (step - logged)).tolist()))
                sums.zero_()
                logged = step
                folder.log(step, **means)
                folder.status(step, **means)
            if due(cfg.sample_every, step):
                folder.picture(step, ema(fixed), f"{title(cfg, data)}, step {step}")
            if judge and due(cfg.eval_every, step):
                result = evaluator.score_digits(sampler(cfg, ema), judge, choice, cfg.eval_images, 1,
                                                cfg.seed)
                fd, tv = result["FD (judge)"][0], result["TV"][0]
                folder.log(step, fd_judge=fd, tv_digits=tv)
                if best < 0 or fd < best:
                    best = fd
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


def title(cfg: Config, data: Digits) -> str:
    sizes = f"latent {cfg.latent_dim}, hidden {cfg.hidden_dim}"
    return f"dcgan_mnist ({cfg.net}) on {data.name}, {sizes}, seed {cfg.seed}"


# ---------------------------------------------------------------------- pictures and scores

def sampler(cfg: Config, G: nn.Module):
    """A function (how many, generator) → images, as evaluator.score_digits takes it."""
    device = next(G.parameters()).device
    return lambda n, g: G(torch.randn(n, cfg.latent_dim, generator=g).to(device))


def load(cfg: Config, folder: Path, name: str, device: torch.device) -> tuple[nn.Module, int]:
    """The averaged G of a checkpoint and the step it is from."""
    state = run.load_checkpoint(folder / name, device)
    _, _, ema = build(cfg, device)
    ema.load_state_dict(state["ema"])
    return ema, state["step"]


@torch.no_grad()
def draw(cfg: Config, ema: nn.Module, data: Digits, folder: Path, heading: str) -> None:
    """Grids: samples, real beside generated, ways from one z to another and beyond them."""
    device, g = next(ema.parameters()).device, torch.Generator().manual_seed(cfg.seed)

    def make(z: torch.Tensor) -> torch.Tensor:
        return ema(z.to(device)).cpu()

    z = torch.randn(100, cfg.latent_dim, generator=g)
    run.save_grid(folder / "samples.png", make(z), heading, nrow=10)
    real = data.images[torch.randint(len(data.images), (32,), generator=g)].float() / 127.5 - 1
    kind = "drawn" if cfg.data == "drawn" else "real"
    run.save_grid(folder / "real_beside_generated.png", torch.cat([real, make(z[:32])]),
                  f"{heading}: four rows of {kind} images, four of generated ones")

    # z1 + i/K·(z2 - z1) with K = 9: i = 0 … 9, then i = -5 … 14
    ends = torch.randn(2, cfg.pairs, 1, cfg.latent_dim, generator=g)
    for name, first, last in (("interpolation", 0, 9), ("extrapolation", -5, 14)):
        i = torch.arange(first, last + 1)[:, None]
        z = ends[0] + i / 9 * (ends[1] - ends[0])  # [pairs, last - first + 1, latent_dim]
        run.save_grid(folder / f"{name}.png", make(z.flatten(0, 1)),
                      f"{heading}: z1 + i/9·(z2 - z1), i = {first} … {last}, a pair a row", nrow=len(i))


def evaluate(cfg: Config, data: Digits, judge: evaluator.Judge, folder: Path, device: torch.device) -> None:
    """Score last.pt and best.pt against the test images; print the tables and write scores.json."""
    real = evaluator.real_moments(judge, data.test_images, device)
    inception = evaluator.get_inception(cfg.fid_weights, device)
    much = cfg.eval_images, cfg.eval_draws, cfg.seed + 1  # other z than best.pt was chosen with
    scores = {"data": data.name, "judge": judge.title, "judge_held_out": judge.held_out,
              "n_real": len(data.test_images), "n_fake": cfg.eval_images, "draws": cfg.eval_draws}

    def training_images(n: int, g: torch.Generator) -> torch.Tensor:
        return data.images[torch.randint(len(data.images), (n,), generator=g)].to(device) / 127.5 - 1

    rows = {"training images": evaluator.score_digits(training_images, judge, real, *much)}
    for name in ("best", "last"):
        if (folder / f"{name}.pt").exists():
            ema, step = load(cfg, folder, f"{name}.pt", device)
            result = evaluator.score_digits(sampler(cfg, ema), judge, real, *much)
            if inception:
                result["FID"] = evaluator.score_fid(sampler(cfg, ema), inception, data.test_images, *much)
            rows[f"{name}.pt (step {step})"] = result
            scores[name] = {"step": step} | result
    scores["training images"] = rows["training images"]
    columns = ["FD (judge)", "TV", *(["FID"] if inception else [])]
    scores["summary"] = {name: scores["last"][name] for name in columns}
    print(f"\n{folder}: {cfg.eval_images} generated images against {len(data.test_images)} test images of "
          f"{data.name}, {cfg.eval_draws} draws; judge: {judge.title}")
    evaluator.print_table(rows, [*columns, "chi2"])
    print("\nshare of each digit, %, and its total-variation distance to uniform (TV)")
    for name, result in rows.items():
        shares = "".join(f"{100 * share:7.1f}" for share in result["histogram"][0])
        print(f"{name:<32}{shares}   TV {result['TV'][0]:.4f}")
    run.write_whole(folder / "scores.json", lambda p: p.write_text(json.dumps(scores, indent=1) + "\n"))


def main() -> int:
    action, cfg, folder = run.parse(Config, QUICK, __doc__)
    if action == "sweep":
        return run.sweep(cfg, train)
    if action in ("train", "resume"):
        return train(cfg, folder)
    device = run.pick_device(cfg.device)
    data = load_digits(cfg.data, 32, cfg.n_drawn)
    ema, step = load(cfg, folder, "last.pt", device)
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
