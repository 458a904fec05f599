"""The table of ablations: its runs are ones that the scripts take, and its figures add up."""
import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from statistics import mean, pvariance, stdev

import pytest
import torch
from PIL import Image
from scipy.stats import t

from benchmarks import ablations
from common.errors import Stopped, UserError
from tests.conftest import make_iclevr, same


def test_each_row_changes_one_thing(tmp_path):
    args = Namespace(out=tmp_path, data="synthetic", device="cpu", more=[])
    configs = {}
    for row, what in ablations.ROWS.items():
        if what.flags is not None:
            job = ablations.job_of(args, row, 0, 1000)
            job.check()
            configs[row] = job.script, vars(job.cfg) | {"out": ""}
    assert len(configs) == len(ablations.ROWS) - 1
    for row, (script, fields) in configs.items():
        other, base = configs.get(ablations.ROWS[row].beside, (None, None))
        if other == script:
            changed = {k for k in fields if fields[k] != base[k]}
            one = len(changed) == 1 or changed == {"gamma", "d_norm"}
            assert one or row.endswith("as written up") and len(changed) > 5, (row, changed)


@pytest.fixture
def kept(tmp_path):
    """Finished runs, as {row: [(accuracy on test, on new_test) of each seed]}; None: one that diverged."""
    def write(figures: dict) -> dict:
        for row, seeds in figures.items():
            for seed, accuracies in enumerate(seeds):
                folder = tmp_path / ablations.name(row, seed)
                folder.mkdir(exist_ok=True)
                if accuracies is None:
                    (folder / ablations.DIVERGED).touch()
                    continue
                last = {f"accuracy {t}": [accuracies[i], 0.01] for i, t in enumerate(("test", "new_test"))}
                file = folder / ("scores_without_ema.json" if row == ablations.NO_EMA else "scores.json")
                file.write_text(json.dumps(last if row == ablations.NO_EMA else {"last": last}))
                rows = f"step,seconds,d_loss\n5,9,0.2\n10,{60 * (seed + 1)},0.1\n"
                (folder / "metrics.csv").write_text(rows)
        return ablations.table(Namespace(out=tmp_path, seeds=3, device="cpu"))
    return write


def test_the_table_is_means_over_seeds_and_compares_like_with_like(kept):
    found = kept({ablations.SNGAN: [(0.30, 0.40), (0.31, 0.39), (0.28, 0.44)],
                  "4 D steps": [(0.20, 0.31), (0.21, 0.30), (0.19, 0.31)],
                  "flipped labels": [(0.25, 0.50), (0.40, 0.39)],  # a seed is still missing
                  ablations.NO_EMA: [(0.29, 0.38), (0.30, 0.37), (0.27, 0.41)],
                  ablations.DCGAN: [(0.1, 0.1)]})
    assert list(found) == [ablations.SNGAN, "flipped labels", "4 D steps", "no EMA", ablations.DCGAN]
    assert found[ablations.SNGAN]["test"] == pytest.approx([0.29667, 0.015275], rel=1e-3)
    assert found[ablations.SNGAN]["new_test"][0] == pytest.approx(0.41)
    # the spread is that of all rows: of nine runs less four means
    ours, theirs, flipped = [0.255, 0.255, 0.25], [0.35, 0.35, 0.36], [0.375, 0.395]
    squares = sum(len(v) * pvariance(v) for v in (theirs, ours, flipped))
    error = (squares / (9 - 4) * (1 / 3 + 1 / 3)) ** 0.5
    assert found["4 D steps"]["difference"] == pytest.approx(mean(ours) - mean(theirs))
    low, high = found["4 D steps"]["interval"]
    assert (low + high) / 2 == pytest.approx(mean(ours) - mean(theirs), abs=1e-6)
    # wider than for one row alone, narrower than three rows apart need (Bonferroni)
    assert t(5).ppf(1 - 0.025) < (high - low) / 2 / error < t(5).ppf(1 - 0.025 / 3)
    assert ablations.verdict(found["4 D steps"]) == f"worse: -0.100 ({low:+.3f} to {high:+.3f})"
    assert ablations.verdict(found["flipped labels"]).startswith("better: +0.032 (+0.0")
    # within each run the same 0.015 and 0.020 are lost
    within = [-0.015, -0.015, -0.02]
    half = t(2).ppf(0.975) * stdev(within) / 3**0.5
    assert found["no EMA"]["interval"] == pytest.approx([mean(within) - half, mean(within) + half])
    assert ablations.verdict(found["no EMA"]).startswith("worse: -0.017 (-0.0")
    lines = ablations.markdown(found).splitlines()
    assert lines[2] == (f"| {ablations.SNGAN} | 0.297 ± 0.015 | 0.410 ± 0.026 | 3, 10, 2.0 |  |  | "
                        f"{ablations.ROWS[ablations.SNGAN].written} |")
    assert lines[4].endswith(f"| {ablations.SNGAN} | worse: -0.100 ({low:+.3f} to {high:+.3f}) | 4 used |")


def test_single_seeds_have_no_spread_and_a_row_that_diverged_no_mean(kept):
    found = kept({ablations.SNGAN: [(0.3, 0.4)], "4 D steps": [(0.4, 0.5), None], "hinge loss": [None],
                  ablations.NO_EMA: [(0.2, 0.3)], ablations.DCGAN: [(0.1, 0.1)]})
    lines = ablations.markdown(found).splitlines()[2:]
    assert lines[0].startswith(f"| {ablations.SNGAN} | 0.300 | 0.400 | 1, 10, 1.0 |")
    assert lines[1] == "| 4 D steps | 0.400 | 0.500 | 1, 10, 1.0 |  | diverged in 1 of 2 runs | 4 used |"
    assert lines[3] == "| hinge loss | – | – | 0 |  | diverged in 1 of 1 runs | hinge used |"
    assert ablations.verdict(found[ablations.NO_EMA]) == "-0.100, of single seeds"
    assert ablations.verdict(found[ablations.DCGAN]) == "-0.250, of single seeds"


@pytest.fixture
def call(tmp_path, monkeypatch):
    """main() with three rows, tiny and of one seed: SNGAN, without EMA, and DCGAN."""
    rows = [ablations.SNGAN, ablations.NO_EMA, ablations.DCGAN]
    monkeypatch.setattr(ablations, "ROWS", {row: ablations.ROWS[row] for row in rows})
    make_iclevr(tmp_path / "scenes", 12)

    def call(minutes: float, more: str = "") -> int:
        always = f"ablations.py --seeds 1 --data scenes --device cpu --out runs --minutes {minutes}"
        tiny = "--image-size 32 --ch 2 --batch-size 4 --z-dim 8 --eval-draws 2 --judge-width 8"
        after = f"-- {tiny} --judge-steps 2 {more}"
        monkeypatch.setattr(sys, "argv", [*always.split(), *after.split()])
        return ablations.main()
    return call


def test_runs_are_made_once_scored_and_pictured(call, tmp_path, monkeypatch, capsys):
    used, original = [], ablations.load
    monkeypatch.setattr(ablations, "load", lambda *a: used.append(a) or original(*a))
    assert call(0.01) == 0
    output = capsys.readouterr().out
    sngan, dcgan = (Path("runs") / f"{name}-the_preset-0" for name in ("SNGAN", "DCGAN"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/last.pt")}
    assert len(made) == 4 and "DCGAN-the_preset-0: done" in output  # with those that measure the pace
    kept = json.loads((tmp_path / "runs" / "ablations.json").read_text())
    assert list(kept["rows"]) == list(ablations.ROWS) and ablations.markdown(kept["rows"]) in output
    assert kept["commit"] and kept["what"].startswith("i-CLEVR; judge: ResNet-18 of width 8")
    pace = ablations.seconds_per_iteration(Path("runs/pace-SNGAN-the_preset-0/metrics.csv"))
    assert kept["rows"][ablations.SNGAN]["iterations"] == max(10, round(0.6 / pace))
    # scored without EMA, then pictured with, without, and with
    assert used == [(sngan, "G"), (sngan, "ema"), (sngan, "G"), (dcgan, "ema")]
    state = torch.load(sngan / "last.pt", weights_only=True)
    for key in ("ema", "G"):
        same(original(sngan, key)[0].state_dict(), state[key])
    assert not torch.equal(state["ema"]["last.weight"], state["G"]["last.weight"])
    pictures = [Image.open(tmp_path / "runs" / f"{row}.png") for row in ablations.ROWS]
    with Image.open(tmp_path / "runs" / "ablations.png") as picture:
        assert picture.size == (pictures[0].width, sum(one.height for one in pictures))
    images = [one.crop((0, one.height - 80, one.width, one.height)).tobytes() for one in pictures]
    assert len(set(images)) == 3  # below the headings
    assert call(0.01) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    # a folder of another run is refused before anything is made
    with pytest.raises(UserError, match="runs/pace-SNGAN-the_preset-0 was made with other settings: --lr-g"):
        call(0.01, more="--lr-g 0.5")


def test_a_stop_ends_the_runs_and_nothing_is_kept(call, tmp_path, capfd):
    folders = [tmp_path / "runs" / f"{name}-the_preset-0" for name in ("SNGAN", "DCGAN")]

    def stop() -> None:
        until = time.monotonic() + 120
        tables = [folder / "metrics.csv" for folder in folders]

        def begun(table: Path) -> bool:
            return table.exists() and table.read_text().count("\n") > 1
        while time.monotonic() < until and not all(map(begun, tables)):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Stopped, match="the same command continues"):
        call(100)
    thread.join()
    assert all((folder / "last.pt").exists() for folder in folders)  # they saved before they ended
    assert not (tmp_path / "runs" / "ablations.json").exists() and "done" not in capfd.readouterr().out
