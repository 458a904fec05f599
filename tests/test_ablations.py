"""The table of ablations: its runs are ones that the scripts take, and its figures add up."""
import importlib
import importlib.util
import json
from argparse import Namespace

import pytest
from scipy.stats import ttest_rel

from common import run
from tests.conftest import ROOT


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
    figures = {ablations.SNGAN: [(0.30, 0.40), (0.31, 0.39), (0.28, 0.42)],
               "relativistic": [(0.20, 0.31), (0.21, 0.30), (0.19, 0.31)],
               "flipped labels": [(0.25, 0.50), (0.40, 0.39)],  # a seed is still missing
               ablations.DCGAN: [(0.1, 0.1)]}
    for row, seeds in figures.items():
        for seed, (test, new_test) in enumerate(seeds):
            folder = tmp_path / ablations.name(row, seed)
            folder.mkdir()
            last = {"test": {"accuracy": [test, 0.01]}, "new_test": {"accuracy": [new_test, 0.01]}}
            (folder / "scores.json").write_text(json.dumps({"last": last}))
            (folder / "scores_without_ema.json").write_text(json.dumps(last))
    found = ablations.table(Namespace(out=tmp_path, seeds=3, device="cpu"), "narrow")
    assert list(found) == [ablations.SNGAN, "flipped labels", "relativistic", "no EMA", ablations.DCGAN]
    assert found[ablations.SNGAN]["test"] == pytest.approx([0.29667, 0.015275], rel=1e-3)
    assert found[ablations.SNGAN]["new_test"][0] == pytest.approx(0.40333, rel=1e-3)
    ours, theirs = [0.255, 0.255, 0.25], [0.35, 0.35, 0.35]
    assert found["relativistic"]["difference"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert found["relativistic"]["p"] == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert ablations.verdict(found["relativistic"]) == "worse (-0.097)"
    assert found["flipped labels"]["difference"] == pytest.approx(0.385 - 0.35)
    assert ablations.verdict(found["flipped labels"]).startswith("no clear difference (+0.035)")
    assert ablations.verdict(found[ablations.DCGAN]) == "no clear difference (-0.250)"  # of one seed
    assert ablations.verdict(found["no EMA"]) == "no clear difference (+0.000)"
    lines = ablations.markdown(found).splitlines()
    assert lines[2].startswith(f"| {ablations.SNGAN} | 0.297 ± 0.015 | 0.403 ± 0.015 | 3 |")
    assert "worse (-0.097) beside SNGAN, projection | worse |" in lines[4]
