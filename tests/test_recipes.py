"""What each part of a quick preset is worth: rows, equal minutes, table."""
import json

import pytest

from benchmarks import recipes
from common.errors import UserError

TINY = ("--data synthetic --device cpu --n-scenes 24 --image-size 32 --ch 2 --batch-size 8 --judge-width 8 "
        "--judge-steps 1 --eval-draws 1 --sample-every 0 --log-every 20")


def call(monkeypatch, arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["recipes.py", *arguments.split()])
    recipes.main()


@pytest.mark.parametrize("script", recipes.ROWS)
def test_each_row_is_accepted_by_its_script_and_unlike_the_others(script, tmp_path):
    configs = []
    for row in recipes.ROWS[script]:
        job = recipes.job_of(script, row, 0, 30, tmp_path)
        job.check()
        configs.append(vars(job.cfg))
    assert all(configs.count(config) == 1 for config in configs)
    assert {config["iters"] for config in configs} == {30}


def test_rows_run_for_their_paces_minutes_and_a_second_call_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipes, "ALL", TINY)
    monkeypatch.setitem(recipes.ROWS, "cdcgan_iclevr", {"base": "", "other": "--ch 4"})
    call(monkeypatch, "cdcgan_iclevr --rows other --minutes 0.01 --out runs")
    paced = recipes.seconds_per_iteration(tmp_path / "runs" / "pace of other" / "metrics.csv")
    content = json.loads((tmp_path / "runs" / "recipes.json").read_text())
    run, = content["recipes"]["other"]
    assert run["iterations"] == max(10, round(0.6 / paced)) and 0 <= run["val"] <= 1
    assert "| other | " in capsys.readouterr().out
    monkeypatch.setattr(recipes, "train_all", lambda jobs, _: [job.check() for job in jobs])
    call(monkeypatch, "cdcgan_iclevr --rows other --minutes 0.01 --out runs")
    assert json.loads((tmp_path / "runs" / "recipes.json").read_text()) == content


def test_the_table_has_the_runs_of_earlier_calls_too(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "ALL", TINY)
    monkeypatch.setitem(recipes.ROWS, "cdcgan_iclevr", {"base": "", "other": "--ch 4"})
    for flags in ("--rows base --seeds 2", "--rows other"):
        call(monkeypatch, f"cdcgan_iclevr {flags} --minutes 0.001 --out runs")
    rows = json.loads((tmp_path / "runs" / "recipes.json").read_text())["recipes"]
    assert {row: len(runs) for row, runs in rows.items()} == {"base": 2, "other": 1}


def test_the_table_has_means_over_seeds_and_the_best_first():
    def run(val):
        return {"val": val, "test": val, "new_test": 0.5, "minutes": 2.0, "iterations": 1000}
    lines = recipes.markdown({"worse": [run(0.1)], "better": [run(0.2), run(0.4)]}).splitlines()
    assert lines[2] == "| better | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.500 ± 0.000 | 1,000 | 2.0 | 2 |"
    assert lines[3].startswith("| worse | 0.100 | ")


def test_bad_values(monkeypatch):
    for arguments, message in (("--rows nothing", "'nothing': sngan_iclevr has the preset"),
                               ("--minutes 0", "--minutes more than 0"), ("--seeds 11", "1 to 10"),
                               ("vae_celeba", "invalid choice")):
        with pytest.raises(UserError, match=message):
            call(monkeypatch, arguments)
