"""The table of ablations: its runs are ones that the scripts take, and its figures add up."""
import importlib
import importlib.util
import json
import signal
import sys
from argparse import Namespace
from statistics import mean, pvariance

import pytest
import torch
from PIL import Image
from scipy.stats import t

from common import run
from tests.conftest import ROOT, make_iclevr, same


@pytest.fixture
def ablations():
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "benchmarks" / "ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", ["narrow", "full"])
def test_each_row_changes_one_thing(ablations, size):
    configs = {}
    for row, what in ablations.ROWS.items():
        if what.flags[size] is not None:
            script = importlib.import_module(what.script)
            argv = f"{ablations.SIZES[size][what.script]} {what.flags[size]} {ablations.JUDGE[size]}".split()
            configs[row] = script, vars(run.parse(script.Config, script.QUICK, "", argv)[1])
    assert len(configs) == 12
    budget = {"iters", "lr_decay_from"}  # the latter, where it is the one thing
    for row, (script, fields) in configs.items():
        other, base = configs.get(ablations.ROWS[row].beside, (None, None))
        if other is script:
            changed = {k for k in fields if fields[k] != base[k]}
            assert len(changed - {"iters"}) == 1, (row, changed)
            assert ("iters" in changed) == row.endswith(("D step", "D steps")), (row, changed & budget)


def test_the_table_is_means_over_seeds_and_compares_like_with_like(ablations, tmp_path):
    figures = {ablations.SNGAN: [(0.30, 0.40), (0.31, 0.39), (0.28, 0.44)],
               "relativistic": [(0.20, 0.31), (0.21, 0.30), (0.19, 0.31)],
               "flipped labels": [(0.25, 0.50), (0.40, 0.39)],  # a seed is still missing
               ablations.DCGAN: [(0.1, 0.1)]}
    for row, seeds in figures.items():
        for seed, (test, new_test) in enumerate(seeds):
            folder = tmp_path / ablations.name(row, seed)
            folder.mkdir()
            last = {"test": {"accuracy": [test, 0.01]}, "new_test": {"accuracy": [new_test, 0.01]}}
            (folder / "scores.json").write_text(json.dumps({"last": last}))
            (folder / "metrics.csv").write_text(f"step,seconds,d_loss\n50,9,0.2\n100,{60 * (seed + 1)},0.1\n")
            (folder / "scores_without_ema.json").write_text(json.dumps(last))
    found = ablations.table(Namespace(out=tmp_path, seeds=3, device="cpu"), "narrow")
    assert list(found) == [ablations.SNGAN, "flipped labels", "relativistic", "no EMA", ablations.DCGAN]
    assert found[ablations.SNGAN]["test"] == pytest.approx([0.29667, 0.015275], rel=1e-3)
    assert found[ablations.SNGAN]["new_test"][0] == pytest.approx(0.41)
    # the spread is that of all rows: of 12 runs less five means, "no EMA" being the first row again
    ours, theirs, flipped = [0.255, 0.255, 0.25], [0.35, 0.35, 0.36], [0.375, 0.395]
    squares = sum(len(v) * pvariance(v) for v in (theirs, theirs, ours, flipped))
    error = (squares / (12 - 5) * (1 / 3 + 1 / 3)) ** 0.5
    assert found["relativistic"]["difference"] == pytest.approx(mean(ours) - mean(theirs))
    low, high = found["relativistic"]["interval"]
    assert (low + high) / 2 == pytest.approx(mean(ours) - mean(theirs), abs=1e-6)
    # wider than for one row alone, narrower than four rows apart need (Bonferroni)
    assert t(7).ppf(1 - 0.025) < (high - low) / 2 / error < t(7).ppf(1 - 0.025 / 4)
    assert found["relativistic"]["p"] < 0.001 < 0.9 < found["no EMA"]["p"]
    assert ablations.verdict(found["relativistic"]) == f"worse: -0.100 ({low:+.3f} to {high:+.3f})"
    assert ablations.verdict(found["flipped labels"]).startswith("better: +0.032 (+0.0")
    assert ablations.verdict(found["no EMA"]).startswith("no clear difference: +0.000 (-0.0")
    lines = ablations.markdown(found).splitlines()
    assert lines[2] == (f"| {ablations.SNGAN} | 0.297 ± 0.015 | 0.410 ± 0.026 | 3, 2.0 |  |  | "
                        f"{ablations.ROWS[ablations.SNGAN].written} |")
    assert lines[4].endswith(f"| SNGAN, projection | worse: -0.100 ({low:+.3f} to {high:+.3f}) | worse |")
    single = {ablations.SNGAN: found[ablations.SNGAN], "decay": found[ablations.DCGAN]}
    single = json.loads(json.dumps(single))
    single[ablations.SNGAN]["seeds"] = {"0": {"test": 0.3, "new_test": 0.4}}
    for row in single.values():
        row.pop("interval", None)
    ablations.compare(single)
    assert ablations.verdict(single["decay"]) == "-0.250, of single seeds"


def test_runs_are_made_once_scored_and_drawn(ablations, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    rows = [ablations.SNGAN, ablations.NO_EMA, ablations.DCGAN]
    monkeypatch.setattr(ablations, "ROWS", {row: ablations.ROWS[row] for row in rows})
    tiny = "--iters 2 --image-size 32 --ch 2 --batch-size 4 --z-dim 8 --eval-draws 2"
    sizes = {"sngan_iclevr": f"{tiny} --n-dis 1", "cdcgan_iclevr": tiny}
    monkeypatch.setitem(ablations.SIZES, "narrow", sizes)
    monkeypatch.setitem(ablations.JUDGE, "narrow", "--judge-width 8 --judge-steps 2")
    make_iclevr(tmp_path / "scenes", 12)
    argv = "ablations.py --seeds 1 --data scenes --device cpu --out runs --keep kept/all"
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(sys, "argv", argv.split())
    try:
        assert ablations.main() == 0
        told = capsys.readouterr().out
        made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/last.pt")}
        assert len(made) == 2 and "DCGAN-concat-0: done" in told
        kept = json.loads((tmp_path / "kept" / "all.json").read_text())
        assert list(kept["rows"]) == rows and ablations.markdown(kept["rows"]) in told
        assert kept["commit"] and kept["what"].startswith("i-CLEVR, narrow; judge: ResNet-18 of width 8")
        folder = tmp_path / "runs" / "SNGAN-projection-0"
        state = run.load_checkpoint(folder / "last.pt", "cpu")
        for key in ("ema", "G"):
            same(ablations.averaged_or_not(folder, key)[0].state_dict(), state[key])
        assert not torch.equal(state["ema"]["last.weight"], state["G"]["last.weight"])
        pictures = [Image.open(tmp_path / "runs" / f"{row}.png") for row in rows]
        with Image.open(tmp_path / "kept" / "all.png") as picture:
            assert picture.size == (pictures[0].width, sum(one.height for one in pictures))
        assert pictures[0].tobytes() != pictures[1].tobytes() != pictures[2].tobytes()
        assert ablations.main() == 0
        assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    finally:
        signal.signal(signal.SIGTERM, before)
