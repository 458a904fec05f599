"""Several processes, as torchrun starts them: here two on the CPU."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.losses import rahinge
from tests.conftest import ROOT, TINY, rows_of, run_here

# a network without batch norm or random numbers, so that two processes do what one does
PLAIN = '''
import os
import signal
import time
import torch
from common.datasets import Batches, load_digits
from dcgan_mnist import QUICK, RECIPES, Config
from harness import dist
from harness.run import launch

def load(cfg):
    if dist.rank() == 0:  # writes the cache, which the other reads
        time.sleep(0.3)
        open("cache", "w").close()
    assert os.path.exists("cache")
    return load_digits(cfg, 32)

def main(run):
    data = run.get_data(load)
    batches = Batches(data, run.cfg.batch_size, run.cfg.seed, run.device, dist.rank(), dist.world_size())
    torch.manual_seed(run.cfg.seed)
    layers = torch.nn.Linear(1024, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    opt = torch.optim.Adam(net.parameters(), 0.01)
    run.register(data, net=net, opt=opt)
    try:
        for step in run.steps():
            x, y = batches(step - 1)
            out = net(x.requires_grad_())[:, 0]
            slope, = torch.autograd.grad(out.sum(), x, create_graph=True)  # double backward
            loss = (out - y).square().mean() + slope.square().mean()
            opt.zero_grad()
            loss.backward()
            dist.average_gradients(opt)
            opt.step()
            run.log(loss=loss)
            if dist.rank() == 1 and step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        torch.save(net.state_dict(), f"weights-{dist.rank()}.pt")

if __name__ == "__main__":
    launch(main, Config, RECIPES, QUICK)
'''

# all scripts train in the same two processes; one of them is scored, too; last, a relativistic hinge
ALL = '''
import pytest
import torch
from common.files import UserError
from harness import dist
from harness.run import Run
from sngan_iclevr import D_LOSS
from tests.conftest import TINY, run_here

runs, register = [], Run.register

def kept(run, data, *parts, **tracked):
    register(run, data, *parts, **tracked)
    runs.append(tracked)
Run.register = kept
with dist.process_group():
    rank = dist.rank()
    assert dist.all_gather(rank) == [0, 1] and dist.all_reduce_max(-rank) == 0
    for name in TINY:
        scored = dict(eval_every=3, sample_every=3) if name == "sngan_iclevr" else dict(judge="none")
        run_here(name, out=name, iters=3, **scored)
    with pytest.raises(UserError, match="not a multiple of 2 processes"):
        run_here("sngan_iclevr", out="x", batch_size=9)
    with pytest.raises(UserError, match="needs one process only"):
        run_here("sngan_iclevr", "sample", "sngan_iclevr", to="x")
    nets = [[{name: p.detach() for name, p in thing.named_parameters()} for thing in tracked.values()
             if isinstance(thing, torch.nn.Module)] for tracked in runs]
    torch.save((nets, torch.rand(3)), f"all-{rank}.pt")
    torch.manual_seed(0)
    net, x = torch.nn.Linear(5, 1), torch.randn(2, 2, 4, 5) + torch.arange(2.0).view(1, 2, 1, 1)
    first, second = x[:, rank]  # the processes' shares differ in their means
    loss, opt = D_LOSS["rahinge"](net(first), net(second)), torch.optim.SGD(net.parameters(), 0.1)
    loss.backward()
    dist.average_gradients(opt)
    torch.save((net.state_dict(), (first, second), [p.grad for p in net.parameters()]), f"hinge-{rank}.pt")
'''


def pair(code: str, *arguments: str, cwd: Path) -> list[tuple[int, str, str]]:
    """Two processes of a program that know each other; exit status, output and errors of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (cwd / "plain.py").write_text(code)
    common = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port),
                               PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    options = dict(cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [subprocess.Popen([sys.executable, "plain.py", *arguments], **options,
                             env=common | dict(RANK=str(i), LOCAL_RANK=str(i))) for i in range(2)]
    texts = [p.communicate(timeout=200) for p in both]
    return [(p.returncode, out, err) for p, (out, err) in zip(both, texts, strict=True)]


def weights(folder: Path, rank: int = 0) -> torch.Tensor:
    return torch.cat([x.flatten() for x in torch.load(folder / f"weights-{rank}.pt").values()])


def test_a_run_goes_from_one_process_to_two_and_back(tmp_path, monkeypatch):
    """Both have the same weights, to rounding those of one; a signal to the second stops both."""
    (tmp_path / "plain.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TINY, "plain", TINY["dcgan_mnist"])
    run = run_here("plain", iters=3)
    start = weights(tmp_path)
    (tmp_path / "cache").unlink()
    first, second = pair(PLAIN, "--resume", str(run), "--iters", "100000", "--log-every", "2", cwd=tmp_path)
    assert first[0] == second[0] == 143, first[2] + second[2]
    assert f"to continue: python plain.py --resume {run}" in first[2] and second[1] == ""
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 7 and len(state["rng"]) == 2
    two = weights(tmp_path, 0)
    assert torch.equal(two, weights(tmp_path, 1)) and (two - start).abs().max() > 0.01
    assert [row["step"] for row in rows_of(run)] == [2, 3, 4, 6]
    run_here("plain", "resume", run, iters=10)
    mixed = weights(tmp_path)
    run_here("plain", iters=10)
    torch.testing.assert_close(mixed, weights(tmp_path), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def both(workdir) -> Path:
    """The folder in which two processes ran ALL."""
    folder = workdir / "both"
    folder.mkdir()
    (workdir / "data").mkdir(exist_ok=True)
    (folder / "data").symlink_to(workdir / "data")
    first, second = pair(ALL, cwd=folder)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert second[1] == "" and "sngan_iclevr: data synthetic scenes" in first[1]
    return folder


def test_two_processes_have_the_relativistic_hinge_s_gradient_of_the_whole_batch(both):
    shares = [torch.load(both / f"hinge-{i}.pt") for i in range(2)]
    net, ((a, b), (c, d)) = torch.nn.Linear(5, 1), (images for _, images, _ in shares)
    net.load_state_dict(shares[0][0])
    rahinge(net(torch.cat([a, c])), net(torch.cat([b, d]))).backward()
    for _, _, gradients in shares:
        torch.testing.assert_close(gradients, [p.grad for p in net.parameters()])
    each = (rahinge(net(a), net(b)) + rahinge(net(c), net(d))) / 2  # of its own share alone
    assert (torch.autograd.grad(each, net.weight)[0] - net.weight.grad).abs().max() > 0.05


def test_all_scripts_train_with_two_processes(both, here):
    (nets, noise), (others, other_noise) = (torch.load(both / f"all-{i}.pt") for i in range(2))
    for name, ours, theirs in zip(TINY, nets, others, strict=True):
        for net, other in zip(ours, theirs, strict=True):
            assert net and all(torch.equal(p, other[key]) for key, p in net.items()), name
    assert not torch.equal(noise, other_noise)  # each draws its own z
    assert all((both / "sngan_iclevr" / name).exists() for name in ("scores.json", "best.pt", "progress.gif"))
    assert not (both / "x").exists()
    run_here("sngan_iclevr", "resume", both / "sngan_iclevr", iters=4)
