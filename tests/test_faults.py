"""What happens to a run from outside: kills, signals, closed pipes, full disks, odd environments."""
import contextlib
import random
import signal
import subprocess
import time
from pathlib import Path
from shlex import join

import pytest
import torch

from tests.conftest import ROOT, TINY, call, flags, process, rows_of, run_here, same_runs

resource = pytest.importorskip("resource")  # POSIX
NAME, LONG = "dcgan_mnist", 100_000
ODD = dict(COLUMNS="40", PYTHONIOENCODING="ascii", MPLBACKEND="module://not_there",
           PYTHONPATH=str(ROOT))
SETTINGS = dict(judge="none", sample_every=0, save_every=LONG, log_every=1)


def arguments(folder: Path, **fields) -> list[str]:
    return flags(TINY[NAME] | SETTINGS | dict(out=str(folder)) | fields)


def wait_for(path: Path, pattern: str, running: subprocess.Popen, since: float = 0) -> None:
    """Until a file of that pattern exists that is not older, or the process ends."""
    while running.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # a temporary file that has just been renamed
            if any(p.stat().st_mtime > since for p in path.glob(pattern)):
                return
        time.sleep(0.001)


def test_random_kills_lose_nothing(here, pytestconfig):
    """SIGKILL while the first file is written, while a checkpoint is, at a random moment, and so on. The same
    command, with --continue, is given each time: the same bits at the end.
    """
    n, rng, killed = pytestconfig.getoption("--kills"), random.Random(time.time()), 0
    fields = dict(iters=20 * (n + 1), save_every=1, sample_every=5)
    run_here(NAME, **SETTINGS | fields, out="whole")
    folder, command = here / "killed", ["--continue", *arguments(here / "killed", **fields)]
    for kill in range(n):
        since = time.time()
        running = subprocess.Popen(**process(NAME, *command, cwd=here))
        wait_for(folder, ".writing-*", running, since)  # config.json, when training begins
        if kill % 3:
            wait_for(folder, "last.pt", running, since)
            time.sleep(rng.uniform(0, 0.6))
        if kill % 3 == 1:
            wait_for(folder, ".writing-*-last.pt", running)
            time.sleep(rng.uniform(0, 0.003))
        running.kill()
        running.communicate()
        killed += running.returncode == -signal.SIGKILL
    print(f"{killed} of {n} ended in training")
    assert call(NAME, *command)[::2] == (0, "")
    same_runs(folder, here / "whole")
    assert not list(folder.rglob(".writing*"))


@pytest.mark.parametrize("how", [signal.SIGHUP, "pipe"])
def test_a_closed_terminal_and_a_closed_pipe_save(here, how):
    """As a closed ssh and `… | head` do. What is resumed afterwards ends with the same bits."""
    running = subprocess.Popen(**process(NAME, *arguments(here / "r", iters=5000, sample_every=2), cwd=here))
    wait_for(here / "r", "samples/step_*", running)
    if how == "pipe":
        running.stdout.close()
    else:
        running.send_signal(how)
        running.stdout.read()
    error = running.stderr.read()
    assert running.wait(60) == 128 + (13 if how == "pipe" else how) and "Traceback" not in error
    assert (how == "pipe") != ("saving after this step; once more to stop at once" in error)
    command = join(["python", str(ROOT / f"{NAME}.py"), "--resume", str(here / "r")])
    assert f"to continue: {command}\n" in error
    step = torch.load(here / "r" / "last.pt", weights_only=True)["step"]
    assert 0 < step < 5000 and rows_of(here / "r")[-1]["step"] == step
    run_here(NAME, "resume", here / "r", iters=step + 2)
    run_here(NAME, **SETTINGS | dict(iters=step + 2, sample_every=2), out="whole")
    same_runs(here / "r", here / "whole")


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


def test_odd_environments_and_profilers_change_nothing(here):
    """A profiler, such as cProfile, runs a script's code although the module __main__ is its own."""
    started = process(NAME, *arguments(here / "r", iters=2, judge="auto"), cwd=here)
    profiler = "import sys; del sys.argv[0]; code = compile(open(sys.argv[0]).read(), sys.argv[0], 'exec')"
    started["args"][1:1] = ["-c", profiler + "; exec(code, {'__name__': '__main__'})"]
    started["env"] = {k: v for k, v in started["env"].items() if k != "HOME"} | ODD
    done = subprocess.run(**started, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (here / "r" / "scores.json").exists()
