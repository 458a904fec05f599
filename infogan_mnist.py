"""InfoGAN on MNIST: codes that come to mean digit, slant and stroke width without a label (Chen et al. 2016).

    python infogan_mnist.py --quick                          # minutes on two CPU cores
    python infogan_mnist.py --iters 70000                    # 150 epochs at 64×64, one GPU
    python infogan_mnist.py --sweep seed=0,1,2 --ch 16 --image-size 32
    python infogan_mnist.py --resume runs/infogan_mnist      # go on; --sample and --eval take a run too

Measured so far on a CPU (AMD EPYC; see results/), real MNIST, 32×32, width 16, 6,000 iterations of 64 images:
code → digit 0.59 ± 0.04 over three seeds, a code that thickens (Spearman's correlation with the stroke width
0.90 ± 0.11). The full size has not been run yet; the paper has 0.95.
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

import evaluator
from common import losses, run
from common.blocks import init_dcgan
from common.datasets import Batches, Digits, load_digits, pick_digits


@dataclass
class Config:
    iters: int = 70_000  # iterations, 150 epochs; one is a step of D and one of G and Q
    batch_size: int = 128  # images a step
    lr_g: float = 1e-3  # Adam's rate for G and Q
    lr_d: float = 2e-4  # Adam's rate for D and the shared body
    z_dim: int = 62  # dimensions of the noise z ~ U(-1, 1)
    ch: int = 64  # width: feature maps of the layers nearest the image
    image_size: Literal[32, 64] = 64  # height and width of the images
    ema: float = 0.0  # decay of the averaged G that is sampled and scored; 0: G itself
    data: str = "auto"  # auto (MNIST if it can be had, else drawn), mnist, drawn, or the folder of MNIST/raw
    n_drawn: int = 60_000  # drawn digits to train on
    out: str = ""  # folder of the run; empty: runs/infogan_mnist
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
    category: int = 0  # the one that --sample draws alone
    # the method
    n_categories: int = 10  # values of the categorical code, a one-hot vector
    n_continuous: int = 2  # continuous codes, each U(-1, 1)
    q_weight: float = 0.1  # weight of the continuous codes' likelihood


# at width 16 the full job's rates let G fall back on one image a category
QUICK = dict(iters=2000, batch_size=64, lr_d=5e-4, ch=16, image_size=32, log_every=50, sample_every=100,
             eval_every=500, save_every=500, judge_steps=1000, eval_images=2000, q_weight=0.3)


# ---------------------------------------------------------------------- networks

def widths(ch: int, image_size: int) -> list[int]:
    """Feature maps at 4×4, 8×8, … up to half the image's size: 8, 4, 2, 1 times ch at 64×64."""
    return [2**k * ch for k in reversed(range((image_size // 4).bit_length() - 1))]


def generator(code: int, ch: int, image_size: int) -> nn.Sequential:
    """Noise, one-hot category and continuous codes [B, code] → images [B, 1, S, S] in [-1, 1]."""
    def up(i: int, o: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(i, o, 4, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    w = widths(ch, image_size)
    layers = [layer for i, o in zip(w, w[1:]) for layer in up(i, o, 2, 1)]
    return nn.Sequential(nn.Unflatten(1, (code, 1, 1)),
                         *up(code, w[0], 1, 0),  # [B, 8·ch, 4, 4]
                         *layers,  # [B, 4·ch, 8, 8], [B, 2·ch, 16, 16], [B, ch, 32, 32]
                         nn.ConvTranspose2d(ch, 1, 4, 2, 1, bias=False), nn.Tanh())  # [B, 1, 64, 64]


def shared_body(ch: int, image_size: int) -> nn.Sequential:
    """images [B, 1, S, S] → what D's and Q's heads both read, [B, 8·ch, 4, 4] (at 32×32: 4·ch)."""
    act = nn.LeakyReLU(0.2)

    def down(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), act]
    w = widths(ch, image_size)[::-1]
    return nn.Sequential(nn.Conv2d(1, ch, 4, 2, 1, bias=False), act,  # [B, ch, 32, 32]
                         *(layer for i, o in zip(w, w[1:]) for layer in down(i, o)))


def d_head(features: int) -> nn.Sequential:
    """[B, features, 4, 4] → logits [B, 1]; the sigmoid is in the loss."""
    return nn.Sequential(nn.Conv2d(features, 1, 4, bias=False), nn.Flatten())


class QHead(nn.Module):
    """[B, features, 4, 4] → what the codes seem to be: logits [B, K], means and variances [B, C]."""

    def __init__(self, features: int, n_categories: int, n_continuous: int):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(features * 4 * 4, 100), nn.ReLU(),
                                  nn.Linear(100, 10), nn.Unflatten(1, (10, 1, 1)))
        self.category = nn.Conv2d(10, n_categories, 1)
        self.mean = nn.Conv2d(10, n_continuous, 1)
        self.variance = nn.Conv2d(10, n_continuous, 1)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h = self.body(h)
        # never below 0.01, a standard deviation of a tenth: else the likelihood grows without bound
        variance = F.softplus(self.variance(h).float()) + 0.01
        return self.category(h).flatten(1).float(), self.mean(h).flatten(1).float(), variance.flatten(1)


def q_losses(guess: tuple, category: torch.Tensor,
             continuous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative variational lower bounds on the information G keeps of its codes (Chen et al. 2016, eq. 5).

    Cross-entropy of the category [B], on logits; Gaussian negative log-likelihood of the continuous codes
    [B, C], averaged over batch and codes.
    """
    logits, mean, variance = guess
    likelihood = 0.5 * ((continuous - mean).square() / variance + variance.log() + math.log(2 * math.pi))
    return F.cross_entropy(logits, category), likelihood.mean()


# ---------------------------------------------------------------------- training

def build(cfg: Config, device: torch.device) -> tuple[nn.Module, ...]:
    """G, the shared body, D's head, Q's head and the averaged copy of G, freshly initialised."""
    features = widths(cfg.ch, cfg.image_size)[0]
    G = generator(cfg.z_dim + cfg.n_categories + cfg.n_continuous, cfg.ch, cfg.image_size)
    nets = G, shared_body(cfg.ch, cfg.image_size), d_head(features), QHead(
        features, cfg.n_categories, cfg.n_continuous)
    G, body, D, Q = (init_dcgan(net).to(device, memory_format=torch.channels_last) for net in nets)
    return G, body, D, Q, copy.deepcopy(G).eval().requires_grad_(False)


def join(z: torch.Tensor, category: torch.Tensor, continuous: torch.Tensor,
         n_categories: int) -> torch.Tensor:
    """G's input [B, z_dim + K + C]: noise, the category [B] as a one-hot vector, continuous codes [B, C]."""
    # F.one_hot would have the host look at the values
    one_hot = category[:, None] == torch.arange(n_categories, device=z.device)
    return torch.cat([z, one_hot.to(z.dtype), continuous], 1)


def train(cfg: Config, resume: Path | None = None) -> int:
    """Train, score, and leave everything in the run's folder; returns the exit status."""
    # ---- data, judge, networks, optimisers
    device = run.pick_device(cfg.device)
    if cfg.deterministic:
        run.set_deterministic()
    if cfg.ema >= 1 or cfg.n_categories < 2:
        raise run.UserError(f"--ema {cfg.ema} must be below 1, --n-categories {cfg.n_categories} at least 2")
    cfg.data = pick_digits(cfg.data)
    data = load_digits(cfg.data, cfg.image_size, cfg.n_drawn)
    batches = Batches(data.images, data.labels, cfg.batch_size, cfg.seed, device)
    if resume is None and cfg.out:
        run.free_folder(cfg.out, "")  # ends here where it exists, not after the judge's training
    judge = evaluator.get_judge(cfg.judge, data, cfg.judge_width, cfg.judge_steps, device)

    torch.manual_seed(cfg.seed)
    G, body, D, Q, ema = build(cfg, device)
    adam = dict(betas=(0.5, 0.999), fused=True, capturable=device.type == "cuda")
    lr_g, lr_d = (torch.tensor(rate, device=device) for rate in (cfg.lr_g, cfg.lr_d))
    opt_g = torch.optim.Adam([*G.parameters(), *Q.parameters()], lr_g, **adam)
    opt_d = torch.optim.Adam([*body.parameters(), *D.parameters()], lr_d, **adam)
    ema_weight = torch.tensor(1.0, device=device)  # the new G's share in the average
    names = ("d_loss", "g_loss", "q_category", "q_continuous", "d_real", "d_fake_before", "d_fake_after")
    sums, logged = torch.zeros(len(names), device=device), 0  # their sums since the step last logged
    start, best = 0, -1.0

    # ---- resume
    nets = {"G": G, "body": body, "D": D, "Q": Q, "ema": ema, "opt_g": opt_g, "opt_d": opt_d}
    if resume is not None and (resume / "last.pt").exists():
        state = run.load_checkpoint(resume / "last.pt", device)
        if state["data"] != data.digest:
            raise run.UserError(f"{cfg.data} no longer holds the images of {resume}: bring them back")
        for name, thing in nets.items():
            thing.load_state_dict(state[name])
        start, best, sums, logged = (state[key] for key in ("step", "best", "sums", "logged"))
        run.set_rng_state(state["rng"], device)

    # ---- one iteration: a step of D, one of G and Q, the average. The host reads nothing back
    averaged = list(zip(ema.state_dict().values(), G.state_dict().values()))  # batch norm's statistics too

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    def iteration(images: torch.Tensor) -> None:
        real, n = images.float() / 127.5 - 1, len(images)
        z = torch.rand(n, cfg.z_dim, device=device) * 2 - 1
        category = torch.randint(cfg.n_categories, (n,), device=device)
        continuous = torch.rand(n, cfg.n_continuous, device=device) * 2 - 1

        # D and the body; real and fake apart: each has its own statistics in batch norm
        with autocast():
            fake = G(join(z, category, continuous, cfg.n_categories))
            score_real, score_fake = D(body(real)).float(), D(body(fake.detach())).float()
        d_loss = losses.bce_d(score_real, score_fake)
        opt_d.zero_grad()
        d_loss.backward()
        opt_d.step()

        # G and Q together; the body serves Q, but only D trains it
        body.requires_grad_(False), D.requires_grad_(False)
        with autocast():
            h = body(fake)
            score_again, guess = D(h).float(), Q(h)
        body.requires_grad_(True), D.requires_grad_(True)
        g_loss = losses.bce_g(score_again)
        q_category, q_continuous = q_losses(guess, category, continuous)
        opt_g.zero_grad()
        (g_loss + q_category + cfg.q_weight * q_continuous).backward()
        opt_g.step()

        with torch.no_grad():
            for average, new in averaged:
                average.lerp_(new, ema_weight) if new.is_floating_point() else average.copy_(new)
            # D(G(z)) before G's step: of the updated D. After it: what D first says in the next iteration
            probabilities = [score.sigmoid().mean() for score in (score_real, score_again, score_fake)]
            sums.add_(torch.stack([d_loss, g_loss, q_category, q_continuous, *probabilities]).detach())

    # ---- what is written along the way
    g = torch.Generator().manual_seed(cfg.seed)
    shown = columns_of_classes(cfg, g, rows=10, varied=None)
    if judge:  # best.pt is chosen by the distance to training images; scores are told with test images
        g = torch.Generator().manual_seed(0)
        chosen = data.images[torch.randperm(len(data.images), generator=g)[:len(data.test_images)]]
        choice = evaluator.real_moments(judge, chosen, device)

    def save(name: str, step: int) -> None:
        run.save_checkpoint(folder.folder / name, dict(
            {name: thing.state_dict() for name, thing in nets.items()}, step=step, best=best, sums=sums,
            logged=logged, data=data.digest, rng=run.rng_state(device), config=vars(cfg)))

    def due(every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == cfg.iters)

    # ---- the loop
    columns = [*names, "fd_judge", "accuracy_code"]
    name = "infogan_mnist" + ("-drawn" if cfg.data == "drawn" else "")
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
                heading = f"{title(cfg, data)}, step {step}: a category each column, other codes at random"
                folder.picture(step, make(cfg, ema, *shown), heading, nrow=cfg.n_categories)
            if judge and due(cfg.eval_every, step):
                fd = evaluator.score_digits(sampler(cfg, ema), judge, choice, cfg.eval_images, 1, cfg.seed)
                code = evaluator.score_category(coded(cfg, ema), cfg.n_categories, judge, cfg.eval_images, 1,
                                                cfg.seed)
                fd, accuracy = fd["FD (judge)"][0], code["accuracy"][0]
                folder.log(step, fd_judge=fd, accuracy_code=accuracy)
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
    return f"infogan_mnist on {data.name}, ch {cfg.ch}, seed {cfg.seed}"


# ---------------------------------------------------------------------- pictures and scores

def sampler(cfg: Config, G: nn.Module) -> evaluator.Sampler:
    """Images of categories at random, as evaluator.score_digits takes them."""
    images = coded(cfg, G)
    return lambda n, g: images(torch.randint(cfg.n_categories, (n,), generator=g), g)


def coded(cfg: Config, G: nn.Module):
    """A function (category [N], generator) → images, noise and continuous codes at random."""
    def images(category: torch.Tensor, g: torch.Generator) -> torch.Tensor:
        return make(cfg, G, uniform(len(category), cfg.z_dim, g), category,
                    uniform(len(category), cfg.n_continuous, g))
    return images


def uniform(n: int, dims: int, g: torch.Generator) -> torch.Tensor:
    """[n, dims], U(-1, 1)"""
    return torch.rand(n, dims, generator=g) * 2 - 1


@torch.no_grad()
def make(cfg: Config, G: nn.Module, z: torch.Tensor, category: torch.Tensor,
         continuous: torch.Tensor) -> torch.Tensor:
    """Images [N, 1, S, S] of noise [N, z_dim], categories [N] and continuous codes [N, C]."""
    return G(join(z, category, continuous, cfg.n_categories).to(next(G.parameters()).device))


def columns_of_classes(cfg: Config, g: torch.Generator, rows: int, varied: int | None) -> tuple:
    """Noise, categories and continuous codes of a grid, row by row, with a category each column.

    varied: the continuous code that goes from -1 to 1 down the rows, others 0 and the noise of a column the
    same; None: all at random.
    """
    k = cfg.n_categories
    category = torch.arange(k).repeat(rows)
    if varied is None:
        return uniform(rows * k, cfg.z_dim, g), category, uniform(rows * k, cfg.n_continuous, g)
    continuous = torch.zeros(rows * k, cfg.n_continuous)
    continuous[:, varied] = torch.linspace(-1, 1, rows).repeat_interleave(k)
    return uniform(k, cfg.z_dim, g).repeat(rows, 1), category, continuous


def load(cfg: Config, folder: Path, name: str, device: torch.device) -> tuple[nn.Module, nn.Module, int]:
    """The averaged G of a checkpoint, what Q reads from an image (body and head), and the step it is from."""
    state = run.load_checkpoint(folder / name, device)
    _, body, _, Q, ema = build(cfg, device)
    for net, part in ((ema, "ema"), (body, "body"), (Q, "Q")):
        net.load_state_dict(state[part])
    return ema, nn.Sequential(body, Q).eval().requires_grad_(False), state["step"]


def draw(cfg: Config, ema: nn.Module, data: Digits, folder: Path, heading: str) -> None:
    """Grids: samples of each category, each continuous code's way through all categories and through one."""
    g, k = torch.Generator().manual_seed(cfg.seed), cfg.n_categories
    run.save_grid(folder / "samples.png", make(cfg, ema, *columns_of_classes(cfg, g, 10, None)),
                  f"{heading}: a category each column, other codes at random", nrow=k)
    for c in range(cfg.n_continuous):
        run.save_grid(folder / f"code_{c + 1}.png", make(cfg, ema, *columns_of_classes(cfg, g, 10, c)),
                      f"{heading}: a category each column, code {c + 1} from -1 to 1 down the rows", nrow=k)
        # one category: eight noises, the code in steps of a fifth and on to twice what G was trained with
        z, steps = uniform(8, cfg.z_dim, g).repeat_interleave(21, 0), torch.linspace(-2, 2, 21).repeat(8)
        category = torch.full((len(z),), cfg.category)
        continuous = torch.zeros(len(z), cfg.n_continuous)
        continuous[:, c] = steps
        what = f"category {cfg.category}, code {c + 1} from -2 to 2 (columns 6 to 16: trained with)"
        run.save_grid(folder / f"category_{cfg.category}_code_{c + 1}.png",
                      make(cfg, ema, z, category, continuous), f"{heading}: {what}", nrow=21)
    real = data.images[torch.randint(len(data.images), (32,), generator=g)].float() / 127.5 - 1
    kind = "drawn" if cfg.data == "drawn" else "real"
    run.save_grid(folder / "real_beside_generated.png", torch.cat([real, sampler(cfg, ema)(32, g).cpu()]),
                  f"{heading}: four rows of {kind} images, four of generated ones")


def evaluate(cfg: Config, data: Digits, judge: evaluator.Judge, folder: Path, device: torch.device) -> None:
    """Score last.pt and best.pt; print what their codes mean and write scores.json."""
    real = evaluator.real_moments(judge, data.test_images, device)
    inception = evaluator.get_inception(cfg.fid_weights, device)
    much = cfg.eval_images, cfg.eval_draws, cfg.seed + 1  # other z than best.pt was chosen with
    scores = {"data": data.name, "judge": judge.title, "judge_held_out": judge.held_out,
              "n_real": len(data.test_images), "n_fake": cfg.eval_images, "draws": cfg.eval_draws}
    print(f"\n{folder}: {cfg.eval_images} generated images, {data.name}, {cfg.eval_draws} draws; "
          f"judge: {judge.title}")
    for name in ("best", "last"):
        if not (folder / f"{name}.pt").exists():
            continue
        ema, q, step = load(cfg, folder, f"{name}.pt", device)
        category = evaluator.score_category(coded(cfg, ema), cfg.n_categories, judge, *much)
        moved = evaluator.score_continuous(lambda *codes: make(cfg, ema, *codes), cfg.z_dim, cfg.n_categories,
                                           cfg.n_continuous, *much[1:])
        result = {"code → digit": category["accuracy"]} | moved
        result |= evaluator.score_digits(sampler(cfg, ema), judge, real, *much)
        if inception:
            result["FID"] = evaluator.score_fid(sampler(cfg, ema), inception, data.test_images, *much)
        if data.test_factors:
            result |= evaluator.score_reading(read(q, data.test_images, device), data)
        scores[name] = {"step": step, "digit": category["digit"], "purity": category["purity"]} | result
        print(f"\n{name}.pt (step {step}): codes 0 to {cfg.n_categories - 1} are best taken as the digits "
              f"{' '.join(str(d) for d in category['digit'])}; share of each code's commonest digit, %: "
              f"{' '.join(f'{100 * p:.0f}' for p in category['purity'][0])}")
        for score, (mean, std) in result.items():
            if score != "histogram":
                print(f"  {score:<40}{mean:10.4f} ± {std:.4f}")
    last = scores["last"]
    scores["summary"] = {"code → digit": last["code → digit"]}
    for factor in ("slant", "width"):  # of the code that moves it most; which one, and its sign, are chance
        found = [last[f"code {c + 1} ~ {factor}"] for c in range(cfg.n_continuous)]
        mean, std = max(found, key=lambda pair: abs(pair[0]))
        scores["summary"][f"a code ~ {factor}"] = abs(mean), std
    scores["summary"] |= {name: last[name] for name in ("FD (judge)", "FID") if name in last}
    run.write_whole(folder / "scores.json", lambda p: p.write_text(json.dumps(scores, indent=1) + "\n"))


def read(q: nn.Module, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What Q takes images, uint8 [N, 1, S, S], for: categories [N] and means of continuous codes [N, C]."""
    parts = [q(part.to(device) / 127.5 - 1) for part in images.split(500)]
    return torch.cat([p[0].argmax(1) for p in parts]).cpu(), torch.cat([p[1] for p in parts]).cpu()


def main() -> int:
    action, cfg, folder = run.parse(Config, QUICK, __doc__)
    if action == "sweep":
        return run.sweep(cfg, train)
    if action in ("train", "resume"):
        return train(cfg, folder)
    device = run.pick_device(cfg.device)
    if cfg.category >= cfg.n_categories:
        raise run.UserError(f"--category {cfg.category}: this run has 0 to {cfg.n_categories - 1}")
    data = load_digits(cfg.data, cfg.image_size, cfg.n_drawn)
    ema, _, step = load(cfg, folder, "last.pt", device)
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
