"""The script as a user runs it: a whole run, a killed one, a stopped one, and what it refuses."""
import csv
import json
import shutil
import signal
import subprocess

import pytest
import torch
from PIL import Image

import sngan_iclevr
from common.datasets import load_iclevr
from tests.conftest import TINY, CountReads, command, environment, main, same, same_runs, script, wait_for

SCRIPT = sngan_iclevr  # what `refuses` runs


def test_a_run_leaves_everything(tiny_run):
    for name in (
        "config.json",
        "metrics.csv",
        "last.pt",
        "best.pt",
        "progress.gif",
        "scores.json",
        "test.png",
        "new_test.png",
        "real_beside_generated.png",
        "objects.png",
        "interpolation.png",
    ):
        assert (tiny_run / name).stat().st_size > 0, name
    rows = list(csv.DictReader(open(tiny_run / "metrics.csv")))
    assert [r["step"] for r in rows if r["d_loss"]] == ["2", "4", "6", "8", "9"]
    assert [r["step"] for r in rows if r["accuracy_test"]] == ["4", "8", "9"]
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == [
        f"step_000000{i}.png" for i in (3, 6, 9)
    ]
    scores = json.loads((tiny_run / "scores.json").read_text())
    assert scores["data"] == "drawn scenes" and "held-out accuracy" in scores["judge"]
    for which in ("best", "last"):
        for test in ("test", "new_test"):
            mean, std = scores[which][test]["accuracy"]
            assert 0 <= mean <= 1 and std >= 0
    assert scores["last"]["step"] == 9
    with Image.open(tiny_run / "test.png") as grid:
        assert grid.width == 8 * 66 + 2 and grid.height >= 4 * 66 + 2  # 32 sets, 8 a row
    assert json.loads((tiny_run / "config.json").read_text())["config"]["data"] == "drawn"


def test_null_rows_stay_exactly_zero_through_training(tiny_run):
    state = torch.load(tiny_run / "last.pt", weights_only=True)
    tables = {
        k: v for k, v in state["G"].items() if k.endswith((".gain.weight", ".bias.weight")) and len(v) == 25
    }
    assert len(tables) == 2 * 2 * 3  # two tables in two norms of three blocks
    tables["D"] = state["D"]["embed.parametrizations.weight.original"]
    for name, table in tables.items():
        assert not table[24].any() and table[:24].any(), name


def test_sample_and_eval_read_a_run(tiny_run, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    (tiny_run / "objects.png").unlink()
    main(sngan_iclevr, "--sample", "runs/tiny")
    assert (tiny_run / "objects.png").exists()
    before = json.loads((tiny_run / "scores.json").read_text())
    (tiny_run / "scores.json").unlink()
    capsys.readouterr()
    main(sngan_iclevr, "--eval", "runs/tiny")
    after, told = json.loads((tiny_run / "scores.json").read_text()), capsys.readouterr().out
    assert after["best"]["test"] == {k: pytest.approx(v, abs=0.02) for k, v in before["best"]["test"].items()}
    assert "best.pt (step" in told and "held-out accuracy" in told and "±" in told


LONG = [*TINY, "--iters", "22", "--sample-every", "7", "--eval-every", "8", "--save-every", "5"]


@pytest.fixture(scope="module")
def uninterrupted(workdir, tiny_run):
    done = script("sngan_iclevr.py", *LONG, "--out", "runs/whole", cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir / "runs" / "whole"


@pytest.mark.parametrize("how, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_cut_off_and_resumed_ends_with_the_same_bits(workdir, uninterrupted, how, status):
    folder = workdir / "runs" / how.name
    process = subprocess.Popen(
        command("sngan_iclevr.py", *LONG, "--out", str(folder)),
        cwd=workdir,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    table = folder / "metrics.csv"
    wait_for(lambda: table.exists() and len(table.read_text().splitlines()) > 5, process)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == status
    cut = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert 5 <= cut < 22
    done = script("sngan_iclevr.py", "--resume", str(folder), cwd=workdir)
    assert done.returncode == 0, done.stderr
    same_runs(folder, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_over(workdir, uninterrupted):
    folder = workdir / "runs" / "early"
    shutil.copytree(uninterrupted, folder)
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink()
    assert script("sngan_iclevr.py", "--resume", str(folder), cwd=workdir).returncode == 0
    same_runs(folder, uninterrupted)


def test_a_diverging_run_stops_with_3_and_keeps_the_last_good_state(workdir, tiny_run):
    args = [
        *TINY,
        "--iters",
        "40",
        "--save-every",
        "1",
        "--lr-g",
        "1e30",
        "--judge",
        "none",
        "--out",
        "runs/diverged",
    ]
    done = script("sngan_iclevr.py", *args, cwd=workdir)
    assert done.returncode == 3 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    checkpoint = workdir / "runs" / "diverged" / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        assert all(v.isfinite().all() for v in state["G"].values())


def test_every_trick_trains(workdir, tiny_run, monkeypatch):
    monkeypatch.chdir(workdir)
    tricks = [
        "--no-add-noise",
        "--flip-labels",
        "0.1",
        "--relativistic",
        "--lr-decay-from",
        "2",
        "--label-embed",
        "sum",
        "--precision",
        "bf16",
        "--ema",
        "0",
        "--deterministic",
    ]
    main(sngan_iclevr, *TINY, *tricks, "--iters", "4", "--out", "runs/tricks")
    state = torch.load(workdir / "runs" / "tricks" / "last.pt", weights_only=True)
    same(state["ema"], state["G"])  # no average
    assert "join.weight" not in state["D"]
    for opt, rate in (("opt_g", 3e-4), ("opt_d", 1e-4)):  # the last of two decaying steps
        assert state[opt]["param_groups"][0]["lr"].item() == pytest.approx(rate / 2)


def test_a_folder_of_the_real_layout_trains_to_the_end(tmp_path, iclevr, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = sngan_iclevr.Config(iters=2, data=str(iclevr), image_size=32, ch=2, batch_size=4, z_dim=8,
                              judge="none", out="runs/real", device="cpu", save_every=0)
    assert sngan_iclevr.train(cfg) == 0
    assert torch.load(tmp_path / "runs" / "real" / "last.pt", weights_only=True)["step"] == 2
    with Image.open(tmp_path / "runs" / "real" / "interpolation.png") as grid:
        assert grid.height < 3 * 66 + 20  # two sets, two rows
    assert not (tmp_path / "runs" / "real" / "best.pt").exists()


@pytest.mark.parametrize("trick", [{}, {"flip_labels": 0.1, "relativistic": True}])
def test_an_iteration_reads_nothing_back(tmp_path, monkeypatch, trick):
    monkeypatch.chdir(tmp_path)
    load_iclevr("drawn", 32, 24)  # draws and caches them
    counts = []
    for iters in (2, 5):
        cfg = sngan_iclevr.Config(
            iters=iters,
            data="drawn",
            n_scenes=24,
            image_size=32,
            ch=2,
            batch_size=8,
            z_dim=8,
            judge="none",
            out=f"runs/{iters}",
            log_every=100,
            device="cpu",
            **trick,
        )
        with CountReads() as mode:
            assert sngan_iclevr.train(cfg) == 0
        counts.append(mode.reads)
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------------------- bad input

def test_bad_values(refuses, tmp_path):
    refuses("--batch-size", "0", message="--batch-size 0: must be at least 1")
    refuses("--data", "nowhere", message="no such folder")
    (tmp_path / "empty").mkdir()
    refuses("--data", "empty", message="objects.json is not there")
    refuses("--resume", "empty", message="is no run")
    refuses("--image-size", "48", message="invalid choice")
    refuses("--device", "cuda:99", "--data", "nowhere", message="cuda:99 can't be used here")


def test_bad_judges_and_folders_leave_nothing(refuses, iclevr, tmp_path):
    import torchvision
    net = torchvision.models.resnet18(num_classes=23)
    net.fc = torch.nn.Sequential(torch.nn.Linear(512, 23), torch.nn.Sigmoid())
    torch.save({"model": net.state_dict()}, tmp_path / "judge.pth")
    base = ["--data", str(iclevr), "--batch-size", "4", "--image-size", "32", "--ch", "2"]
    refuses(*base, "--judge", "judge.pth", message="tells 23 classes apart, the data has 24")
    refuses(*base, "--batch-size", "19", message="more than the 18 training images")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    refuses(*base, "--out", "taken", message="exists already")
    refuses(*base, "--out", "taken/notes.txt/run", message="not a folder that can be written to")


def test_resume_with_another_config_or_other_images(workdir, tiny_run):
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")}
    done = script("sngan_iclevr.py", "--resume", "runs/tiny", "--lr-g", "0.1", "--ch", "4", cwd=workdir)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "lr_g is 0.0003 there and 0.1 here" in done.stderr and "ch is 2 there and 4 here" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*")} == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_short_run_on_cuda(tmp_path):
    args = [a for a in TINY if a not in ("--device", "cpu")]
    done = script(
        "sngan_iclevr.py", *args, "--iters", "4", "--device", "cuda", "--precision", "bf16", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
