"""Sweeps: which runs they make, that each is made once, how they stop, and the table of their scores."""
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import acgan_celeba
from common.files import UserError
from harness.cli import Stopped
from tests.conftest import TINY, flags
from tools import sweep


def call(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *argv])
    return sweep.main()


def named(script, items, extra=()):
    return {job.folder.name: job.flags for job in sweep.combinations(script, items, list(extra), Path("x"))}


def test_each_combination_is_a_run(tmp_path):
    jobs = named("dcgan_mnist", ["latent_dim=16,100", "net=conv,mlp"], ["--quick"])
    assert list(jobs) == [f"latent_dim={i},net={net}" for i in (16, 100) for net in ("conv", "mlp")]
    assert jobs["latent_dim=16,net=mlp"] == ["--quick", "--latent-dim=16", "--net=mlp"]
    noise = named("sngan_iclevr", ["add_noise=true,false"])
    assert [*noise.values()] == [["--add-noise"], ["--no-add-noise"]]
    assert named("dcgan_mnist", ["data=a/x,b/x"]) == {"data=a_x": ["--data=a/x"], "data=b_x": ["--data=b/x"]}
    jobs = named("acgan_celeba", ["variants", "seed=0,1"])
    assert len({repr(acgan_celeba.Config(**fields)) for fields in acgan_celeba.VARIANTS.values()}) == 6
    assert len(jobs) == 12 and jobs["gp-sn-projection-maps,seed=1"] == [
        "--d-norm=spectral", "--d-cond=projection", "--seed=1"]
    assert jobs["gp-bn-concat-maps,seed=0"] == ["--seed=0"]
    jobs = sweep.combinations("sngan_iclevr", ["recipe=paper,r3gan"], ["--quick"], tmp_path)
    for job in jobs:
        job.check()
    assert [(job.cfg.recipe, job.cfg.loss, job.cfg.ch) for job in jobs] == [
        ("paper", "hinge", 16), ("r3gan", "rpgan", 16)]


@pytest.mark.parametrize("arguments, message", [
    ("dcgan_mnist variants", "give a field of dcgan_mnist.py"), ("dcgan_mnist out=a,b", "give a field"),
    ("dcgan_mnist lr_g", "as FIELD=V1,V2"), ("acgan_celeba size=1", "or the word variants"),
    ("dcgan_mnist lr_g=1 lr_g=2", "set each field once"),
    ("acgan_celeba variants loss=bce", "set each field once"),
    ("acgan_celeba variants -- --d-norm spectral", "set each field once"),
    ("sngan_iclevr add_noise=false -- --no-add-noise", "set each field once"),
    ("sngan_iclevr add_noise=maybe", "to different values it takes"),
    ("dcgan_mnist seed=1,1", "different values"), ("dcgan_mnist data=a/b,a_b", "different values"),
    ("dcgan_mnist seed=1 -- --out y", "--out after --"), ("dcgan_mnist iters=2,0", "--iters 0"),
    ("dcgan_mnist seed=1 -- --resume=y", "--resume after --"),
    ("dcgan_mnist seed=1 -- --continue", "--continue after --"),
    ("dcgan_mnist recipe=paper,other", "invalid choice: 'other'"), ("dcgan_mnist", "required"),
    ("evaluator seed=1", "not a script of this collection"), ("dcgan_mnist seed=1 --jobs 0", "at least 1"),
])
def test_refused_sweeps_make_nothing(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        call(monkeypatch, *arguments.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_sweep_makes_its_runs_once_and_ends_in_a_table(here, monkeypatch, capsys):
    tiny = flags(TINY["dcgan_mnist"] | dict(iters=4, sample_every=0))

    def runs(seeds: str, *more: str) -> list[str]:  # that were made
        argv = f"dcgan_mnist.py seed={seeds} --out x --jobs 2 --".split()
        assert call(monkeypatch, *argv, *tiny, *more) == 0
        return sorted(line[:-6] for line in capsys.readouterr().out.splitlines() if line.endswith(": done"))

    assert runs("0,1") == ["seed=0", "seed=1"]
    table = (here / "x" / "sweep.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == 'run,FD (judge),TV,"s / 1,000 its"'
    assert [line.split(",")[0] for line in table[1:]] == ["seed=0", "seed=1", "all: 2 seeds"]
    assert runs("0,1") == []  # both are finished
    job, = sweep.combinations("dcgan_mnist", ["seed=1"], tiny, here / "x")
    job.check()
    assert job.finished()
    scores = job.folder / "scores.json"
    scores.write_text(scores.read_text().replace('"step": 4', '"step": 2'))  # of --eval on a stopped run
    assert not job.finished()
    assert runs("1", "--iters", "6") == ["seed=1"]  # longer
    assert json.loads((here / "x" / "seed=1" / "config.json").read_text())["config"]["iters"] == 6
    for other, message in ((["--lr-g", "0.5"], "--lr-g is 0.0002 there, 0.5 here"), ([], "with --iters 6"),
                           (["--iters", "6", "--judge", "none"], "--judge is 'auto' there, 'none' here")):
        with pytest.raises(UserError, match=message):
            runs("1", *other)


def test_a_stop_ends_the_runs_which_save(here, monkeypatch, capfd):
    def stop() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and len([*here.glob("x/*/metrics.csv")]) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    tiny = flags(TINY["dcgan_mnist"] | dict(iters=10**6, sample_every=0, eval_every=0))
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match="the same command continues"):
        call(monkeypatch, *"dcgan_mnist.py seed=0,1 --out x --jobs 2 --".split(), *tiny)
    thread.join()
    assert len([*here.glob("x/*/last.pt")]) == 2 and not (here / "x" / "sweep.csv").exists()
    assert "done" not in capfd.readouterr().out


def test_a_run_that_diverges_is_listed_and_the_others_continue(here, monkeypatch, capsys):
    tiny = flags(TINY["sngan_iclevr"] | dict(iters=4, sample_every=0, judge="none"))
    assert call(monkeypatch, *"sngan_iclevr.py lr_g=1e30,1e-4 --out x --jobs 2 --".split(), *tiny) == 3
    output = capsys.readouterr().out
    assert "lr_g=1e30: diverged\n" in output and "lr_g=1e-4: done" in output
    assert "diverged: " in (here / "x" / "sweep.csv").read_text(encoding="utf-8")
    assert (here / "x" / "lr_g=1e30" / sweep.DIVERGED).read_text().startswith("error: ")


@pytest.mark.parametrize("ending, status", [("sys.exit(4)", 4), ("os.kill(os.getpid(), 9)", 137)])
def test_a_run_that_fails_ends_the_sweep_with_its_status(here, monkeypatch, capsys, ending, status):
    started = []
    monkeypatch.setattr(sweep.Job, "command", lambda job: started.append(job) or [
        sys.executable, "-c", f"import os, sys; print('what went wrong', flush=True); {ending}"])
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, "sngan_iclevr.py", "seed=0,1", "--out", "x")
    assert left.value.code == status and len(started) == 1
    assert f"x/seed=0 ended with status {status}:\nwhat went wrong" in capsys.readouterr().err


def test_the_table_has_means_over_seeds_and_speed_without_what_is_rare(tmp_path):
    def job(name: str, value: float) -> sweep.Job:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,seconds,d_loss\n2,1.0,0\n4,2.0,0\n")
        (tmp_path / name / "scores.json").write_text(json.dumps({"summary": {"accuracy": [value, 9.0]}}))
        return sweep.Job("dcgan_mnist", tmp_path / name, [])
    rows = sweep.table([job(f"lr={lr},seed={i}", lr * v) for lr in (1, 10) for i, v in enumerate((1, 2, 6))])
    assert len(rows) == 1 + 6 + 2 and rows[1] == ["lr=1,seed=0", "1 ± 9", "500"]
    assert [row[:2] for row in rows[-2:]] == [["lr=1: 3 seeds", "3 ± 2.6"], ["lr=10: 3 seeds", "30 ± 26"]]
    for text, pace in (
            ("step,seconds,d_loss\n10,2,0\n20,4,0\n30,11,0\n40,13,0\n50,15,0\n", 0.2),  # a grid at 30
            ("step,seconds,d_loss,fd_judge\n10,2,1,\n20,9,1,5\n30,11,1,\n40,18,1,5\n50,20,1,\n", 0.2),
            ("step,seconds,d_loss,fd_judge\n10,2,1,1\n20,9,1,5\n", 0.7),  # only rows with scores
            ("step,seconds\n", math.nan)):
        (tmp_path / "metrics.csv").write_text(text)
        assert sweep.seconds_per_iteration(tmp_path / "metrics.csv") == pytest.approx(pace, nan_ok=True)


def test_runs_of_a_single_row_have_means_over_seeds_but_no_pace(tmp_path):
    jobs = [sweep.Job("dcgan_mnist", tmp_path / f"seed={seed}", []) for seed in (0, 1)]
    for seed, job in enumerate(jobs):
        job.folder.mkdir()
        (job.folder / "metrics.csv").write_text("step,seconds,d_loss\n5,1.0,0.5\n")
        (job.folder / "scores.json").write_text(json.dumps({"summary": {"TV": [seed, 0.1]}}))
    header, *_, last = sweep.table(jobs)
    assert header == ["run", "TV"] and last == ["all: 2 seeds", "0.5 ± 0.71"]
