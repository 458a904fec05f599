"""Several processes, as torchrun starts them: here two on the CPU."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY, flags, rows_of, run_here

# a network without batch norm or random numbers, so that two processes do what one does
PLAIN = '''"""Plain."""
import os
from dataclasses import dataclass
import torch
from common.cli import Settings
from common.datasets import Batches, Data
from common.run import Run, launch

@dataclass
class Config(Settings):
    iters: int = 10  # .
    batch_size: int = 8  # .
    data: str = "auto"  # .

def main(run):
    def load(cfg):
        images = torch.arange(24 * 12).view(24, 3, 2, 2).remainder(251).byte()
        return Data("numbers", "digits", "synthetic", images, torch.arange(24) % 10, (), "digest")
    data = run.get_data(load)
    batches = Batches(data, run.cfg.batch_size, run.cfg.seed, run.device)
    torch.manual_seed(run.cfg.seed)
    layers = torch.nn.Linear(12, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    opt = torch.optim.Adam(net.parameters(), 0.01)
    run.track(data, net=net, opt=opt)
    for step in run.steps():
        x, y = batches(step - 1)
        x.requires_grad_()
        out = net(x)[:, 0]
        slope, = torch.autograd.grad(out.sum(), x, create_graph=True)  # double backward
        loss = (out - y).square().mean() + slope.square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.record(loss=loss)
        open(f"at-{os.environ.get('RANK', 'alone')}", "w").write(f"{os.getpid()}")
    torch.save(net.state_dict(), f"weights-{os.environ.get('RANK', 'alone')}.pt")

if __name__ == "__main__":
    launch(main, Config, {})
'''


@pytest.fixture
def plain(tmp_path) -> Path:
    (tmp_path / "plain.py").write_text(PLAIN)
    return tmp_path / "plain.py"


def start(path: Path, *arguments: str, cwd: Path, n: int = 2) -> list[subprocess.Popen]:
    """n processes of a script that know each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = os.environ | dict(WORLD_SIZE=str(n), MASTER_ADDR="localhost", MASTER_PORT=str(port),
                               PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    options = dict(cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return [subprocess.Popen([sys.executable, str(path), *arguments], **options,
                             env=common | dict(RANK=str(i), LOCAL_RANK=str(i))) for i in range(n)]


def ends(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    texts = [p.communicate(timeout=timeout) for p in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, texts, strict=True)]


def alone(path: Path, *arguments: str, cwd: Path) -> None:
    subprocess.run([sys.executable, str(path), *arguments], cwd=cwd, check=True, capture_output=True,
                   env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))


def weights(folder: Path, who: str) -> torch.Tensor:
    return torch.cat([x.flatten() for x in torch.load(folder / f"weights-{who}.pt").values()])


def test_two_processes_are_equal_to_the_bit_and_to_rounding_as_one(plain, tmp_path):
    first, second = ends(start(plain, "--log-every", "5", cwd=tmp_path))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "run: runs/plain-synthetic" in first[1] and second[1] == ""
    a, b = weights(tmp_path, "0"), weights(tmp_path, "1")
    assert torch.equal(a, b)
    alone(plain, "--log-every", "5", cwd=tmp_path)
    one = weights(tmp_path, "alone")
    torch.testing.assert_close(a, one, rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    assert (one - torch.nn.utils.parameters_to_vector(torch.nn.Sequential(
        torch.nn.Linear(12, 4), torch.nn.Linear(4, 1)).parameters())).abs().max() > 0.01
    assert len(rows_of(tmp_path / "runs" / "plain-synthetic")) == 2


def test_checkpoints_go_from_one_process_to_two_and_back(plain, tmp_path):
    run = "runs/plain-synthetic"
    alone(plain, "--iters", "3", cwd=tmp_path)
    assert [p[0] for p in ends(start(plain, "--resume", run, "--iters", "7", cwd=tmp_path))] == [0, 0]
    assert len(torch.load(tmp_path / run / "last.pt", weights_only=True)["rng"]) == 2
    alone(plain, "--resume", run, "--iters", "10", cwd=tmp_path)
    mixed = weights(tmp_path, "alone")
    alone(plain, cwd=tmp_path)
    torch.testing.assert_close(mixed, weights(tmp_path, "alone"), rtol=1e-5, atol=1e-6)


def wait_until_both_train(folder: Path) -> list[int]:
    """Their process numbers."""
    paths = [folder / f"at-{i}" for i in range(2)]
    for _ in range(1200):
        numbers = [p.read_text() for p in paths if p.exists()]  # read once: each step writes them anew
        if all(numbers) and len(numbers) == len(paths):
            return [int(number) for number in numbers]
        time.sleep(0.1)
    raise AssertionError("they do not train")


def test_a_signal_to_any_process_saves_and_stops_all(plain, tmp_path):
    both = start(plain, "--iters", "1000000", cwd=tmp_path)
    wait_until_both_train(tmp_path)
    both[1].send_signal(signal.SIGTERM)
    first, second = ends(both)
    assert first[0] == second[0] == 143 and "to continue: plain.py --resume runs/plain-synthetic" in first[1]
    assert (tmp_path / "runs" / "plain-synthetic" / "last.pt").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(plain, tmp_path, killed):
    both = start(plain, "--iters", "1000000", cwd=tmp_path)
    wait_until_both_train(tmp_path)
    both[killed].kill()
    status, _, error = ends(both, timeout=60)[1 - killed]
    *torch_s, ours = error.splitlines()
    assert (status, ours) == (2, "error: another of torchrun's processes has ended")
    assert not torch_s or killed == 0 and "Traceback" not in error  # torch warns if its store is gone


@pytest.mark.parametrize("arguments, message", [
    ("--batch-size 9", "--batch-size 9 is not a multiple of 2 processes"), ("--iters 0", "--iters 0: must")])
def test_mistakes_are_told_by_one_process(plain, tmp_path, arguments, message):
    first, second = ends(start(plain, *arguments.split(), cwd=tmp_path))
    assert first[0] == second[0] == 2 and second[1:] == ("", "")
    assert first[2].startswith("error: ") and message in first[2] and first[2].count("\n") == 1


def test_a_missing_meeting_point_is_told_in_one_line(plain, tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), WORLD_SIZE="2", RANK="0")
    environment.pop("MASTER_ADDR", None)
    done = subprocess.run([sys.executable, str(plain)], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: WORLD_SIZE can't be read") and "set by torchrun" in done.stderr


def test_a_script_trains_and_scores_with_two_processes(here, name="sngan_iclevr"):
    fields = TINY[name] | dict(iters=3, eval_every=2, sample_every=2)
    first, second = ends(start(ROOT / f"{name}.py", *flags(fields), cwd=here))
    assert first[0] == second[0] == 0, first[2] + second[2]
    folder, = (here / "runs").iterdir()
    assert (folder / "scores.json").exists() and (folder / "best.pt").exists() and second[1] == ""
    for status, _, error in ends(start(ROOT / f"{name}.py", "--sample", str(folder), "--to", "x", cwd=here)):
        assert status == 2 and not (here / "x").exists() and error in (
            "", "error: --sample needs one process only: call it without torchrun\n")
    run_here(name, "resume", folder, iters=4)
