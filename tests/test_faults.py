"""What happens to a run from outside: kills, signals, closed pipes, full disks, odd terminals."""
import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, flags, process, rows_of, script

resource = pytest.importorskip("resource")  # POSIX
NAME, LONG = "dcgan_mnist", 100_000
TERMINAL = dict(COLUMNS="40", PYTHONIOENCODING="ascii", MPLBACKEND="module://not_there")


def arguments(folder: Path, **fields) -> list[str]:
    fields = dict(judge="none", out=str(folder), sample_every=0, save_every=LONG, log_every=1) | fields
    return flags(TINY[NAME] | fields)


def wait_for(path: Path, pattern: str, running: subprocess.Popen, since: float = 0) -> None:
    """Until a file of that pattern exists that is not older, or the process ends."""
    while running.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # a temporary file that has just been renamed
            if any(p.stat().st_mtime > since for p in path.glob(pattern)):
                return
        time.sleep(0.001)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    from common.run import tensors
    return dict(tensors(torch.load(path, weights_only=True)))


def test_random_kills_lose_nothing(here, pytestconfig):
    """SIGKILL at random moments, every other one while a checkpoint is written: the same bits at the end."""
    n, rng = pytestconfig.getoption("--kills"), random.Random(time.time())
    iters, killed = 20 * (n + 1), 0
    fields = dict(iters=iters, save_every=1, sample_every=5)
    script(NAME, *arguments(here / "whole", **fields), cwd=here)
    folder, command = here / "killed", arguments(here / "killed", **fields)
    for kill in range(n):
        since = time.time()
        running = subprocess.Popen(**process(NAME, *command, cwd=here))
        wait_for(folder, "config.json", running, since)  # written when training begins
        time.sleep(rng.uniform(0, 0.6))
        if kill % 2 == 0:
            wait_for(folder, ".writing-*-last.pt", running)
            time.sleep(rng.uniform(0, 0.003))
        running.kill()
        running.communicate()
        killed += running.returncode == -signal.SIGKILL
        command = ["--resume", str(folder)]
    print(f"{killed} of {n} ended in training")
    script(NAME, "--resume", str(folder), cwd=here)
    whole, killed = state_of(here / "whole" / "last.pt"), state_of(folder / "last.pt")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[k], killed[k]) for k in whole)
    assert [row["step"] for row in rows_of(folder)] == list(range(1, iters + 1))
    assert len(list((folder / "samples").iterdir())) == iters // 5 and not list(folder.rglob(".writing*"))


@pytest.mark.parametrize("how", [signal.SIGHUP, "pipe"])
def test_a_closed_terminal_and_a_closed_pipe_save(here, how):
    """As a closed ssh and `… | head` do."""
    command = arguments(here / "r", iters=LONG, sample_every=2)
    running = subprocess.Popen(**process(NAME, *command, cwd=here))
    wait_for(here / "r", "samples/step_*", running)
    if how == "pipe":
        running.stdout.close()
    else:
        running.send_signal(how)
        running.stdout.read()
    error = running.stderr.read()
    assert running.wait(60) == (141 if how == "pipe" else 128 + how) and "Traceback" not in error
    assert (how == "pipe") != ("saving after this step; once more to stop at once" in error)
    step = torch.load(here / "r" / "last.pt", weights_only=True)["step"]
    assert 0 < step < LONG and rows_of(here / "r")[-1]["step"] == step


def test_a_full_disk_is_one_line(here):
    """As good as: no file may be larger than the space that is left."""
    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    started = process(NAME, *arguments(here / "r", iters=9), cwd=here)
    done = subprocess.run(**started, preexec_fn=small, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "last.pt" in done.stderr
    assert not list((here / "r").rglob(".writing*"))


def test_odd_terminals_and_profilers_change_nothing(here):
    started = process(NAME, *arguments(here / "r", iters=2, judge="auto"), cwd=here)
    started["args"][1:1] = ["-O", "-m", "cProfile", "-o", str(here / "profile")]
    started["env"] = {k: v for k, v in started["env"].items() if k != "HOME"} | TERMINAL
    done = subprocess.run(**started, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (here / "r" / "scores.json").exists() and (here / "profile").exists()
    started["args"][-len(arguments(here)):] = ["--help"]
    help_text = subprocess.run(**started, timeout=60).stdout
    assert "Adam's learning rate for G" in " ".join(help_text.split())


def test_the_status_line_fits_the_terminal(here):
    import pty
    parent, child = pty.openpty()
    started = process(NAME, *arguments(here / "r", iters=3), cwd=here) | dict(stdout=child)
    started["env"] |= dict(COLUMNS="40")
    running = subprocess.Popen(**started)
    os.close(child)
    text = b""
    with open(parent, "rb", buffering=0) as reader:
        while True:
            try:
                text += reader.read(4096)
            except OSError:  # the child has closed it
                break
    assert running.wait(60) == 0
    status = [part for part in text.decode().split("\r") if part.startswith("step ")]
    assert status and all(len(part.split("\x1b")[0]) < 40 for part in status)
