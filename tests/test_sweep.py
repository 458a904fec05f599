"""Sweeps: which runs they make, that each is made once, and the table of their scores."""
import json
import math
import sys
from pathlib import Path

import pytest

import acgan_celeba
from benchmarks import sweep
from common.errors import UserError
from tests.conftest import TINY, flags


def call(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *argv])
    return sweep.main()


def named(script, items, extra=()):
    jobs = sweep.combinations(script, items, list(extra), Path("x"))
    return {job.folder.name: job.flags for job in jobs}


def test_each_combination_is_a_run():
    jobs = named("dcgan_mnist", ["latent_dim=16,100", "net=conv,mlp"], ["--quick"])
    assert list(jobs) == ["latent_dim=16,net=conv", "latent_dim=16,net=mlp", "latent_dim=100,net=conv",
                          "latent_dim=100,net=mlp"]
    assert jobs["latent_dim=16,net=mlp"] == ["--quick", "--latent-dim=16", "--net=mlp"]
    jobs = named("sngan_iclevr", ["add_noise=true,false"])
    assert list(jobs.values()) == [["--add-noise"], ["--no-add-noise"]]
    assert named("dcgan_mnist", ["data=a/x,b/x"]) == {"data=a_x": ["--data=a/x"], "data=b_x": ["--data=b/x"]}


def test_variants_are_the_script_s_own():
    jobs = named("acgan_celeba", ["variants", "seed=0,1"])
    assert len({repr(acgan_celeba.Config(**fields)) for fields in acgan_celeba.VARIANTS.values()}) == 6
    assert len(jobs) == 12 and jobs["gp-sn-projection-maps,seed=1"] == [
        "--d-norm=spectral", "--d-cond=projection", "--seed=1"]
    assert jobs["gp-bn-concat-maps,seed=0"] == ["--seed=0"]


@pytest.mark.parametrize("arguments, message", [
    ("dcgan_mnist variants", "give a field of dcgan_mnist.py"),
    ("dcgan_mnist out=a,b", "give a field"), ("dcgan_mnist lr_g", "as FIELD=V1,V2"),
    ("acgan_celeba size=1", "or the word variants"),
    ("dcgan_mnist lr_g=1 lr_g=2", "set each field once"),
    ("acgan_celeba variants loss=bce", "set each field once"),
    ("acgan_celeba variants -- --d-norm spectral", "set each field once"),
    ("sngan_iclevr add_noise=false -- --no-add-noise", "set each field once"),
    ("sngan_iclevr add_noise=maybe", "to different values it takes"),
    ("dcgan_mnist seed=1,1", "different values"), ("dcgan_mnist data=a/b,a_b", "different values"),
    ("dcgan_mnist seed=1 -- --out y", "--out after --"),
    ("dcgan_mnist seed=1 -- --resume=y", "--resume after --"),
    ("dcgan_mnist lr_g=1,x", "invalid float value"), ("dcgan_mnist iters=2,0", "--iters 0"),
    ("evaluator seed=1", "not a script of this collection"), ("dcgan_mnist", "required"),
    ("dcgan_mnist seed=1 --jobs 0", "--jobs must be at least 1"),
])
def test_refused_sweeps_make_nothing(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        call(monkeypatch, *arguments.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_sweep_makes_its_runs_once_and_ends_in_a_table(here, monkeypatch, capsys):
    tiny = flags(TINY["dcgan_mnist"] | dict(iters=4, sample_every=0))
    assert call(monkeypatch, "dcgan_mnist.py", "seed=0,1", "--out", "x", "--jobs", "2", "--", *tiny) == 0
    output = capsys.readouterr().out
    assert "seed=0: done" in output and "seed=1: done" in output
    table = (here / "x" / "sweep.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == 'run,FD (judge),TV,"s / 1,000 its"' and len(table) == 4
    assert [line.split(",")[0] for line in table[1:]] == ["seed=0", "seed=1", "all: 2 seeds"]
    made = {path: path.stat().st_mtime_ns for path in (here / "x").glob("*/last.pt")}
    call(monkeypatch, "dcgan_mnist.py", "seed=0,1", "--out", "x", "--", *tiny)
    assert "done" not in capsys.readouterr().out  # both were finished
    assert made == {path: path.stat().st_mtime_ns for path in made}
    (here / "x" / "seed=1" / "scores.json").unlink()  # this one was not
    call(monkeypatch, "dcgan_mnist.py", "seed=0,1", "--out", "x", "--", *tiny)
    assert capsys.readouterr().out.count("done") == 1
    path = here / "x" / "seed=1" / "scores.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 2'))  # --eval on a run that was stopped
    call(monkeypatch, "dcgan_mnist.py", "seed=0,1", "--out", "x", "--", *tiny)
    assert capsys.readouterr().out.count("done") == 1
    call(monkeypatch, "dcgan_mnist.py", "seed=0", "--out", "x", "--", *tiny, "--iters", "6")  # longer
    assert json.loads((here / "x" / "seed=0" / "config.json").read_text())["config"]["iters"] == 6
    for other, message in ((["--lr-g", "0.5"], "--lr-g is 0.0002 there, 0.5 here"), ([], "with --iters 6"),
                           (["--iters", "6", "--judge", "none"], "--judge is 'auto' there, 'none' here")):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, "dcgan_mnist.py", "seed=0", "--out", "x", "--", *tiny, *other)


def test_a_run_that_diverges_is_listed_and_the_others_continue(here, monkeypatch, capsys):
    tiny = flags(TINY["sngan_iclevr"] | dict(iters=4, sample_every=0, judge="none"))
    assert call(monkeypatch, "sngan_iclevr.py", "lr_g=1e30,1e-4", "--out", "x", "--", *tiny) == 3
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


def job_with(folder, summary, seconds=((2, 1.0), (4, 2.0))):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,seconds,d_loss\n" + "".join(f"{i},{s},0\n" for i, s in seconds))
    (folder / "scores.json").write_text(json.dumps({"summary": summary}))
    return sweep.Job("dcgan_mnist", folder, [])


def test_means_over_seeds(tmp_path):
    values = {"lr=1": (1, 2, 6), "lr=10": (10, 20, 60)}
    jobs = [job_with(tmp_path / f"{key},seed={i}", {"accuracy": [v, 9.0]})
            for key, vs in values.items() for i, v in enumerate(vs)]
    lines = sweep.table(jobs)
    assert len(lines) == 1 + 6 + 2
    assert [line[:2] for line in lines[-2:]] == [["lr=1: 3 seeds", "3 ± 2.6"], ["lr=10: 3 seeds", "30 ± 26"]]
    assert lines[1] == ["lr=1,seed=0", "1 ± 9", "500"]


def test_seconds_per_iteration_leave_out_what_is_rare(tmp_path):
    job = job_with(tmp_path / "r", {}, ((10, 2), (20, 4), (30, 11), (40, 13), (50, 15)))
    path = job.folder / "metrics.csv"
    assert sweep.seconds_per_iteration(path) == pytest.approx(0.2)
    path.write_text("step,seconds,d_loss,fd_judge\n10,2,1,\n20,9,1,5\n30,11,1,\n40,18,1,5\n50,20,1,\n")
    assert sweep.seconds_per_iteration(path) == pytest.approx(0.2)  # scoring took as long, every other row
    path.write_text("step,seconds,d_loss,fd_judge\n10,2,1,1\n20,9,1,5\n")
    assert sweep.seconds_per_iteration(path) == pytest.approx(0.7)  # only rows with scores
    path.write_text("step,seconds\n")
    assert math.isnan(sweep.seconds_per_iteration(path))
