"""A convolutional VAE on faces: reconstructions, samples, ways between faces, arithmetic with attributes.

Kingma & Welling 2014. It learns without labels; they are used afterwards, to find attributes in its latent.

    python vae_celeba.py --quick                        # minutes on two CPU cores
    python vae_celeba.py --iters 60000                  # the full job, one GPU
    python vae_celeba.py --resume runs/vae_celeba       # go on; --sample and --eval take a run too

Measured so far on a CPU (AMD EPYC; see results/), CelebA at 64×64, --ch 8, 3,000 iterations, 13 minutes of
one core: mean squared error 0.035 on held-out faces, FD (judge) 61 of samples and 20 of reconstructions. The
full size has not been run yet.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import evaluator
from common import run
from common.blocks import init_dcgan
from common.datasets import Batches, Faces, load_faces, pick_source


@dataclass
class Config:
    iters: int = 60_000  # iterations, of one step each
    batch_size: int = 32  # images a step
    lr: float = 2e-4  # Adam's rate
    z_dim: int = 128  # dimensions of the latent z, N(0, I) before an image is seen
    ch: int = 32  # width: a sixteenth of the feature maps at 4×4
    image_size: Literal[32, 64, 128] = 128  # height and width of the images
    data: str = "auto"  # auto (data/celeba if it is there, else drawn), drawn, or a folder of faces
    attributes: str = ""  # names of attributes, with commas between; empty: eight of CelebA's, all of others
    crop: int = 0  # side of the square cut out of the middle of each image; 0: the largest
    skip_bad_images: bool = False  # leave out, and count, images that can't be used
    n_drawn: int = 10_000  # drawn faces
    out: str = ""  # folder of the run; empty: runs/vae_celeba
    seed: int = 0  # of weights, noise and the order of batches
    device: str = "auto"  # auto, cpu, cuda, cuda:1, …
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the networks
    deterministic: bool = False  # the same bits on every CUDA run, a little slower
    log_every: int = 100  # iterations between rows of metrics.csv
    sample_every: int = 500  # iterations between pictures
    eval_every: int = 1000  # iterations between scores; the best is kept as best.pt
    save_every: int = 1000  # iterations between checkpoints
    judge: str = "auto"  # auto (trained once and cached), none, or a checkpoint
    judge_width: int = 64  # width of the judge trained by auto; 64 is ResNet-18
    judge_steps: int = 5000  # its training steps, of 32 images each
    eval_images: int = 5000  # generated images a score is measured on
    eval_draws: int = 3  # draws of z that a score is the mean of
    fid_weights: str = "auto"  # FID's network: auto (on a GPU, found or downloaded), none, or its file
    # the method
    kl_weight: float = 1.0  # of KL in the loss; below 1 sharper reconstructions, and worse samples


QUICK = dict(iters=1500, ch=8, image_size=64, n_drawn=4000, log_every=50, sample_every=150, eval_every=500,
             save_every=500, judge_width=16, judge_steps=1000, eval_images=1000)


# ---------------------------------------------------------------------- networks

def encoder(z_dim: int, ch: int, image_size: int) -> nn.Sequential:
    """images [B, 3, S, S] → mean and log-variance of z, side by side [B, 2·z_dim]."""
    n_blocks = (image_size // 4).bit_length() - 1  # halved until it is 4×4
    widths = [16 * ch >> k for k in range(n_blocks)][::-1]  # at 128: 1, 2, 4, 8, 16 times ch

    def down(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
    layers = [layer for i, o in zip([3, *widths], widths) for layer in down(i, o)]
    return nn.Sequential(*layers,  # at 128: [B, ch, 64, 64], …, [B, 16·ch, 4, 4]
                         nn.Conv2d(widths[-1], 2 * z_dim, 4), nn.Flatten())


def decoder(z_dim: int, ch: int, image_size: int) -> nn.Sequential:
    """z [B, z_dim] → images [B, 3, S, S] in [-1, 1]: the mean of p(x | z)."""
    n_blocks = (image_size // 4).bit_length() - 1
    widths = [16 * ch >> k for k in range(n_blocks)]

    def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in up(i, o, 2, 1)]
    return nn.Sequential(nn.Unflatten(1, (z_dim, 1, 1)),
                         *up(z_dim, widths[0], 1, 0),  # [B, 16·ch, 4, 4]
                         *layers,  # at 128: [B, 8·ch, 8, 8], …, [B, ch, 64, 64]
                         nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1), nn.Tanh())  # [B, 3, 128, 128]


class VAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self, z_dim: int, ch: int, image_size: int):
        super().__init__()
        self.encoder = init_dcgan(encoder(z_dim, ch, image_size))
        self.decoder = init_dcgan(decoder(z_dim, ch, image_size))

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, S, S] → mean and log-variance of q(z | x), [B, z_dim] each."""
        return self.encoder(x).float().chunk(2, 1)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) ‖ N(0, I)) in nats [B] (Kingma & Welling 2014, appendix B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


# ---------------------------------------------------------------------- training

def load_data(cfg: Config) -> Faces:
    return load_faces(cfg.data, cfg.image_size, cfg.attributes, cfg.crop, cfg.skip_bad_images, cfg.n_drawn)


def train(cfg: Config, resume: Path | None = None) -> int:
    """Train, score, and leave everything in the run's folder; returns the exit status."""
    # ---- data, judge, network, optimiser
    device = run.pick_device(cfg.device)
    if cfg.deterministic:
        run.set_deterministic()
    cfg.data = pick_source(cfg.data, "data/celeba")
    data = load_data(cfg)
    batches = Batches(data.images, data.labels, cfg.batch_size, cfg.seed, device)
    if resume is None and cfg.out:
        run.free_folder(cfg.out, "")  # ends here where it exists, not after the judge's training
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)

    torch.manual_seed(cfg.seed)
    vae = VAE(cfg.z_dim, cfg.ch, cfg.image_size).to(device, memory_format=torch.channels_last)
    adam = dict(betas=(0.5, 0.9), fused=True, capturable=device.type == "cuda")
    opt = torch.optim.Adam(vae.parameters(), torch.tensor(cfg.lr, device=device), **adam)
    names = ("loss", "mse", "kl")
    sums, logged = torch.zeros(len(names), device=device), 0  # their sums since the step last logged
    start, best = 0, -1.0

    # ---- resume
    if resume is not None and (resume / "last.pt").exists():
        state = run.load_checkpoint(resume / "last.pt", device)
        if state["data"] != data.digest:
            raise run.UserError(f"{cfg.data} no longer holds the images of {resume}: bring them back")
        for name, thing in (("vae", vae), ("opt", opt)):
            thing.load_state_dict(state[name])
        start, best, sums, logged = (state[key] for key in ("step", "best", "sums", "logged"))
        run.set_rng_state(state["rng"], device)

    # ---- one iteration. The host reads nothing back
    def iteration(images: torch.Tensor) -> None:
        x = images.float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            mean, log_variance = vae.encode(x)
            z = mean + (log_variance / 2).exp() * torch.randn_like(mean)  # the reparametrisation trick
            reconstruction = vae.decoder(z).float()
        mse = F.mse_loss(reconstruction, x)
        kl = kl_divergence(mean, log_variance).mean()
        # With the squares averaged over pixels, KL is too: together they are the negative ELBO of a Gaussian
        # decoder of variance 1/2, but for a factor. Summed, KL would outweigh them, and z would say nothing
        loss = mse + cfg.kl_weight * kl / x[0].numel()
        opt.zero_grad()
        loss.backward()
        opt.step()
        sums.add_(torch.stack([loss, mse, kl]).detach())

    # ---- what is written along the way
    g = torch.Generator().manual_seed(cfg.seed)
    fixed = torch.randn(16, cfg.z_dim, generator=g).to(device)
    shown = data.test_images[:8].to(device) / 127.5 - 1
    if judge:  # best.pt is chosen by the distance to training images; scores are told with held-out ones
        chosen = data.images[torch.randperm(len(data.images), generator=g)[:len(data.test_images)]]
        choice = evaluator.real_moments(judge, chosen, device)

    def save(name: str, step: int) -> None:
        run.save_checkpoint(folder.folder / name, dict(
            vae=vae.state_dict(), opt=opt.state_dict(), step=step, best=best, sums=sums, logged=logged,
            data=data.digest, rng=run.rng_state(device), config=vars(cfg)))

    def due(every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == cfg.iters)

    # ---- the loop
    name = "vae_celeba" + ("-drawn" if cfg.data == "drawn" else "")
    with run.Run(cfg, Path(__file__).name, name, resume, start, [*names, "fd_judge"]) as folder:
        step = start
        for step in range(start + 1, cfg.iters + 1):
            vae.train()
            iteration(batches(step - 1)[0])

            stop = folder.signal is not None
            vae.eval()  # below, batch norm with its running statistics
            if due(cfg.log_every, step):
                means = dict(zip(names, (sums / (step - logged)).tolist()))
                sums.zero_()
                logged = step
                folder.log(step, **means)
                folder.status(step, **means)
            if due(cfg.sample_every, step):
                with torch.no_grad():
                    pictures = torch.cat([shown, reconstruct(vae, shown), vae.decoder(fixed)])
                folder.picture(step, pictures, f"{title(cfg, data)}, step {step}: held-out faces, their "
                               "reconstructions, samples")
            if judge and due(cfg.eval_every, step):
                much = cfg.eval_images, 1, cfg.seed
                fd = evaluator.score_distance(sampler(cfg, vae), judge, choice, *much)[0]
                folder.log(step, fd_judge=fd)
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
        draw(cfg, vae.eval(), data, folder.folder, title(cfg, data))
        print(f"{folder.folder}: {step} iterations, {folder.seconds:.0f} s")
        if judge:
            evaluate(cfg, data, judge, folder.folder, device)
    return 0


def title(cfg: Config, data: Faces) -> str:
    return f"vae_celeba on {data.name}, ch {cfg.ch}, seed {cfg.seed}"


# ---------------------------------------------------------------------- what it has learnt

def reconstruct(vae: VAE, x: torch.Tensor) -> torch.Tensor:
    """images [B, 3, S, S] → the same, by way of the mean of q(z | x)."""
    return vae.decoder(vae.encode(x)[0])


@torch.no_grad()
def encode_all(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [N, z_dim], on the CPU, of uint8 images [N, 3, S, S]."""
    device = next(vae.parameters()).device
    parts = [vae.encode(part.to(device) / 127.5 - 1) for part in images.split(250)]
    return tuple(torch.cat(column).cpu() for column in zip(*parts))


def directions(vae: VAE, data: Faces) -> torch.Tensor:
    """For each attribute the mean latent of the training images with it, minus that of those without."""
    z, y = encode_all(vae, data.images)[0], data.labels.float()

    def mean(weight: torch.Tensor) -> torch.Tensor:  # weights [N, A] → [A, z_dim]
        return weight.T @ z / weight.sum(0).clamp(min=1)[:, None]
    return mean(y) - mean(1 - y)


# ---------------------------------------------------------------------- pictures and scores

def sampler(cfg: Config, vae: VAE):
    """A function (how many, generator) → images."""
    device = next(vae.parameters()).device
    return lambda n, g: vae.decoder(torch.randn(n, cfg.z_dim, generator=g).to(device))


def load(cfg: Config, folder: Path, name: str, device: torch.device) -> tuple[VAE, int]:
    """The network of a checkpoint and the step it is from."""
    state = run.load_checkpoint(folder / name, device)
    vae = VAE(cfg.z_dim, cfg.ch, cfg.image_size).to(device, memory_format=torch.channels_last)
    vae.load_state_dict(state["vae"])
    return vae.eval().requires_grad_(False), state["step"]


@torch.no_grad()
def draw(cfg: Config, vae: VAE, data: Faces, folder: Path, heading: str) -> None:
    """Grids: samples, reconstructions beside originals, ways between faces, attributes added."""
    device, g = next(vae.parameters()).device, torch.Generator().manual_seed(cfg.seed)

    def decode(z: torch.Tensor) -> torch.Tensor:
        return vae.decoder(z.to(device)).cpu()

    run.save_grid(folder / "samples.png", decode(torch.randn(16, cfg.z_dim, generator=g)), heading, nrow=4)
    chosen = torch.randperm(len(data.test_images), generator=g)[:16]
    faces, z = data.test_images[chosen] / 127.5 - 1, encode_all(vae, data.test_images[chosen])[0]
    run.save_grid(folder / "reconstructions.png", torch.cat([faces[:8], decode(z[:8])]),
                  f"{heading}: held-out faces, and their reconstructions below")

    pairs = len(faces) // 2
    way = torch.linspace(0, 1, 8)[:, None]  # of the latents; at both ends of a row are the faces themselves
    rows = [torch.cat([faces[i, None], decode(torch.lerp(z[i], z[pairs + i], way)), faces[pairs + i, None]])
            for i in range(pairs)]
    run.save_grid(folder / "interpolation.png", torch.cat(rows),
                  f"{heading}: from one held-out face, on the left, to another", nrow=10)

    rows = []
    for attribute, direction in enumerate(directions(vae, data)):
        z = encode_all(vae, data.test_images[data.test_labels[:, attribute] == 0][:4])[0]
        z = torch.stack([z, z + direction], 1).flatten(0, 1)
        rows += [decode(z), torch.ones(8 - len(z), *faces.shape[1:])]  # white where fewer lack it
    run.save_grid(folder / "arithmetic.png", torch.cat(rows),
                  f"{heading}: four held-out faces that lack it, reconstructed, and with the direction of "
                  f"{', '.join(data.classes)} added")


@torch.no_grad()
def add_attributes(vae: VAE, data: Faces, judge: evaluator.Judge) -> dict[str, tuple[float, float]]:
    """{attribute: in what share of the held-out faces that lack it the judge sees it, when they are
    reconstructed and when its direction is added}. What else comes with it in the data is added too.
    """
    device, shares = next(vae.parameters()).device, {}
    z_all = encode_all(vae, data.test_images)[0]
    for attribute, direction in enumerate(directions(vae, data)):
        z = z_all[data.test_labels[:, attribute] == 0]
        if len(z):
            seen = [evaluator.look(judge, (vae.decoder(part.to(device)) for part in latent.split(250)))[0]
                    for latent in (z, z + direction)]
            shares[data.classes[attribute]] = tuple(
                evaluator.decide(s, data.groups)[:, attribute].double().mean().item() for s in seen)
    return shares


@torch.no_grad()
def evaluate(cfg: Config, data: Faces, judge: evaluator.Judge, folder: Path, device: torch.device) -> None:
    """Score best.pt and last.pt with the held-out images; print the tables and write scores.json."""
    real = evaluator.real_moments(judge, data.test_images, device)
    inception = evaluator.get_inception(cfg.fid_weights, device)
    much = cfg.eval_images, cfg.eval_draws, cfg.seed + 1  # other z than best.pt was chosen with
    scores = {"data": data.name, "judge": judge.title, "judge_held_out": judge.held_out,
              "n_real": len(data.test_images), "n_fake": cfg.eval_images, "draws": cfg.eval_draws}
    x, rows = data.test_images / 127.5 - 1, {}
    for name in ("last", "best"):
        if (folder / f"{name}.pt").exists():
            vae, step = load(cfg, folder, f"{name}.pt", device)
            mean, log_variance = encode_all(vae, data.test_images)
            again = torch.cat([vae.decoder(part.to(device)).cpu() for part in mean.split(250)])
            moments = evaluator.look(judge, (part.to(device) for part in again.split(250)))[1]
            result = {"FD (judge)": evaluator.score_distance(sampler(cfg, vae), judge, real, *much)}
            if inception:
                result["FID"] = evaluator.score_fid(sampler(cfg, vae), inception, data.test_images, *much)
            result |= {"FD of reconstructions": (evaluator.distance(real, moments), 0.0),
                       "MSE": (F.mse_loss(again, x).item(), 0.0),
                       "KL, nats": (kl_divergence(mean, log_variance).mean().item(), 0.0)}
            added = add_attributes(vae, data, judge)
            result["attribute added"] = (sum(after for _, after in added.values()) / len(added), 0.0)
            rows[f"{name}.pt (step {step})"] = result
            scores[name] = {"step": step} | result | {"seen without and with": added}
    shown = [name for name in result if name != "KL, nats"]
    scores["summary"] = {name: result[name] for name in shown}  # of best.pt, where there is one
    print(f"\n{folder}: {cfg.eval_images} samples against {len(x)} held-out images of {data.name}, "
          f"{cfg.eval_draws} draws; judge: {judge.title}")
    evaluator.print_table(rows, list(result))
    print("\nof held-out faces without it, where the judge sees it: reconstructed, with it added")
    for attribute, (before, after) in added.items():
        print(f"{attribute:<36}{before:10.4f}{after:10.4f}")
    run.write_whole(folder / "scores.json", lambda p: p.write_text(json.dumps(scores, indent=1) + "\n"))


def main() -> int:
    action, cfg, folder = run.parse(Config, QUICK, __doc__)
    if action == "sweep":
        return run.sweep(cfg, train)
    if action in ("train", "resume"):
        return train(cfg, folder)
    device = run.pick_device(cfg.device)
    data = load_data(cfg)
    name = "best.pt" if (folder / "best.pt").exists() else "last.pt"
    vae, step = load(cfg, folder, name, device)
    if action == "sample":
        draw(cfg, vae, data, folder, f"{title(cfg, data)}, step {step}")
        print(f"wrote the grids to {folder}")
        return 0
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)
    if judge is None:
        raise run.UserError("--eval needs a judge: --judge auto, or the path of one")
    evaluate(cfg, data, judge, folder, device)
    return 0


if __name__ == "__main__":
    run.entry(main)
