"""The table of ablations: the scripts accept its runs, and its scores add up."""
import json
import sys
from argparse import Namespace
from statistics import mean, pvariance, stdev

import pytest
import torch
from PIL import Image
from scipy.stats import t

from common.files import UserError
from tests.conftest import make_iclevr
from tools import ablations
from tools.ablations import CDCGAN, NO_EMA, SNGAN


def test_each_row_changes_one_thing(tmp_path):
    args, fields = Namespace(out=tmp_path, data="synthetic", device="cpu", more=[]), {}
    for row, what in ablations.ROWS.items():
        if what.flags is not None:
            job = ablations.job_of(args, row, 0, 1000)
            job.check()
            fields[row] = vars(job.cfg) | {"out": "", "script": job.script}
    assert ablations.ROWS.keys() - fields.keys() == {NO_EMA}
    for row, values in fields.items():
        base = fields.get(ablations.ROWS[row].beside)
        if base and base["script"] == values["script"]:
            changed = {k for k in values if values[k] != base[k]}
            one = len(changed) == 1 or changed in ({"gamma", "d_norm"}, {"lr_g", "lr_d"})
            assert one or "recipe" in changed and len(changed) > 5, (row, changed)


@pytest.fixture
def kept(tmp_path):
    """The table of finished runs, given as {row: [(accuracy on test, on new_test) of each seed]}; None
    stands for a run that diverged.
    """
    def write(found: dict) -> dict:
        for row, seed, pair in [(row, *x) for row, seeds in found.items() for x in enumerate(seeds)]:
            folder = tmp_path / ablations.name(row, seed)
            folder.mkdir(exist_ok=True)
            if pair is None:
                (folder / ablations.DIVERGED).touch()
                continue
            last = {"accuracy test": [pair[0], 0.01], "accuracy new_test": [pair[1], 0.01]}
            file = folder / ("scores_without_ema.json" if row == NO_EMA else "scores.json")
            file.write_text(json.dumps(last if row == NO_EMA else {"last": last}))
            (folder / "metrics.csv").write_text(f"step,seconds,d_loss\n5,9,0.2\n10,{60 * (seed + 1)},0.1\n")
        return ablations.table(Namespace(out=tmp_path, seeds=3, device="cpu"))
    return write


def test_the_table_is_means_over_seeds_and_compares_like_with_like(kept):
    found = kept({SNGAN: [(0.30, 0.40), (0.31, 0.39), (0.28, 0.44)],
                  "4 D steps": [(0.20, 0.31), (0.21, 0.30), (0.19, 0.31)],
                  "flipped labels": [(0.25, 0.50), (0.40, 0.39)],  # a seed is still missing
                  NO_EMA: [(0.29, 0.38), (0.30, 0.37), (0.27, 0.41)],
                  CDCGAN: [(0.1, 0.1)]})
    assert list(found) == [SNGAN, "flipped labels", "4 D steps", NO_EMA, CDCGAN]
    # the spread is pooled over all rows: nine runs less four means
    four, base, flipped = [0.255, 0.255, 0.25], [0.35, 0.35, 0.36], [0.375, 0.395]
    squares = sum(len(v) * pvariance(v) for v in (base, four, flipped))
    error = (squares / (9 - 4) * (1 / 3 + 1 / 3)) ** 0.5
    low, high = found["4 D steps"]["interval"]
    assert (low + high) / 2 == pytest.approx(mean(four) - mean(base), abs=1e-6)
    # wider than for one row alone, narrower than Bonferroni's for three rows
    assert t(5).ppf(1 - 0.025) < (high - low) / 2 / error < t(5).ppf(1 - 0.025 / 3)
    within = [-0.015, -0.015, -0.02]  # what each run loses without EMA
    half = t(2).ppf(0.975) * stdev(within) / 3**0.5
    assert found[NO_EMA]["interval"] == pytest.approx([mean(within) - half, mean(within) + half])
    head, _, first, better, worse, no_ema, _ = ablations.markdown(found).splitlines()
    assert head.endswith("| beside | here | report |") and first == (
        f"| {SNGAN} | 0.297 ± 0.015 | 0.410 ± 0.026 | 3, 10, 2.0 |  |  | {ablations.ROWS[SNGAN].report} |")
    assert f"| {SNGAN} | better: +0.032 (+0.0" in better and f"| {SNGAN} | worse: -0.017 (-0.0" in no_ema
    assert worse.endswith(f"| {SNGAN} | worse: -0.100 ({low:+.3f} to {high:+.3f}) | uses 4 |")


def test_single_seeds_have_no_spread_and_a_row_that_diverged_no_mean(kept):
    found = kept({SNGAN: [(0.3, 0.4)], "4 D steps": [(0.4, 0.5), None], "hinge loss": [None],
                  NO_EMA: [(0.2, 0.3)], CDCGAN: [(0.1, 0.1)]})
    lines = ablations.markdown(found).splitlines()[2:]
    assert lines[0].startswith(f"| {SNGAN} | 0.300 | 0.400 | 1, 10, 1.0 |")
    assert lines[1] == "| 4 D steps | 0.400 | 0.500 | 1, 10, 1.0 |  | diverged in 1 of 2 runs | uses 4 |"
    assert lines[2] == "| no EMA | 0.200 | 0.300 | 1, 10, 1.0 | SNGAN | -0.100 (single seeds) | uses no EMA |"
    assert lines[3] == "| hinge loss | – | – | 0 |  | diverged in 1 of 1 runs | uses hinge |"


def test_runs_are_made_once_scored_and_pictured(tmp_path, monkeypatch, capsys):
    runs, used, load = tmp_path / "runs", [], ablations.load
    monkeypatch.setattr(ablations, "ROWS", {row: ablations.ROWS[row] for row in (SNGAN, NO_EMA, CDCGAN)})
    monkeypatch.setattr(ablations, "load", lambda args, row, seed: used.append(row) or load(args, row, seed))
    make_iclevr(tmp_path / "scenes", 12)

    def call(more: str = "") -> str:
        always = "ablations.py --seeds 1 --data scenes --device cpu --out runs --minutes 0.01 --"
        tiny = "--image-size 32 --ch 2 --batch-size 4 --z-dim 8 --eval-draws 2 --judge-width 8"
        monkeypatch.setattr(sys, "argv", f"{always} {tiny} --judge-steps 2 {more}".split())
        assert ablations.main() == 0
        return capsys.readouterr().out

    output, made = call(), {path: path.stat().st_mtime_ns for path in runs.glob("*/last.pt")}
    assert len(made) == 4 and "cDCGAN-0: done" in output  # with those that measure the pace
    kept = json.loads((runs / "ablations.json").read_text())
    assert list(kept["rows"]) == list(ablations.ROWS) and ablations.markdown(kept["rows"]) in output
    assert kept["commit"] and kept["what"].startswith("i-CLEVR; judge: VGG of width 8")
    pace = ablations.seconds_per_iteration(runs / "pace-SNGAN-0" / "metrics.csv")
    assert kept["rows"][SNGAN]["iterations"] == max(10, round(0.6 / pace))
    assert used == [NO_EMA, SNGAN, NO_EMA, CDCGAN]  # scored, then pictured
    state = torch.load(runs / "SNGAN-0" / "last.pt", weights_only=True)
    for row, expected in ((SNGAN, [True, False]), (NO_EMA, [False, True])):
        weight = load(Namespace(out=runs), row, 0)[0].first[0].weight
        assert [torch.equal(weight, state[key]["first.0.weight"]) for key in ("ema", "G")] == expected
    strips = [Image.open(runs / f"{row}.png") for row in ablations.ROWS]
    with Image.open(runs / "ablations.png") as picture:
        assert picture.size == (strips[0].width, sum(strip.height for strip in strips))
    assert len({strip.crop((0, strip.height - 80, *strip.size)).tobytes() for strip in strips}) == 3
    assert "done" not in call() and all(path.stat().st_mtime_ns == when for path, when in made.items())
    # a folder of another run is refused before anything is made
    with pytest.raises(UserError, match="runs/pace-SNGAN-0 was made with other settings: --lr-g"):
        call("--lr-g 0.5")
